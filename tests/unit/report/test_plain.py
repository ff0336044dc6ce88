# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from edgekd.report import plain


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("Straße 東京 🎉 a  b", "Straße 東京 🎉 a  b"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\r\nb\tc\0", "a\\r\\nb\\tc\\x00"),
        ("\x9b2J", "\\x9b2J"),
        ("evil\u202egnp.exe", "evil\\u202egnp.exe"),
        ("\u2066a\u2069\u200b\ufeff\u2028\u2029", "\\u2066a\\u2069\\u200b\\ufeff\\u2028\\u2029"),
        ("file-\udcff.csv", "file-\\udcff.csv"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_control_characters_are_shown_as_escapes(text, shown):
    assert plain.plain(text) == shown


def test_a_long_text_is_cut():
    assert plain.plain("x" * 100, 10) == "xxxxxxxxxx... (100 characters)"
    assert len(plain.plain("\x1b" * 10**6)) < 2100


def test_lines_stay_lines_and_many_are_counted():
    assert plain.plain_lines("a\x1b\nb\r\nc") == ["a\\x1b", "b", "c"]
    assert plain.plain_lines("a\n" * 1000)[-1] == "... (1,001 lines)"


def test_a_document_has_no_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    plain._home.cache_clear()
    document = {"/home/someone/x": ["in '/home/someone/a.onnx'", "/home/someone", "/home/someone2/a", 1, None, "\x1b"]}
    assert plain.plain_document(document) == {"~/x": ["in '~/a.onnx'", "~", "/home/someone2/a", 1, None, "\\x1b"]}
    monkeypatch.undo()
    plain._home.cache_clear()
