# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from edgekd.errors import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("Straße 東京 🎉 a  b\u00a0c", "Straße 東京 🎉 a  b\u00a0c"),
        ("  indented", "  indented"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\r\n    b\tc\0\n", "a b c\\x00"),
        ("\x9b2J", "\\x9b2J"),
        ("evil\u202egnp.exe", "evil\\u202egnp.exe"),
        ("\u2066a\u2069\u200b\ufeff\u2028\u2029", "\\u2066a\\u2069\\u200b\\ufeff\\u2028\\u2029"),
        ("file-\udcff.csv", "file-\\udcff.csv"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_control_characters_are_shown_as_escapes_and_line_breaks_as_spaces(text, shown):
    assert printable(text) == shown


def test_a_long_text_is_cut():
    assert printable("x" * 100, 10) == "xxxxxxxxxx... (100 characters)"
    assert printable("a" + "\n" * 99, 10) == "a ... (100 characters)"
    assert len(printable("\x1b" * 10**6)) < 600
