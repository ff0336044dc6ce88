# SPDX-License-Identifier: Apache-2.0
"""JSON documents of the cache and in folders of the user: read without trust, and sealed with a digest of their own content.

A seal shows that a file was damaged or edited, as a checksum does. It is no signature: who edits a file on purpose can seal it again.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from edgekd.domain.artifact import Artifact, CacheEntry
from edgekd.store.digests import digest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SCHEMA = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FINGERPRINT = 4  # size, time of change, time of change of the inode, inode
SEAL = "self"
MAX_BYTES = 64 * 2**20


def read_file(path: Path) -> bytes:
    """Return the bytes of a regular file; never waits for a pipe.

    Raises:
        OSError: if it cannot be read, is not a regular file, or has more than ``MAX_BYTES``.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "Not a regular file")
        if status.st_size > MAX_BYTES:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        with os.fdopen(os.dup(descriptor), "rb") as file:
            return file.read()
    finally:
        os.close(descriptor)


def parse(content: bytes) -> Any:
    """Return the value of a JSON document; None if it is not valid."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def parse_mapping(content: bytes) -> dict[str, Any] | None:
    """Return the mapping of a JSON document, or None if it is anything else."""
    value = parse(content)
    return value if isinstance(value, dict) else None


def read(path: Path) -> dict[str, Any] | None:
    """Return the mapping of a JSON file, or None if there is none."""
    with suppress(OSError):
        return parse_mapping(read_file(path))
    return None


def seal(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document with the digest of all its other content."""
    content = {key: value for key, value in body.items() if key != SEAL}
    return {**content, SEAL: digest(content)}


def is_sealed(document: Mapping[str, Any]) -> bool:
    """Return whether a document is as it was when it was sealed."""
    try:
        return seal(document) == document
    except (ValueError, RecursionError):  # NaN, or nested too deeply
        return False


def as_json(value: object) -> bytes:
    """Return readable JSON."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def read_entry(folder: Path) -> CacheEntry | None:
    """Return the entry in a folder, if it is complete by names and sizes."""
    body = read(folder / "entry.json")
    if body is None or not is_sealed(body) or not _is_entry(body) or body.get("key") != folder.name:
        return None
    try:
        artifacts = {name: Artifact(folder / name, item["sha256"], item["size"]) for name, item in body["files"].items()}
        if not all(item.path.is_file() and item.path.stat().st_size == item.size_bytes for item in artifacts.values()):
            return None
    except (OSError, ValueError):
        return None
    return CacheEntry(body["key"], body["material"], artifacts, body["metrics"], tuple(body["notes"]), float(body["seconds"]))


def is_key(name: object) -> bool:
    """Return whether a name is that of an entry."""
    return isinstance(name, str) and _SHA256.fullmatch(name) is not None


def _is_entry(body: dict[str, Any]) -> bool:
    files, material, notes = body.get("files"), body.get("material"), body.get("notes")
    return (
        body.get("schema") == SCHEMA
        and isinstance(files, dict)
        and all(map(_is_file_row, files.items()))
        and isinstance(material, dict)
        and isinstance(material.get("stage"), str)
        and isinstance(body.get("metrics"), dict)
        and isinstance(notes, list)
        and all(isinstance(note, str) for note in notes)
        and _is_number(body.get("seconds"))
    )


def _is_file_row(row: tuple[str, object]) -> bool:
    name, item = row
    is_name = bool(name) and name not in {".", ".."} and "/" not in name and "\0" not in name
    return is_name and isinstance(item, dict) and is_key(item.get("sha256")) and isinstance(item.get("size"), int)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the valid records (``ports.Record``) in a file."""
    with suppress(OSError):
        records = parse(read_file(path))
        return [record for record in records if _is_record(record)] if isinstance(records, list) else []
    return []


def _is_record(record: object) -> bool:
    parts = ("files", "listings", "env", "modules")
    return isinstance(record, dict) and record.keys() == set(parts) and all(_is_part(record[name]) for name in parts)


def _is_part(part: object) -> bool:
    return isinstance(part, dict) and all("\0" not in name and (value is None or isinstance(value, str)) for name, value in part.items())


def read_stats(path: Path) -> dict[str, list[Any]]:
    """Return digests of files by path: size, times, inode and SHA-256."""
    return {name: row for name, row in (read(path) or {}).items() if _is_stat(row)}


def _is_stat(row: object) -> bool:
    return (
        isinstance(row, list)
        and len(row) == _FINGERPRINT + 1
        and all(isinstance(number, int) for number in row[:_FINGERPRINT])
        and is_key(row[_FINGERPRINT])
    )
