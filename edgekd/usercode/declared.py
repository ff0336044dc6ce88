# SPDX-License-Identifier: Apache-2.0
"""Files that a recipe declares in ``data.reads``: what compiled code or another process reads is not seen by the watcher."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.errors import RecipeError, printable
from edgekd.ports import Record
from edgekd.store.digests import file_digest, listing_digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

NATIVE_READERS = frozenset(  # modules whose compiled code opens files by itself
    [
        *("av", "cffi", "ctypes", "cv2", "decord", "duckdb", "fastparquet", "ffcv", "h5py", "lance", "laspy", "librosa", "lmdb"),
        *("mdtraj", "netCDF4", "nvidia", "openslide", "osgeo", "pyarrow", "pyogrio", "pyvips", "rasterio", "SimpleITK"),
        *("soundfile", "sox", "tables", "tensorflow", "tiledb", "torchaudio", "torchcodec"),
    ]
)
UNSEEN_EVENTS = {  # audit events of other means to read
    **dict.fromkeys(("subprocess.Popen", "os.system", "os.posix_spawn", "os.fork", "os.forkpty"), "another process"),
    "socket.connect": "the network",
}


def declared_reads(recipe_dir: Path, patterns: Sequence[str]) -> Record:
    """Return the digests of files, of folders with all that is in them, and of what glob patterns match.

    Raises:
        RecipeError: for a pattern without a file, or a file that cannot be read.
    """
    files: set[Path] = set()
    folders: set[Path] = set()
    for pattern in patterns:
        matches = [recipe_dir / name for name in _matches(recipe_dir, pattern)]
        inside = [path for match in matches if match.is_dir() for path in match.rglob("*")]
        matched_files = [path for path in (*matches, *inside) if path.is_file()]
        if not matched_files:
            raise RecipeError(
                f"data.reads: {printable(pattern)!r} matches no file; expected files, folders or globs relative to the recipe's folder"
            )
        files.update(matched_files)
        folders.update(path for path in (*matches, *inside) if path.is_dir())
        if glob.has_magic(pattern):  # a file that appears there may match too
            folders.update(path.parent for path in matched_files)
    try:
        digests = {_name(recipe_dir, path): file_digest(path) for path in sorted(files)}
    except OSError as error:
        raise RecipeError(f"data.reads: {error.filename} cannot be read: {error.strerror}") from error
    return Record(files=digests, listings={_name(recipe_dir, path): listing_digest(path) for path in sorted(folders)})


def check_unchanged(before: Record, recipe_dir: Path, patterns: Sequence[str]) -> None:
    """Compare declared files with what they were before the user's code ran.

    Raises:
        RecipeError: if one has changed meanwhile.
    """
    after = declared_reads(recipe_dir, patterns)
    changed = sorted({name for name, digest in {*before.files.items()} ^ {*after.files.items()}})
    if changed:
        raise RecipeError(f"data.reads: {printable(changed[0])} changed while it was read; build again")


def _matches(recipe_dir: Path, pattern: str) -> Iterable[str]:
    try:
        return glob.glob(pattern, root_dir=recipe_dir, recursive=True, include_hidden=True)  # noqa: PTH207  (also absolute patterns)
    except (OSError, ValueError):  # a name that no file can have
        return ()


def _name(recipe_dir: Path, path: Path) -> str:
    absolute = Path(os.path.normpath(path))
    return str(absolute.relative_to(recipe_dir)) if absolute.is_relative_to(recipe_dir) else str(absolute)
