# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from edgekd.report import plain


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
