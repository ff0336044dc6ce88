# SPDX-License-Identifier: Apache-2.0
"""What is in the folder of a cache, and what of it may be removed: nothing that a process uses, nothing that edgekd did not write."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from edgekd.store import locks
from edgekd.store.documents import is_key, read_entry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edgekd.domain.artifact import CacheEntry

_DAY_S = 86_400


def entries(root: Path) -> Iterator[tuple[str, CacheEntry | None, int, float]]:
    """Yield key, entry (None if damaged), bytes on disk and time of last use of each stored step; other files are ignored."""
    for folder in sorted((root / "objects").glob("*/*")):
        if is_key(folder.name) and folder.parent.name == folder.name[:2] and _is_folder(folder):
            with suppress(FileNotFoundError):  # pruned meanwhile
                yield folder.name, read_entry(folder), _size(folder), folder.stat().st_mtime


def prune(root: Path, max_gib: float | None, older_than_days: float | None) -> tuple[int, int]:
    """Remove the least recently used entries and partial work that no process uses; return their number and their bytes."""
    rows = [(used, size, root / "objects" / key[:2] / key) for key, _, size, used in entries(root)]
    rows += [(_last_change(path), _size(path), path) for path in _leftovers(root, "work")]
    total, removed, freed = sum(size for _, size, _ in rows), 0, 0
    for used, size, path in sorted(rows):
        too_old = older_than_days is not None and time.time() - used > older_than_days * _DAY_S
        too_large = max_gib is not None and total - freed > max_gib * 2**30
        if (too_old or too_large) and _remove_unused(root, path):
            removed, freed = removed + 1, freed + size
    remove_leftovers(root, "tmp", 0.0)
    return removed, freed


def remove_leftovers(root: Path, part: str, days: float) -> None:
    """Remove what killed processes left in ``tmp`` or ``work``, if it was not changed for so many days."""
    for path in _leftovers(root, part):
        if time.time() - _last_change(path) >= days * _DAY_S:
            _remove_unused(root, path)


def remove(root: Path, path: Path) -> None:
    """Remove an entry or a leftover: it is renamed first, so that nobody sees a part of it."""
    trash = root / "tmp" / f"{path.name.partition('.')[0]}.removed.{os.getpid()}"
    with suppress(OSError):
        _delete(trash)
    with suppress(OSError):
        path.rename(trash)
        _delete(trash)


def _delete(path: Path) -> None:
    if _is_folder(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()


def _remove_unused(root: Path, path: Path) -> bool:
    """Remove an entry or a leftover, unless a process uses it; return whether it is gone."""
    is_entry = path.parent.parent.name == "objects"
    with locks.try_exclusive(path if is_entry else root / "locks" / path.name[:3]) as is_free:
        if is_free:
            remove(root, path)
    return is_free


def _leftovers(root: Path, part: str) -> list[Path]:
    """Return what is in ``tmp`` or ``work`` under the name of a key."""
    return [path for path in sorted((root / part).iterdir()) if is_key(path.name.partition(".")[0])]


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _size(folder: Path) -> int:
    """Return the bytes of the files in a folder, as far as they exist."""
    sizes = []
    for path in folder.rglob("*") if _is_folder(folder) else ():
        with suppress(FileNotFoundError):
            sizes.append(path.lstat().st_size)
    return sum(sizes)


def _last_change(path: Path) -> float:
    """Return when a folder or a file in it was last changed."""
    try:
        return float(max(item.lstat().st_mtime for item in (path, *(path.iterdir() if _is_folder(path) else ()))))
    except OSError:  # it is changing now
        return time.time()
