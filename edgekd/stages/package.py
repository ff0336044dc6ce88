# SPDX-License-Identifier: Apache-2.0
"""Package: the output folder of one target. A model in it has passed, and the manifest beside it says so.

Order of writing: first the stamp and an earlier model are removed; then the reports and the manifest are written, then the
model that they describe, and the stamp last. So, whenever a build is killed, a model is never beside a manifest or a report of
another one, and make never takes a build for current that was killed or failed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from edgekd.errors import StorageError, UsageError
from edgekd.store.digests import file_digest, write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

STAMP = "edgekd.stamp"
MANIFEST = "manifest.json"
REPORT = "report.json"
SUMMARY = "report.md"
MIN_FREE_BYTES = 16 * 2**20
EQUALS = "edgekd.equals"  # a make variable: with a literal "=" in a name, its rule would be an assignment
# what make cannot read in a name, even escaped (checked with GNU make 4.3): separators, archive members, grouped targets
UNESCAPABLE = re.compile(r"[\x00-\x1f\x7f;|\\]|\(.*\)$|&$")


def check_writable(folder: Path) -> None:
    """Create a folder and write to it, before any long stage.

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
        StorageError: if the folder cannot be written; the stamp has been removed then.
    """
    texts = {REPORT: as_json(report), SUMMARY: summary.encode(), MANIFEST: as_json(manifest)}
    try:
        (folder / STAMP).unlink(missing_ok=True)
        for path in _models(folder):
            if path.name != name or _differs(path, model):
                path.unlink()
        for file, content in texts.items():
            _write(folder / file, content)
        copy(model, folder / name)
        write_atomically(folder / STAMP, f"{manifest['outputs'][name]['sha256']}\n".encode())
    except OSError as error:
        raise _unwritable(folder, error) from error


def withhold(folder: Path, report: Mapping[str, Any], summary: str) -> None:
    """Write reports only; remove what an earlier build shipped, the stamp first.

    Raises:
        StorageError: if the folder cannot be written.
    """
    texts = {REPORT: as_json(report), SUMMARY: summary.encode()}
    try:
        for path in (folder / STAMP, *_models(folder), folder / MANIFEST):
            path.unlink(missing_ok=True)
        for file, content in texts.items():
            _write(folder / file, content)
    except OSError as error:
        raise _unwritable(folder, error) from error


def touch(folder: Path) -> None:
    """Update the time of the stamp, for a build with a cached verdict."""
    with suppress(FileNotFoundError):
        os.utime(folder / STAMP)


def read_previous(folder: Path) -> dict[str, Any] | None:
    """Return the last report, or None if there is none that can be trusted: its model must be there, byte for byte."""
    report, manifest = _read_mapping(folder / REPORT), _read_mapping(folder / MANIFEST)
    if report is None or (report.get("shipped") is not None) != (manifest is not None) or not (folder / SUMMARY).is_file():
        return None
    if manifest is None:
        return None if _models(folder) or (folder / STAMP).exists() else report
    try:
        model, sha256 = folder / report["shipped"], manifest["outputs"][report["shipped"]]["sha256"]
    except (KeyError, TypeError):
        return None
    is_intact = _models(folder) == [model] and (folder / STAMP).is_file() and file_digest(model) == sha256
    return report if is_intact else None


def write_depfile(path: Path, targets: Sequence[Path], prerequisites: Iterable[Path]) -> None:
    """Write make rules as ``gcc -MD -MP`` does: the stamps depend on the files that the build read, and a missing file is not an error.

    Raises:
        UsageError: if a name cannot be written in a makefile.
    """
    names = list(dict.fromkeys(map(_path_for_make, prerequisites)))
    rule = f"{' '.join(_escape_target(_path_for_make(path)) for path in targets)}: {' '.join(map(_escape, names))}\n"
    text = rule + "".join(f"\n{_escape_target(name)}:\n" for name in names)
    if EQUALS in text:
        text = f"{EQUALS} := =\n{text}"
    try:
        _write(path, os.fsencode(text))
    except OSError as error:
        raise _unwritable(path, error) from error


def copy(source: Path, path: Path) -> None:
    """Copy a file, unless the destination has the same bytes already."""
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


def _read_mapping(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _path_for_make(path: Path) -> str:
    """Return a path for make: relative if it is below the working directory (and does not look like a user's home)."""
    absolute = os.path.normpath(path.absolute())
    relative = os.path.relpath(absolute)
    return absolute if relative.startswith((os.pardir, "~")) else relative


def _escape(name: str) -> str:
    """Return a name as it must be written among the prerequisites of a rule."""
    match = UNESCAPABLE.search(name)
    if match is not None:
        what = "a line break" if match[0] in {"\n", "\r"} else repr(match[0])
        raise UsageError(f"{name!r}: a file name with {what} cannot be written in a depfile; rename it, or build without --depfile")
    return re.sub(r"[ #:*?\[\]]", r"\\\g<0>", name.replace("$", "$$").replace("=", f"$({EQUALS})"))


def _escape_target(name: str) -> str:
    """Return a name as it must be written before a colon, where ``%`` would make the rule a pattern."""
    return _escape(name).replace("%", "\\%")


def _unwritable(where: Path, error: OSError) -> StorageError:
    return StorageError(f"{where}: cannot be written: {error.strerror or error}; free space or name another output with --out")
