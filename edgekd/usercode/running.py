# SPDX-License-Identifier: Apache-2.0
"""Which code of the user runs now, in memory that another process can read after this one has died."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterator

_shared: mmap.mmap | None = None
_current = b""


def note_running(shared: mmap.mmap) -> None:
    """Write into this memory from now on."""
    global _shared  # noqa: PLW0603  (one for the process)
    _shared = shared
    _write(b"")


def read_running(shared: mmap.mmap) -> str | None:
    """Return the entry point that runs, or that ran when the process died; None outside of the user's code."""
    return shared[:].partition(b"\0")[0].decode(errors="replace") or None


@contextmanager
def running(entry: str) -> Iterator[None]:
    """Note that the user's code of an entry point runs. A process that this code forks ends where the code returns."""
    outer, process = _current, os.getpid()
    _write(entry.encode())
    try:
        yield
    finally:
        if _shared is not None and os.getpid() != process:
            os._exit(1)  # a copy must not go on with the step: it would write the same files and messages
        _write(outer)


def _write(entry: bytes) -> None:
    global _current  # noqa: PLW0603  (the same)
    _current = entry
    if _shared is not None:
        text = entry[: len(_shared) - 1] + b"\0"
        _shared[: len(text)] = text
