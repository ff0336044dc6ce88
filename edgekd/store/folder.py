# SPDX-License-Identifier: Apache-2.0
"""The folder of the cache: where it is, and whether it may be trusted. It is private, and only a folder that edgekd made is changed.

What a cache holds decides what ships, so nobody else may write to it: a folder that another user owns, or could have put there, is
refused. Reasons: docs/decisions/0016-cache-trust-and-reads.md.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from edgekd.errors import StorageError, UsageError, printable
from edgekd.store.digests import write_atomically

VARIABLE = "EDGEKD_CACHE"
PARTS = ("objects", "records", "last", "tmp", "work", "locks")
_TAG = "CACHEDIR.TAG"
_TAG_TEXT = b"Signature: 8a477f597d28d172789f06886806bc55\n# made by edgekd; safe to delete\n"
_SECRET = "secret"  # noqa: S105  (the name of a file)
_SECRET_BYTES = 32
_FILES = (_TAG, _SECRET, "stat.json")
_IGNORED = re.compile(r"\..*|lost\+found|Thumbs\.db|desktop\.ini")  # what file systems and desktops put into any folder
_ADVICE = f"name a folder of your own with --cache or {VARIABLE}"


def cache_folder(requested: Path | None) -> Path:
    """Return the folder of the cache: the requested one, else that of ``EDGEKD_CACHE``, else the default of the user.

    Raises:
        UsageError: if the name cannot be that of a folder.
    """
    text = os.environ.get(VARIABLE) if requested is None else str(requested)
    if text is None or (text == "" and requested is None):
        from platformdirs import user_cache_path

        return user_cache_path("edgekd", appauthor=False)
    path = Path(text).expanduser() if text == "~" or text.startswith("~/") else Path(text)
    if text in {"", "."} or not text.isprintable():
        what = "the current folder" if text in {"", "."} else "a name with control characters"
        raise UsageError(f"cache: {printable(text)!r} is {what}; expected a folder for the cache alone; {_ADVICE}")
    return path.absolute()


def prepare(root: Path) -> None:
    """Create the folders, and narrow their rights to this user.

    Raises:
        StorageError: if they cannot be written, or are not edgekd's, or could be another user's.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    root.mkdir(mode=0o700, exist_ok=True)
    _check_owner(root, root.resolve())
    if not _is_tagged(root):
        names = {path.name for path in root.iterdir()}
        others = sorted(name for name in names - {*PARTS, *_FILES} if not _IGNORED.fullmatch(name))
        if others:
            raise StorageError(
                f"cache: {root}: is not a cache of edgekd: it contains {printable(others[0])!r}; name an empty or a new folder"
            )
    root.chmod(0o700)
    for name in PARTS:
        folder = root / name
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink():
            raise StorageError(f"cache: {folder}: is a symbolic link; expected a folder; remove it")
        _check_owner(folder, folder)
        folder.chmod(0o700)
    if not _is_tagged(root):
        write_atomically(root / _TAG, _TAG_TEXT, mode=0o600)


def _check_owner(shown: Path, folder: Path) -> None:
    owner = folder.stat().st_uid
    if owner != os.geteuid():
        raise StorageError(f"cache: {shown}: belongs to user {owner}, and edgekd runs as user {os.geteuid()}; {_ADVICE}")
    for parent in folder.parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise StorageError(f"cache: {shown}: every user may replace what is in {parent}; {_ADVICE}, or run: chmod o-w {parent}")


def _is_tagged(root: Path) -> bool:
    """Return whether edgekd made a folder: its tag is a file of this user."""
    try:
        descriptor = os.open(root / _TAG, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StorageError(f"cache: {root / _TAG}: is not a file of this user; remove it, or {_ADVICE}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise StorageError(f"cache: {root / _TAG}: is not a file of this user; remove it, or {_ADVICE}")
        return os.read(descriptor, len(_TAG_TEXT)) == _TAG_TEXT
    finally:
        os.close(descriptor)


def read_secret(root: Path) -> bytes:
    """Return the key with which this cache hashes environment values; it is created once."""
    path = root / _SECRET
    for _ in range(2):
        if not path.is_symlink() and path.is_file() and path.stat().st_uid == os.geteuid():
            path.chmod(0o600)
            secret = path.read_bytes()
            if len(secret) == _SECRET_BYTES:
                return secret
        write_atomically(path, os.urandom(_SECRET_BYTES), mode=0o600)
    return path.read_bytes()
