# SPDX-License-Identifier: Apache-2.0
"""A cache whose files go away or cannot be written during a build: the build starts again, or ends with one message."""

from __future__ import annotations

import errno
import os
import resource
import time
from typing import TYPE_CHECKING, TypeVar

from edgekd.errors import EdgekdError, StorageError
from edgekd.kd.training import distributed
from edgekd.store.cache import storage_error
from edgekd.store.digests import write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgekd.errors import StageError
    from edgekd.ports import Reporter
    from edgekd.store.cache import Cache

T = TypeVar("T")
_TRIES = 4
_PROBE_BYTES = 2**20
_SETTLE_S = 0.5  # the other process may be in the middle of it
_STORAGE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE)


def with_cache(cache: Cache, reporter: Reporter, work: Callable[[], T]) -> T:
    """Return ``work()``. It is called again if another process removed files of the cache that it used: only lost steps run again.

    Raises:
        StorageError: if files are removed again and again, or the cache cannot be written or read.
        Exception: what ``work`` raised for another reason.
    """
    attempt = 0
    while True:
        attempt += 1
        try:
            if attempt > 1:
                cache.prepare()
            return work()
        except BrokenPipeError:  # nobody reads our output
            raise
        except Exception as error:
            if not _is_disturbed(cache, error):
                raise _describe(cache, error) from error
            if attempt == _TRIES or distributed.world_size() > 1:
                problem = f"another process removed files while this build used them ({attempt} times)"
                raise StorageError(f"cache: {cache.root}: {problem}; end that process, then build again") from error
        finally:
            cache.close()
        reporter.log(f"warning: cache: another process removed files of {cache.root} that this build uses; lost steps run again")
        time.sleep(_SETTLE_S)


def _is_disturbed(cache: Cache, error: Exception) -> bool:
    if cache.was_disturbed():
        return True
    if isinstance(error, EdgekdError) and not isinstance(error, StorageError):
        return False
    time.sleep(_SETTLE_S)
    return cache.was_disturbed()


def _describe(cache: Cache, error: Exception) -> Exception:
    """Return the error for the user: that of the storage if it is the reason, else the same."""
    if isinstance(error, EdgekdError):
        return error
    if isinstance(error, OSError):
        return storage_error("a file cannot be read or written", cache.root, error)
    reason = _named_reason(error) or _why_not_writable(cache.root)
    return error if reason is None else storage_error("a file cannot be written", cache.root, OSError(None, reason))


def _named_reason(error: Exception) -> str | None:
    """Return the reason that native code names in its message, if it is the storage's."""
    texts = f"{error} {error.__cause__ or ''}"
    return next((text for text in map(os.strerror, _STORAGE_ERRNOS) if text in texts), None)


def check_storage(cache: Cache, error: StageError) -> None:
    """Raise an error if the storage is the reason why a step failed, and not the model or the runtime.

    Raises:
        StorageError: for files that are gone, or a disk that cannot be written.
    """
    reason = "another process removed files that the step uses" if cache.was_disturbed() else _named_reason(error)
    if reason is not None:
        raise storage_error(str(error), cache.root, OSError(None, reason)) from error


def _why_not_writable(root: Path) -> str | None:
    """Return why the cache cannot be written, or None: native code often does not say why it failed."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY:
        return f"files are limited to {limit} bytes (ulimit -f)"
    probe = root / "tmp" / f".probe.{os.getpid()}"
    try:
        write_atomically(probe, bytes(_PROBE_BYTES))
        probe.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None
