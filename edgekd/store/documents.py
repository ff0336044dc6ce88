# SPDX-License-Identifier: Apache-2.0
"""JSON documents in folders of the user: read without trust, and sealed with a digest of their own content.

A seal shows that a file was damaged or edited, as a checksum does. It is no signature: who edits a file on purpose can seal it again.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from edgekd.store.digests import digest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

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


def parse(content: bytes) -> dict[str, Any] | None:
    """Return the mapping of a JSON document, or None if it is anything else."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read(path: Path) -> dict[str, Any] | None:
    """Return the mapping of a JSON file, or None if there is none."""
    with suppress(OSError):
        return parse(read_file(path))
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
