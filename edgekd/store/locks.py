# SPDX-License-Identifier: Apache-2.0
"""Locks between processes, on ``flock``: the kernel releases them when a process ends, however it ends.

One lock a machine: heavy stages share it, measuring holds it alone. One lock a cache key: one writer.

A thread that takes again what it holds goes on at once; one that shares the machine and wants it alone would wait for itself
for ever, so that is refused. Children do not hold a lock of their parent: neither those that run another program nor those
that are forked.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_MODE = 0o666  # other users of the machine take the same lock
_descriptors: set[int] = set()  # of the locks that this process holds or waits for


class _Thread(threading.local):
    """What this thread holds: path to kind."""

    def __init__(self) -> None:
        self.kinds: dict[Path, int] = {}


_thread = _Thread()


@contextmanager
def exclusive(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a lock file alone; ``waiting`` is called once if another process holds it.

    Raises:
        StorageError: if the file cannot be opened.
    """
    with _held(path, fcntl.LOCK_EX, waiting):
        yield


@contextmanager
def machine_exclusive(waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the machine alone: nothing heavy runs meanwhile. For measuring.

    Raises:
        StorageError: if the machine's lock file cannot be opened.
    """
    with _held(_machine_path(), fcntl.LOCK_EX, waiting):
        yield


@contextmanager
def machine_shared(waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Share the machine with other heavy work, but with no measurement.

    Raises:
        StorageError: if the machine's lock file cannot be opened.
    """
    with _held(_machine_path(), fcntl.LOCK_SH, waiting):
        yield


@contextmanager
def _held(path: Path, kind: int, waiting: Callable[[], None] | None) -> Iterator[None]:
    kinds = _thread.kinds
    if path in kinds:
        if kind == fcntl.LOCK_EX and kinds[path] == fcntl.LOCK_SH:
            raise RuntimeError(f"{path} is shared by this thread, which cannot hold it alone before it lets go")
        yield
        return
    descriptor = _taken(path, kind, waiting)
    kinds[path] = kind
    try:
        yield
    finally:
        kinds.pop(path, None)
        _release(descriptor)


def _taken(path: Path, kind: int, waiting: Callable[[], None] | None) -> int:
    """Return the descriptor of a lock file that is locked and still has its name: a cleaner may have removed it."""
    while True:
        try:
            descriptor = _open(path)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            mend = f"remove it, or set {'EDGEKD_LOCK_DIR' if path == _machine_path() else 'EDGEKD_CACHE'} to a folder of your own"
            raise StorageError(f"lock: {path} cannot be opened: {reason}; expected a file that you may write; {mend}") from error
        try:
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting is not None:
                    waiting()
                    waiting = None
                fcntl.flock(descriptor, kind)
            if _is_named(descriptor, path):
                return descriptor
        except BaseException:
            _release(descriptor)
            raise
        _release(descriptor)


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        try:
            descriptor = os.open(path, flags)  # a sticky folder refuses O_CREAT on another user's file
        except FileNotFoundError:
            try:
                descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, _MODE)
            except FileExistsError:
                continue  # another process was faster
            os.fchmod(descriptor, _MODE)  # whatever the umask
        _descriptors.add(descriptor)
        return descriptor


def _release(descriptor: int) -> None:
    if descriptor in _descriptors:  # not so in a forked child
        _descriptors.discard(descriptor)
        os.close(descriptor)


def _forget() -> None:
    """Close the parent's locks in a forked child, so that they end with the parent and not with its last child."""
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()
    _thread.kinds.clear()


os.register_at_fork(after_in_child=_forget)


def _machine_path() -> Path:
    return Path(os.environ.get("EDGEKD_LOCK_DIR") or tempfile.gettempdir()) / "edgekd-machine.lock"
