# SPDX-License-Identifier: Apache-2.0
"""Text of others (exceptions, file names, class labels, messages of exporters), before it is printed or put into a report."""

from __future__ import annotations

import functools
import os
import re
import unicodedata
from typing import Any

MAX_CHARACTERS = 2000
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}  # controls, invisible and bidirectional marks, lone surrogates, line separators


def plain(text: str, limit: int = MAX_CHARACTERS) -> str:
    r"""Return one line of text without control characters, which could change what a terminal shows; a long text is cut.

    >>> plain("a\x1b[2Jb\u202ec\n")
    'a\\x1b[2Jb\\u202ec\\n'
    """
    shown = text[: limit + 1]
    if not shown.isascii() or not shown.isprintable():
        shown = "".join(character if _is_printable(character) else _escape(character) for character in shown)
    return shown if len(shown) <= limit else f"{shown[:limit]}... ({len(text):,} characters)"


def plain_lines(text: str, limit: int = MAX_CHARACTERS) -> list[str]:
    """Return the lines of a text, each as ``plain`` has it; further lines than 100 are counted only."""
    lines = text.split("\n")
    shown = [plain(line.rstrip("\r"), limit) for line in lines[:100]]
    return shown if len(lines) == len(shown) else [*shown, f"... ({len(lines):,} lines)"]


def plain_document(value: Any) -> Any:
    """Return a JSON value with all its texts plain, and the user's home folder as ``~``."""
    if isinstance(value, str):
        return plain(_without_home(value))
    if isinstance(value, dict):
        return {plain_document(key): plain_document(item) for key, item in value.items()}
    return [plain_document(item) for item in value] if isinstance(value, list | tuple) else value


def _is_printable(character: str) -> bool:
    return character == " " or unicodedata.category(character) not in _UNPRINTABLE


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()


def _without_home(text: str) -> str:
    home = _home()
    return text if home is None or home not in text else re.sub(rf"{re.escape(home)}(?=/|$|\W)", "~", text)


@functools.cache
def _home() -> str | None:
    home = os.path.expanduser("~")  # noqa: PTH111  (Path.home raises where there is none)
    return home if len(home) > 1 and home.startswith("/") else None
