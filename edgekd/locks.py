# SPDX-License-Identifier: Apache-2.0
"""Locks between processes, on ``flock``: the kernel releases them when a process ends, however it ends.

One lock a machine: heavy stages share it, measuring holds it alone. One lock a cache key: one writer.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_MODE = 0o666  # other users of the machine take the same lock


@contextmanager
def exclusive(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a lock file alone; ``waiting`` is called once if another process holds it."""
    with _held(path, fcntl.LOCK_EX, waiting):
        yield


@contextmanager
def machine_exclusive(waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the machine alone: nothing heavy runs meanwhile. For measuring."""
    with _held(_machine_path(), fcntl.LOCK_EX, waiting):
        yield


@contextmanager
def machine_shared(waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Share the machine with other heavy work, but with no measurement."""
    with _held(_machine_path(), fcntl.LOCK_SH, waiting):
        yield


@contextmanager
def _held(path: Path, kind: int, waiting: Callable[[], None] | None) -> Iterator[None]:
    descriptor = _open(path)
    try:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)  # releases the lock; Python's descriptors are not inherited by children


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags)  # a sticky folder refuses O_CREAT on another user's file
    except FileNotFoundError:
        descriptor = os.open(path, flags | os.O_CREAT, _MODE)
        os.fchmod(descriptor, _MODE)
        return descriptor


def _machine_path() -> Path:
    return Path(os.environ.get("EDGEKD_LOCK_DIR") or tempfile.gettempdir()) / "edgekd-machine.lock"
