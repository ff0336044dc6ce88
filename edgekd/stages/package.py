# SPDX-License-Identifier: Apache-2.0
"""Package: the output folder of one target. A model that lies there has passed, and the manifest beside it says so.

Order of writing: the stamp goes first, then model and manifest, then the reports; the stamp comes back last. So make never
takes a build for current that was killed or failed.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from edgekd.digests import file_digest, write_atomically
from edgekd.errors import StorageError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

STAMP = "edgekd.stamp"
MANIFEST = "manifest.json"
REPORT = "report.json"
SUMMARY = "report.md"
MIN_FREE_BYTES = 16 * 2**20


def check_writable(folder: Path) -> None:
    """Create a folder and try it, before any long stage.

    Raises:
        UsageError: if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".edgekd-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written: {error.strerror}; name another output with --out") from None
    if free < MIN_FREE_BYTES:
        raise UsageError(
            f"{folder}: has {free // 2**20} MiB free; expected at least {MIN_FREE_BYTES // 2**20} MiB, or another folder with --out"
        )


def ship(folder: Path, model: Path, name: str, manifest: Mapping[str, Any], report: Mapping[str, Any], summary: str) -> None:
    """Write model, manifest, reports and stamp.

    Raises:
        StorageError: if the folder cannot be written; the stamp is gone then.
    """
    try:
        (folder / STAMP).unlink(missing_ok=True) if _differs(folder / name, model) else None
        for other in _models(folder):
            if other.name != name:
                other.unlink()
        if _differs(folder / name, model):
            (folder / MANIFEST).unlink(missing_ok=True)
            write_atomically(folder / name, model.read_bytes())
        _write(folder / MANIFEST, as_json(manifest))
        _write(folder / REPORT, as_json(report))
        _write(folder / SUMMARY, summary.encode())
        _write(folder / STAMP, f"{manifest['outputs'][name]['sha256']}\n".encode())
        os.utime(folder / STAMP)
    except OSError as error:
        raise _unwritable(folder, error) from error


def withhold(folder: Path, report: Mapping[str, Any], summary: str) -> None:
    """Write reports only; what an earlier build shipped is taken away, the stamp first.

    Raises:
        StorageError: if the folder cannot be written.
    """
    try:
        for path in (folder / STAMP, folder / MANIFEST, *_models(folder)):
            path.unlink(missing_ok=True)
        _write(folder / REPORT, as_json(report))
        _write(folder / SUMMARY, summary.encode())
    except OSError as error:
        raise _unwritable(folder, error) from error


def touch(folder: Path) -> None:
    """Move the stamp of a build whose last verdict stands."""
    with suppress(FileNotFoundError):
        os.utime(folder / STAMP)


def read_previous(folder: Path) -> dict[str, Any] | None:
    """Return the last report, or None if there is none that can be believed: its model must be there, byte for byte."""
    report, manifest = _read(folder / REPORT), _read(folder / MANIFEST)
    if report is None or (report.get("shipped") is not None) != (manifest is not None) or not (folder / SUMMARY).is_file():
        return None
    if manifest is None:
        return None if _models(folder) or (folder / STAMP).exists() else report
    for name, known in manifest.get("outputs", {}).items():
        path = folder / name
        if not path.is_file() or file_digest(path) != known.get("sha256"):
            return None
    return report if (folder / STAMP).is_file() else None


def write_depfile(path: Path, targets: Sequence[Path], prerequisites: Iterable[Path]) -> None:
    """Write make rules as ``gcc -MD -MP`` does: the stamps depend on what was read, and a file that is gone is no error.

    Raises:
        UsageError: if a name cannot stand in a makefile.
    """
    names = [_escape(_near(item)) for item in dict.fromkeys(prerequisites)]
    rule = f"{' '.join(_escape(_near(item)) for item in targets)}: {' '.join(names)}\n"
    content = (rule + "".join(f"\n{name}:\n" for name in names)).encode()
    try:
        _write(path, content)
    except OSError as error:
        raise _unwritable(path, error) from error


def copy(source: Path, path: Path) -> None:
    """Copy a file, unless it is there already byte for byte."""
    if _differs(path, source):
        write_atomically(path, source.read_bytes())


def as_json(value: object) -> bytes:
    """Return readable JSON."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _models(folder: Path) -> list[Path]:
    return sorted(path for suffix in ("onnx", "tflite") for path in folder.glob(f"*.{suffix}"))


def _differs(path: Path, other: Path) -> bool:
    return not path.is_file() or file_digest(path) != file_digest(other)


def _write(path: Path, content: bytes) -> None:
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, content)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _near(path: Path) -> str:
    """Return a path as make will see it: relative to where the build runs, if it lies below."""
    whole = os.path.normpath(path.absolute())
    near = os.path.relpath(whole)
    return whole if near.startswith(os.pardir) else near


def _escape(name: str) -> str:
    if "\n" in name or "\r" in name:
        raise UsageError(f"{name!r}: a file name with a line break cannot stand in a depfile; rename it")
    return name.replace(" ", "\\ ").replace("#", "\\#").replace("$", "$$").replace(":", "\\:")


def _unwritable(where: Path, error: OSError) -> StorageError:
    return StorageError(f"{where}: cannot be written: {error.strerror or error}; free space or name another output with --out")
