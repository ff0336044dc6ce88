# SPDX-License-Identifier: Apache-2.0
"""Content-addressed store: key, get, put, verify, prune.

Layout below its root::

    objects/KK/KEY/       one entry: the files of a step, and entry.json (its key material, digests, metrics)
    records/BASE.json     what the user's code read, for keys that depend on it (ports.Record); newest first
    last/STEP.json        the key material of the last run of a step, to explain a miss
    tmp/BASE.PID/         an entry that is being written; work/BASE/: partial work that survives a kill; one writer per key (locks/)
    stat.json             digests of files, valid while their size, times and inode are unchanged
    secret                the key of the hashes of environment values

An entry is written to a temporary folder, flushed to disk and renamed, so it is complete or absent. An entry that does not match
its digests is removed and computed again. A process holds a lease of each entry that it uses; prune spares these. Other files that
lie in the folder are ignored, and nothing follows a symbolic link out of it.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from edgekd.errors import StorageError, printable
from edgekd.store import folder as cache_root
from edgekd.store import locks, pruning
from edgekd.store.digests import canonical_json, changes, digest, file_digest, first_change, flush, write_atomically
from edgekd.store.documents import SCHEMA, as_json, read, read_entry, read_records, read_stats, seal
from edgekd.store.folder import cache_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from edgekd.domain.artifact import Artifact, CacheEntry
    from edgekd.ports import Record, StageResult

__all__ = ["Cache", "cache_folder", "storage_error"]

_MAX_RECORDS = 16
_RACY_NS = 2_000_000_000  # a file this young may change again without a change of its times
_DAYS_TO_RESUME = 14  # partial work that nobody has continued for so long is removed by the next build
_TRIES = 3


class Cache:
    """A cache in one folder, which any number of processes may share."""

    def __init__(self, root: Path, warn: Callable[[str], None]) -> None:
        self.root = root
        self.secret = b""
        self._warn = warn
        self._stats: dict[str, list[Any]] | None = None
        self._stats_changed = False
        self._leases: dict[str, int] = {}  # of the entries that this process uses
        self._folders: dict[Path, int] = {}  # of temporary and partial work that this process writes: descriptors

    def prepare(self) -> None:
        """Create the folders, and remove what killed processes left that nobody can use.

        Raises:
            StorageError: if they cannot be written, or another user could have written them.
        """
        try:
            cache_root.prepare(self.root)
            with locks.exclusive(self.root / "locks" / "secret"):
                self.secret = cache_root.read_secret(self.root)
            self._watch(self.root / "tmp")
            pruning.remove_leftovers(self.root, "tmp", 0.0)
            pruning.remove_leftovers(self.root, "work", _DAYS_TO_RESUME)
        except OSError as error:
            raise storage_error("the cache folder cannot be written", self.root, error) from error

    def lock(self, key: str, on_wait: Callable[[str], None] | None = None) -> AbstractContextManager[None]:
        """Return the lock that makes this process the only writer of a key; ``on_wait`` gets who holds it."""
        return locks.exclusive(self.root / "locks" / key[:3], on_wait)

    def work(self, key: str) -> Path:
        """Return the folder for partial work of a key; it exists until the entry is stored."""
        folder = self.root / "work" / key
        folder.mkdir(mode=0o700, exist_ok=True)
        return self._watch(folder)

    def new_output_folder(self, key: str) -> Path:
        """Return an empty folder for the files of an entry."""
        folder = self.root / "tmp" / f"{key}.{os.getpid()}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        return self._watch(folder)

    def _watch(self, folder: Path) -> Path:
        """Hold a folder open, to notice when another process removes or replaces it."""
        self._forget(folder)
        descriptor = locks.lease(folder)
        if descriptor is None:
            raise FileNotFoundError(errno.ENOENT, "another process removed it", str(folder))
        self._folders[folder] = descriptor
        return folder

    def _forget(self, folder: Path) -> None:
        if (descriptor := self._folders.pop(folder, None)) is not None:
            locks.end_lease(descriptor)

    def _is_replaced(self, folder: Path) -> bool:
        descriptor = self._folders.get(folder)
        return descriptor is not None and os.fstat(descriptor).st_ino != _inode(folder)

    def was_disturbed(self) -> bool:
        """Return whether another process removed files that this process uses: a step that failed may succeed once more."""
        missing = [name for name in cache_root.PARTS if not (self.root / name).is_dir()]
        replaced = [folder for folder in self._folders if self._is_replaced(folder)]
        return bool(missing or replaced) or any(read_entry(self._folder(key)) is None for key in self._leases)

    def get(self, key: str) -> CacheEntry | None:
        """Return an entry, or None if there is none; a damaged one is removed. No other process prunes it until ``close``.

        Raises:
            StorageError: if the disk cannot be read.
        """
        folder = self._folder(key)
        try:
            if not self._take_lease(key):
                if os.path.lexists(folder) and not folder.is_dir():
                    self.discard(key)
                return None
            entry = read_entry(folder)
            if entry is not None and all(self._is_intact(artifact) for artifact in entry.artifacts.values()):
                return entry
        except OSError as error:
            raise storage_error("an entry cannot be read", folder, error) from error
        self.discard(key)
        return None

    def _take_lease(self, key: str) -> bool:
        """Keep an entry from being pruned; return whether it exists."""
        folder = self._folder(key)
        held = self._leases.get(key)
        if held is not None and os.fstat(held).st_ino == _inode(folder):
            return True
        self._end_lease(key)
        lease = locks.lease(folder)
        if lease is not None:
            self._leases[key] = lease
        return lease is not None

    def _end_lease(self, key: str) -> None:
        if (lease := self._leases.pop(key, None)) is not None:
            locks.end_lease(lease)

    def discard(self, key: str) -> None:
        """Remove a damaged entry, with a warning."""
        self._warn(f"cache: {self._folder(key)} is damaged and was removed; its step runs again")
        self.remove(key)

    def put(self, out: Path, key: str, material: Mapping[str, Any], result: StageResult, seconds: float) -> CacheEntry:
        """Store the files in ``out``, a folder of ``new_output_folder``, and return the entry.

        Raises:
            StorageError: if the disk is full or the cache cannot be written.
        """
        folder = self._folder(key)
        try:
            if self._is_replaced(out.parent) or self._is_replaced(out) or not (self.root / "CACHEDIR.TAG").exists():
                raise FileNotFoundError(errno.ENOENT, "another process removed it", str(out))
            self._write_sidecar(out, key, material, result, seconds)
            folder.parent.mkdir(mode=0o700, exist_ok=True)
            self._end_lease(key)
            lease = locks.lease(out)  # it stays with the folder when that is renamed
            self._move(out, key)
            if lease is not None:
                self._leases[key] = lease
            flush(folder.parent)
        except OSError as error:
            shutil.rmtree(out, ignore_errors=True)
            raise storage_error("an entry cannot be stored", self.root, error) from error
        for done in (out, work := self.root / "work" / out.name.partition(".")[0]):
            self._forget(done)
        shutil.rmtree(work, ignore_errors=True)
        entry = self.get(key)
        if entry is None:
            message = f"cache: {folder}: the new entry cannot be read back; check the disk, then build again"
            raise StorageError(message)
        return entry

    def _write_sidecar(self, out: Path, key: str, material: Mapping[str, Any], result: StageResult, seconds: float) -> None:
        files = {}
        for path in sorted(out.iterdir()):
            path.chmod(0o600)
            flush(path)
            files[path.name] = {"sha256": self.digest_of(path), "size": path.stat().st_size}
        body = {
            "schema": SCHEMA,
            "key": key,
            "material": material,
            "files": files,
            "metrics": result.metrics,
            "notes": list(result.notes),
            "seconds": round(seconds, 3),
        }
        write_atomically(out / "entry.json", as_json(seal(body)), mode=0o600)
        flush(out)

    def _move(self, out: Path, key: str) -> None:
        """Put a complete entry in its place; what is there is damaged, or another process was faster."""
        for attempt in range(_TRIES):
            self.remove(key)
            try:
                out.rename(self._folder(key))
            except OSError as error:
                if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR} or attempt == _TRIES - 1:
                    raise
            else:
                return

    def matching_record(self, base: str, recipe_dir: Path) -> Mapping[str, Any] | None:
        """Return the record under a base key that is still valid: nothing that the user's code read has changed."""
        return next(
            (record for record in self._records(base) if first_change(record, recipe_dir, self.digest_of, self.secret) is None), None
        )

    def matching_key(self, base: str, recipe_dir: Path) -> str | None:
        """Return the key of the entry whose record is still valid."""
        record = self.matching_record(base, recipe_dir)
        return None if record is None else digest([base, record])

    def add_record(self, base: str, record: Record) -> str:
        """Store what the user's code read, and return the key of the entry."""
        newest = asdict(record)
        records = [newest, *(old for old in self._records(base) if old != newest)]
        write_atomically(self.root / "records" / f"{base}.json", canonical_json(records[:_MAX_RECORDS]), mode=0o600)
        return digest([base, newest])

    def last_material(self, name: str) -> Mapping[str, Any] | None:
        """Return the key material of the last run under a name, to explain a miss."""
        return read(self._material_path(name))

    def save_material(self, name: str, material: Mapping[str, Any]) -> None:
        """Store the key material of a run under a name."""
        if self.last_material(name) != material:
            write_atomically(self._material_path(name), canonical_json(material), mode=0o600)

    def nearest_changes(self, base: str, recipe_dir: Path) -> list[str]:
        """Return the changes since the record with the fewest changes, to explain a miss."""
        return min((list(changes(record, recipe_dir, self.digest_of, self.secret)) for record in self._records(base)), key=len, default=[])

    def digest_of(self, path: Path) -> str:
        """Return the SHA-256 of a file; it is computed again only if size, times or inode have changed."""
        if self._stats is None:
            self._stats = read_stats(self.root / "stat.json")
        stat = path.stat()
        fingerprint = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        stored = self._stats.get(str(path))
        if stored is not None and stored[:4] == fingerprint:
            return str(stored[4])
        current = file_digest(path)
        self._stats[str(path)] = [*fingerprint, current]
        self._stats_changed = True
        return current

    def close(self) -> None:
        """End the leases, and save the computed digests, except those of files that are too young to trust their times."""
        for key in list(self._leases):
            self._end_lease(key)
        for folder in list(self._folders):
            self._forget(folder)
        if not self._stats_changed or self._stats is None:
            return
        now = time.time_ns()
        settled = {name: stat for name, stat in self._stats.items() if now - max(stat[1], stat[2]) > _RACY_NS}
        with suppress(OSError):
            write_atomically(self.root / "stat.json", canonical_json(settled), mode=0o600)
        self._stats_changed = False

    def entries(self) -> Iterator[tuple[str, CacheEntry | None, int, float]]:
        """Return key, entry (None if damaged), bytes on disk and time of last use of each stored step."""
        return pruning.entries(self.root)

    def touch(self, key: str) -> None:
        """Record that an entry was used."""
        with suppress(OSError):
            os.utime(self._folder(key))

    def damaged_files(self, key: str) -> list[str]:
        """Return the names of the files of an entry that do not match their digests; reads every byte."""
        entry = read_entry(self._folder(key))
        if entry is None:
            return ["entry.json"] if self._folder(key).exists() else []
        return [name for name, item in entry.artifacts.items() if not _matches(item)]

    def remove(self, key: str) -> None:
        """Remove an entry: it is renamed first, so that nobody sees a part of it."""
        self._end_lease(key)
        pruning.remove(self.root, self._folder(key))

    def prune(self, max_gib: float | None, older_than_days: float | None) -> tuple[int, int]:
        """Remove the least recently used entries and partial work; return their number and their bytes. What is in use is spared."""
        return pruning.prune(self.root, max_gib, older_than_days)

    def _folder(self, key: str) -> Path:
        return self.root / "objects" / key[:2] / key

    def _material_path(self, name: str) -> Path:
        return self.root / "last" / f"{digest(name)[:32]}.json"

    def _records(self, base: str) -> list[dict[str, Any]]:
        return read_records(self.root / "records" / f"{base}.json")

    def _is_intact(self, artifact: Artifact) -> bool:
        # stat.json may itself be damaged: only the bytes of the file prove damage
        try:
            return self.digest_of(artifact.path) == artifact.digest or file_digest(artifact.path) == artifact.digest
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError):
            return False


def storage_error(problem: str, path: Path, error: OSError) -> StorageError:
    """Return the error for a disk that cannot be written or read."""
    reason = error.strerror or str(error)
    name = "" if error.filename is None or str(error.filename) == str(path) else f": {error.filename}"
    return StorageError(
        f"cache: {path}: {problem}: {printable(reason + name)}; free space or name another folder with --cache or {cache_root.VARIABLE}"
    )


def _matches(artifact: Artifact) -> bool:
    try:
        return file_digest(artifact.path) == artifact.digest
    except OSError:
        return False


def _inode(path: Path) -> int | None:
    try:
        return path.lstat().st_ino
    except OSError:
        return None
