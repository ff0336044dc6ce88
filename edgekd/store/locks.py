# SPDX-License-Identifier: Apache-2.0
"""Locks between processes with ``flock``: the kernel releases them when a process ends, however it ends.

One lock per machine: stages that compute share it, measuring takes it exclusively. One lock per cache key: one writer.

A thread may take a lock again that it holds. A thread that holds the shared lock would wait for itself forever if it took the
exclusive one, so that is refused. Child processes do not hold the locks of their parent, whether they run another program or are
forked.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_MODE = 0o666  # all users of the machine take the same lock
_descriptors: set[int] = set()  # of the locks that this process holds or waits for


class _ThreadLocks(threading.local):
    """The locks that this thread holds: path to kind (``LOCK_SH`` or ``LOCK_EX``)."""

    def __init__(self) -> None:
        self.kinds: dict[Path, int] = {}


_thread_locks = _ThreadLocks()


@contextmanager
def exclusive(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a lock file exclusively; ``on_wait`` is called once if another process holds it.

    Raises:
        StorageError: if the file cannot be opened.
    """
    with _hold(path, fcntl.LOCK_EX, on_wait):
        yield


@contextmanager
def exclusive_folder(folder: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a folder exclusively, by a lock on the folder itself: no file is left in it. On NFS, which cannot do that, no lock is held.

    Raises:
        StorageError: if the folder cannot be created or opened.
    """
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    with _hold(Path(os.path.realpath(folder)), fcntl.LOCK_EX, on_wait):
        yield


@contextmanager
def machine_exclusive(on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold exclusive access to the machine, for measuring: no other stage computes meanwhile.

    Raises:
        StorageError: if the machine's lock file cannot be opened.
    """
    with _hold(_machine_path(), fcntl.LOCK_EX, on_wait):
        yield


@contextmanager
def machine_shared(on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Share the machine with other stages that compute, but not with a measurement.

    Raises:
        StorageError: if the machine's lock file cannot be opened.
    """
    with _hold(_machine_path(), fcntl.LOCK_SH, on_wait):
        yield


@contextmanager
def _hold(path: Path, kind: int, on_wait: Callable[[], None] | None) -> Iterator[None]:
    kinds = _thread_locks.kinds
    if path in kinds:
        if kind == fcntl.LOCK_EX and kinds[path] == fcntl.LOCK_SH:
            raise RuntimeError(f"{path} is held as a shared lock by this thread, which must release it before it takes the exclusive one")
        yield
        return
    descriptor = _acquire(path, kind, on_wait)
    kinds[path] = kind
    try:
        yield
    finally:
        kinds.pop(path, None)
        _release(descriptor)


def _acquire(path: Path, kind: int, on_wait: Callable[[], None] | None) -> int:
    """Return the descriptor of the locked file; open it anew if it was removed or replaced while this process waited."""
    while True:
        try:
            descriptor = _open(path)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            variable = "EDGEKD_LOCK_DIR" if path == _machine_path() else "EDGEKD_CACHE"
            raise StorageError(
                f"lock: {path} cannot be opened: {reason}; expected a file that you may write; "
                f"remove it, or set {variable} to a folder of your own"
            ) from error
        try:
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if on_wait is not None:
                    on_wait()
                    on_wait = None
                fcntl.flock(descriptor, kind)
            except OSError:
                if not path.is_dir():
                    raise
            if _is_current(descriptor, path):
                return descriptor
        except BaseException:
            _release(descriptor)
            raise
        _release(descriptor)


def _is_current(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        try:
            descriptor = os.open(path, flags)  # without O_CREAT, which a sticky folder refuses for another user's file
        except IsADirectoryError:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            _descriptors.add(descriptor)
            return descriptor
        except FileNotFoundError:
            try:
                descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, _MODE)
            except FileExistsError:
                continue  # another process was faster
            os.fchmod(descriptor, _MODE)  # whatever the umask
        _descriptors.add(descriptor)
        return descriptor


def _release(descriptor: int) -> None:
    if descriptor in _descriptors:  # False in a forked child, which has closed it
        _descriptors.discard(descriptor)
        os.close(descriptor)


def _close_in_child() -> None:
    """Close the parent's locks in a forked child, so that they end with the parent and not with its last child."""
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()
    _thread_locks.kinds.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _machine_path() -> Path:
    return Path(os.environ.get("EDGEKD_LOCK_DIR") or tempfile.gettempdir()) / "edgekd-machine.lock"
