# SPDX-License-Identifier: Apache-2.0
"""Text of others (exceptions, file names, class labels, messages of exporters), before it is printed or put into a report."""

from __future__ import annotations

import functools
import os
import re
from typing import Any

from edgekd.errors import printable

MAX_CHARACTERS = 2000  # of one text


def plain_lines(text: str) -> list[str]:
    """Return the lines of a text, each printable; further lines than 100 are counted only."""
    lines = text.split("\n")
    shown = [printable(line, MAX_CHARACTERS) for line in lines[:100]]
    return shown if len(lines) == len(shown) else [*shown, f"... ({len(lines):,} lines)"]


def plain_document(value: Any) -> Any:
    """Return a JSON value with all its texts printable, and the user's home folder as ``~``."""
    if isinstance(value, str):
        return printable(_without_home(value), MAX_CHARACTERS)
    if isinstance(value, dict):
        return {plain_document(key): plain_document(item) for key, item in value.items()}
    return [plain_document(item) for item in value] if isinstance(value, list | tuple) else value


def _without_home(text: str) -> str:
    home = _home()
    return text if home is None or home not in text else re.sub(rf"{re.escape(home)}(?=/|$|\W)", "~", text)


@functools.cache
def _home() -> str | None:
    home = os.path.expanduser("~")  # noqa: PTH111  (Path.home raises where there is none)
    return home if len(home) > 1 and home.startswith("/") else None
