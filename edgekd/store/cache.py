# SPDX-License-Identifier: Apache-2.0
"""Content-addressed store: key, get, put, verify, prune.

Layout below its root::

    objects/KK/KEY/       one entry: the files of a step, and entry.json (its key material, digests, metrics)
    records/BASE.json     what the user's code read, for keys that depend on it (ports.Record); newest first
    last/STEP.json        the key material of the last run of a step, to explain a miss
    tmp/KEY/  work/KEY/   an entry that is being written / partial work that survives a kill; one writer per key (locks/)
    stat.json             digests of files, valid while their size, times and inode are unchanged

An entry is written to a temporary folder, flushed to disk and renamed, so it is complete or absent. An entry that does not match
its digests is removed and computed again.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.domain.artifact import Artifact, CacheEntry
from edgekd.errors import StorageError
from edgekd.store import locks
from edgekd.store.digests import canonical_json, changes, digest, file_digest, first_change, flush, write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from edgekd.ports import Record, StageResult

SCHEMA = 1
_MAX_RECORDS = 16
_RACY_NS = 2_000_000_000  # a file this young may change again without a change of its times


def cache_folder(requested: Path | None) -> Path:
    """Return the folder of the cache: the requested one, else that of ``EDGEKD_CACHE``, else the default of the user."""
    if requested is not None:
        return requested.absolute()
    if from_environment := os.environ.get("EDGEKD_CACHE"):
        return Path(from_environment).absolute()
    from platformdirs import user_cache_path

    return user_cache_path("edgekd", appauthor=False)


class Cache:
    """A cache in one folder, which any number of processes may share."""

    def __init__(self, root: Path, warn: Callable[[str], None]) -> None:
        self.root = root
        self._warn = warn
        self._stats: dict[str, list[Any]] | None = None
        self._stats_changed = False

    def prepare(self) -> None:
        """Create the folders.

        Raises:
            StorageError: if they cannot be written.
        """
        try:
            for name in ("objects", "records", "last", "tmp", "work", "locks"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            (self.root / "CACHEDIR.TAG").write_text("Signature: 8a477f597d28d172789f06886806bc55\n# made by edgekd; safe to delete\n")
        except OSError as error:
            raise storage_error("the cache folder cannot be written", self.root, error) from error

    def lock(self, key: str) -> AbstractContextManager[None]:
        """Return the lock that makes this process the only writer of a key."""
        return locks.exclusive(self.root / "locks" / key[:3])

    def work(self, key: str) -> Path:
        """Return the folder for partial work of a key; it exists until the entry is stored."""
        folder = self.root / "work" / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def new_output_folder(self, key: str) -> Path:
        """Return an empty folder for the files of an entry, without the leftovers of a killed process."""
        folder = self.root / "tmp" / key
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def get(self, key: str) -> CacheEntry | None:
        """Return an entry, or None if there is none; a damaged one is removed."""
        folder = self._folder(key)
        if not folder.exists():
            return None
        entry = _read_entry(folder)
        if entry is not None and all(self._is_intact(artifact) for artifact in entry.artifacts.values()):
            return entry
        self.discard(key)
        return None

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
            files = {}
            for path in sorted(out.iterdir()):
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
            sidecar = out / "entry.json"
            sidecar.write_text(json.dumps({**body, "self": digest(body)}, indent=1, sort_keys=True) + "\n")
            flush(sidecar)
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            out.rename(folder)
            flush(folder.parent)
        except OSError as error:
            shutil.rmtree(out, ignore_errors=True)
            raise storage_error("an entry cannot be stored", self.root, error) from error
        shutil.rmtree(self.root / "work" / out.name, ignore_errors=True)
        entry = _read_entry(folder)
        if entry is None:
            message = f"cache: {folder}: the new entry cannot be read back; check the disk, then build again"
            raise StorageError(message)
        return entry

    def matching_record(self, base: str, recipe_dir: Path) -> Mapping[str, Any] | None:
        """Return the record under a base key that is still valid: nothing that the user's code read has changed."""
        return next((record for record in self._records(base) if first_change(record, recipe_dir, self.digest_of) is None), None)

    def matching_key(self, base: str, recipe_dir: Path) -> str | None:
        """Return the key of the entry whose record is still valid."""
        record = self.matching_record(base, recipe_dir)
        return None if record is None else digest([base, record])

    def add_record(self, base: str, record: Record) -> str:
        """Store what the user's code read, and return the key of the entry."""
        newest = asdict(record)
        records = [newest, *(old for old in self._records(base) if old != newest)]
        write_atomically(self.root / "records" / f"{base}.json", canonical_json(records[:_MAX_RECORDS]))
        return digest([base, newest])

    def last_material(self, name: str) -> Mapping[str, Any] | None:
        """Return the key material of the last run under a name, to explain a miss."""
        material = _read_json(self._material_path(name))
        return material if isinstance(material, dict) else None

    def save_material(self, name: str, material: Mapping[str, Any]) -> None:
        """Store the key material of a run under a name."""
        if self.last_material(name) != material:
            write_atomically(self._material_path(name), canonical_json(material))

    def nearest_changes(self, base: str, recipe_dir: Path) -> list[str]:
        """Return the changes since the record with the fewest changes, to explain a miss."""
        return min((list(changes(record, recipe_dir, self.digest_of)) for record in self._records(base)), key=len, default=[])

    def digest_of(self, path: Path) -> str:
        """Return the SHA-256 of a file; it is computed again only if size, times or inode have changed."""
        if self._stats is None:
            stats = _read_json(self.root / "stat.json")
            self._stats = stats if isinstance(stats, dict) else {}
        stat = path.stat()
        fingerprint = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        stored = self._stats.get(str(path))
        if isinstance(stored, list) and stored[:4] == fingerprint and isinstance(stored[-1], str):
            return stored[-1]
        current = file_digest(path)
        self._stats[str(path)] = [*fingerprint, current]
        self._stats_changed = True
        return current

    def close(self) -> None:
        """Save the computed digests, except those of files that are too young to trust their times."""
        if not self._stats_changed or self._stats is None:
            return
        now = time.time_ns()
        settled = {name: stat for name, stat in self._stats.items() if now - max(stat[1], stat[2]) > _RACY_NS}
        with suppress(OSError):
            write_atomically(self.root / "stat.json", canonical_json(settled))
        self._stats_changed = False

    def entries(self) -> Iterator[tuple[str, CacheEntry | None, int, float]]:
        """Yield key, entry (None if damaged), bytes on disk and time of last use of each stored step."""
        for folder in sorted((self.root / "objects").glob("*/*")):
            size = sum(path.stat().st_size for path in folder.iterdir())
            yield folder.name, _read_entry(folder), size, folder.stat().st_mtime

    def touch(self, key: str) -> None:
        """Record that an entry was used."""
        with suppress(OSError):
            os.utime(self._folder(key))

    def damaged_files(self, key: str) -> list[str]:
        """Return the names of the files of an entry that do not match their digests; reads every byte."""
        entry = _read_entry(self._folder(key))
        if entry is None:
            return ["entry.json"]
        return [name for name, item in entry.artifacts.items() if not item.path.is_file() or file_digest(item.path) != item.digest]

    def remove(self, key: str) -> None:
        """Remove an entry."""
        shutil.rmtree(self._folder(key), ignore_errors=True)

    def prune(self, max_gib: float | None, older_than_days: float | None) -> tuple[int, int]:
        """Remove the least recently used entries; return their number and their bytes."""
        entries = sorted(self.entries(), key=lambda row: row[3])
        total, removed, freed = sum(size for _, _, size, _ in entries), 0, 0
        for key, _, size, used in entries:
            too_old = older_than_days is not None and time.time() - used > older_than_days * 86_400
            too_large = max_gib is not None and total - freed > max_gib * 2**30
            if too_old or too_large:
                self.remove(key)
                removed, freed = removed + 1, freed + size
        return removed, freed

    def _folder(self, key: str) -> Path:
        return self.root / "objects" / key[:2] / key

    def _material_path(self, name: str) -> Path:
        return self.root / "last" / f"{digest(name)[:32]}.json"

    def _records(self, base: str) -> list[dict[str, Any]]:
        records = _read_json(self.root / "records" / f"{base}.json")
        return [record for record in records if isinstance(record, dict)] if isinstance(records, list) else []

    def _is_intact(self, artifact: Artifact) -> bool:
        # stat.json may itself be damaged: only the bytes of the file prove damage
        return self.digest_of(artifact.path) == artifact.digest or file_digest(artifact.path) == artifact.digest


def storage_error(problem: str, path: Path, error: OSError) -> StorageError:
    """Return the error for a disk that cannot be written or read."""
    return StorageError(
        f"cache: {path}: {problem}: {error.strerror or error}; free space or name another folder with --cache or EDGEKD_CACHE"
    )


def _read_entry(folder: Path) -> CacheEntry | None:
    body = _read_json(folder / "entry.json")
    if not isinstance(body, dict) or body.get("schema") != SCHEMA:
        return None
    if body.pop("self", None) != digest(body) or body.get("key") != folder.name:
        return None
    artifacts = {name: Artifact(folder / name, item["sha256"], item["size"]) for name, item in body["files"].items()}
    if not all(item.path.is_file() and item.path.stat().st_size == item.size_bytes for item in artifacts.values()):
        return None
    return CacheEntry(body["key"], body["material"], artifacts, body["metrics"], tuple(body["notes"]), body["seconds"])


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
