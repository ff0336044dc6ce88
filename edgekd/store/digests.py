# SPDX-License-Identifier: Apache-2.0
"""Digests of values, files, folders and the environment, which keys and records consist of; and atomic writes."""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
import os
import re
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

DIST_INFO = ".dist-info"


def canonical_json(value: object) -> bytes:
    """Return a value as JSON with sorted keys and without spaces; NaN is refused.

    >>> canonical_json({"b": 1, "a": [1.0, None]})
    b'{"a":[1.0,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(value: object) -> str:
    """Return the SHA-256 of a value's canonical JSON, in hex."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changes(
    record: Mapping[str, Any], recipe_dir: Path, digest_of: Callable[[Path], str] = file_digest, secret: bytes = b""
) -> Iterator[str]:
    """Yield a description of each difference between a record and the present state. ``secret``: the key of the environment's hashes."""
    for name, old in record.get("files", {}).items():
        try:
            new = digest_of(recipe_dir / name) if (recipe_dir / name).is_file() else None
        except OSError:  # it cannot be read, or has gone just now
            new = None
        if new != old:
            yield f"{name} {'changed' if new and old else 'appeared' if new else 'is gone'}"
    for name, old in record.get("listings", {}).items():
        if listing_digest(recipe_dir / name) != old:
            yield f"the files in {name} changed"
    for name, old in record.get("env", {}).items():
        if env_digest(os.environ.get(name), secret) != old:
            yield f"the environment variable {name} changed"
    for name, old in record.get("modules", {}).items():
        if (version := tool_version(name)) != old:
            yield f"{name} {old} -> {version}"


def first_change(
    record: Mapping[str, Any], recipe_dir: Path, digest_of: Callable[[Path], str] = file_digest, secret: bytes = b""
) -> str | None:
    """Return the first difference between a record and the present state, or None if there is none."""
    return next(changes(record, recipe_dir, digest_of, secret), None)


def listing_digest(folder: Path) -> str | None:
    """Return the SHA-256 of a folder's sorted names, or None if there is no such folder."""
    try:
        return digest(sorted(path.name for path in folder.iterdir()))
    except OSError:
        return None


def env_digest(value: str | None, secret: bytes) -> str | None:
    """Return the HMAC-SHA-256 of an environment variable's value, or None if it is not set.

    The key is the cache's, so that a digest does not give a short value away to somebody who tries all.
    """
    return None if value is None else hmac.digest(secret, os.fsencode(value), "sha256").hex()


@functools.cache
def tool_version(distribution: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    version = _wheel_versions().get(_normalize(distribution))
    if version is not None:
        return version
    from importlib import metadata  # 10 ms: for what was not installed from a wheel

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def _wheel_versions() -> Mapping[str, str]:
    """Return the versions of the distributions on ``sys.path``, by their normalized names; of equal names, the first is imported.

    Source:
        Python Packaging User Guide, "Recording installed projects": the folder is ``{name}-{version}.dist-info``.
    """
    versions: dict[str, str] = {}
    for folder in sys.path:
        with suppress(OSError):
            for name in sorted(os.listdir(folder or ".")):  # noqa: PTH208  (pathlib makes an object of each of hundreds of names)
                if name.endswith(DIST_INFO):
                    distribution, _, version = name.removesuffix(DIST_INFO).partition("-")
                    versions.setdefault(_normalize(distribution), version)
    return versions


def _normalize(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def write_atomically(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Replace a file: write a temporary file beside it, flush it, rename it. The umask narrows ``mode``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with suppress(FileNotFoundError):
            temporary.unlink()  # of a killed process of the same number
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        flush(temporary)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def flush(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
