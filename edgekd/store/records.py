# SPDX-License-Identifier: Apache-2.0
"""The JSON files of a cache. Whatever is damaged, foreign or of another version is absent: None, never an error."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from edgekd.domain.artifact import Artifact, CacheEntry
from edgekd.store.digests import digest
from edgekd.store.documents import read_file

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FINGERPRINT = 4  # size, time of change, time of change of the inode, inode


def read_json(path: Path) -> object:
    """Return the content of a JSON file; None if it is no regular file or not valid."""
    try:
        content: object = json.loads(read_file(path))
    except (OSError, ValueError, RecursionError):
        return None
    return content


def read_entry(folder: Path) -> CacheEntry | None:
    """Return the entry in a folder, if it is complete by names and sizes."""
    body = read_json(folder / "entry.json")
    try:
        if not isinstance(body, dict) or body.pop("self", None) != digest(body) or not _is_entry(body) or body["key"] != folder.name:
            return None
        artifacts = {name: Artifact(folder / name, item["sha256"], item["size"]) for name, item in body["files"].items()}
        if not all(item.path.is_file() and item.path.stat().st_size == item.size_bytes for item in artifacts.values()):
            return None
    except (OSError, ValueError, RecursionError):
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
    records = read_json(path)
    return [record for record in records if _is_record(record)] if isinstance(records, list) else []


def _is_record(record: object) -> bool:
    parts = ("files", "listings", "env", "modules")
    return isinstance(record, dict) and record.keys() == set(parts) and all(_is_part(record[name]) for name in parts)


def _is_part(part: object) -> bool:
    return isinstance(part, dict) and all("\0" not in name and (value is None or isinstance(value, str)) for name, value in part.items())


def read_stats(path: Path) -> dict[str, list[Any]]:
    """Return digests of files by path: size, times, inode and SHA-256."""
    stats = read_json(path)
    return {name: row for name, row in stats.items() if _is_stat(row)} if isinstance(stats, dict) else {}


def _is_stat(row: object) -> bool:
    return (
        isinstance(row, list)
        and len(row) == _FINGERPRINT + 1
        and all(isinstance(number, int) for number in row[:_FINGERPRINT])
        and is_key(row[_FINGERPRINT])
    )
