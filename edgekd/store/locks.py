# SPDX-License-Identifier: Apache-2.0
"""Locks between processes with ``flock``: the kernel releases them when a process ends, however it ends.

One lock per machine: stages that compute share it, measuring takes it exclusively. One lock per cache key: one writer.

A process that uses an entry of the cache holds a shared lock of its folder (``lease``), so that no other process prunes it.

A thread may take a lock again that it holds. A thread that holds the shared lock would wait for itself forever if it took the
exclusive one, so that is refused. Child processes do not hold the locks of their parent, whether they run another program or are
forked.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.errors import StorageError, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TIMEOUT = "EDGEKD_LOCK_TIMEOUT"  # environment variable, in seconds
_TIMEOUT_S = 3600.0  # for a lock that another user or another program holds; builds of one's own are waited for
_REMINDER_S = 60.0
_POLL_S = 0.2
_MACHINE_MODE = 0o666  # all users of the machine take the same lock
_PRIVATE_MODE = 0o600
_descriptors: set[int] = set()  # of the locks that this process holds or waits for


class _ThreadLocks(threading.local):
    """The locks that this thread holds: path to kind (``LOCK_SH`` or ``LOCK_EX``)."""

    def __init__(self) -> None:
        self.kinds: dict[Path, int] = {}


_thread_locks = _ThreadLocks()


@contextmanager
def exclusive(path: Path, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold a lock file exclusively.

    While another process holds it, ``on_wait`` is called at once and then each minute with a description of who holds it.

    Raises:
        StorageError: if the file cannot be locked, or somebody else holds it for longer than ``EDGEKD_LOCK_TIMEOUT`` (an hour).
    """
    with _hold(path, fcntl.LOCK_EX, on_wait):
        yield


@contextmanager
def exclusive_folder(folder: Path, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold a folder exclusively, by a lock on the folder itself: no file is left in it. On NFS, which cannot do that, no lock is held.

    Raises:
        StorageError: if the folder cannot be created or opened.
    """
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    with _hold(Path(os.path.realpath(folder)), fcntl.LOCK_EX, on_wait):
        yield


@contextmanager
def machine_exclusive(on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold exclusive access to the machine, for measuring: no other stage computes meanwhile.

    Raises:
        StorageError: as :func:`exclusive` does.
    """
    with _hold(_machine_path(), fcntl.LOCK_EX, on_wait):
        yield


@contextmanager
def machine_shared(on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Share the machine with other stages that compute, but not with a measurement.

    Raises:
        StorageError: as :func:`exclusive` does.
    """
    with _hold(_machine_path(), fcntl.LOCK_SH, on_wait):
        yield


@contextmanager
def _hold(path: Path, kind: int, on_wait: Callable[[str], None] | None) -> Iterator[None]:
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


def _acquire(path: Path, kind: int, on_wait: Callable[[str], None] | None) -> int:
    """Return the descriptor of the locked file; open it anew if it was removed or replaced while this process waited."""
    while True:
        try:
            descriptor = _open(path)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise StorageError(
                f"lock: {path} cannot be opened: {reason}; expected a file that you may write; "
                f"remove it, or set {_variable(path)} to a folder of your own"
            ) from error
        try:
            _wait(descriptor, path, kind, on_wait)
            if _is_current(descriptor, path):
                return descriptor
        except BaseException:
            _release(descriptor)
            raise
        _release(descriptor)


def _wait(descriptor: int, path: Path, kind: int, on_wait: Callable[[str], None] | None) -> None:
    """Lock a descriptor; until then, report who holds it."""
    started = reminded = time.monotonic()
    while not _try_lock(descriptor, path, kind):
        now = time.monotonic()
        if on_wait is not None and (reminded == started or now - reminded >= _REMINDER_S):
            reminded = now
            on_wait(_describe_holders(holders(descriptor)))
        if now - started > _timeout() and not all(map(_is_own_build, pids := holders(descriptor) or [0])):
            raise StorageError(
                f"lock: {path}: is held by {_describe_holders(pids)} for {now - started:.0f} s; "
                f"end that process if it hangs, set {TIMEOUT} to more seconds, or {_variable(path)} to a folder of your own"
            )
        time.sleep(_POLL_S)


def _try_lock(descriptor: int, path: Path, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if path.is_dir():
            return True
        raise StorageError(
            f"lock: {path} cannot be locked: {(error.strerror or str(error)).lower()}; "
            f"expected a file system with flock; set {_variable(path)} to a folder on a local disk"
        ) from error
    return True


def _timeout() -> float:
    text = os.environ.get(TIMEOUT) or str(_TIMEOUT_S)
    try:
        return float(text)
    except ValueError as error:
        raise StorageError(f"lock: {TIMEOUT} is {printable(text)!r}; expected a number of seconds") from error


def holders(descriptor: int) -> list[int]:
    """Return the processes that hold a ``flock`` of an open file, as far as Linux shows them."""
    inode = os.fstat(descriptor).st_ino
    with suppress(OSError):
        lines = [line.split() for line in Path("/proc/locks").read_text(encoding="ascii").splitlines()]
        rows = [fields for fields in lines if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(inode)]
        return sorted({int(fields[4]) for fields in rows})
    return []


def _describe_holders(pids: list[int]) -> str:
    """Return processes with their commands, as far as this user may see them."""
    names = [f"process {pid}" + (f" ({printable(command, 60)})" if (command := _command(pid)) else "") for pid in pids if pid > 0]
    return ", ".join(names) or "another process (it is not visible here)"


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def _is_own_build(pid: int) -> bool:
    """Return whether a process of this user runs Python, as each build does: it ends some time."""
    process = Path(f"/proc/{pid}")
    with suppress(OSError):
        return process.stat().st_uid == os.geteuid() and (process / "exe").readlink().name.startswith("python")
    return False


def lease(folder: Path) -> int | None:
    """Return a descriptor that keeps a folder from being pruned until it is closed; None if the folder is gone or no real folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    _descriptors.add(descriptor)
    try:
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if _is_current(descriptor, folder):
                return descriptor
    except OSError:  # a file system without flock spares nothing; whoever loses its files runs its step again
        return descriptor
    end_lease(descriptor)  # it is being pruned
    return None


def end_lease(descriptor: int) -> None:
    """Let a folder be pruned."""
    _release(descriptor)


@contextmanager
def try_exclusive(path: Path) -> Iterator[bool]:
    """Lock a file or folder exclusively if nobody holds it; yields whether nobody does, or it does not exist."""
    descriptor = -1
    is_free = True
    try:
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            _descriptors.add(descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        is_free = False
    except OSError:  # no file system with flock, or nothing that can be opened
        is_free = True
    try:
        yield is_free
    finally:
        _release(descriptor)


def _is_current(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _open(path: Path) -> int:
    mode = _MACHINE_MODE if path == _machine_path() else _PRIVATE_MODE
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
                descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, mode)
            except FileExistsError:
                continue  # another process was faster
            os.fchmod(descriptor, mode)  # whatever the umask
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


def _variable(path: Path) -> str:
    return "EDGEKD_LOCK_DIR" if path == _machine_path() else "EDGEKD_CACHE"


def _machine_path() -> Path:
    return Path(os.environ.get("EDGEKD_LOCK_DIR") or tempfile.gettempdir()) / "edgekd-machine.lock"
