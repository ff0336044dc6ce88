# SPDX-License-Identifier: Apache-2.0
"""Package: the output folder of one target. A model that lies there has passed, and the manifest beside it says so.

Order of writing: the stamp goes first, then an earlier model; then come reports and manifest, then the model that they are
about, and the stamp last. So, wherever a build is killed, a model never lies beside a manifest or a report of another, and make
never takes a build for current that was killed or failed.
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
EQUALS = "edgekd.equals"  # a make variable: written plainly, a name with "=" would make its rule an assignment
# what make cannot read in a name, however it is escaped (tried with GNU make 4.3): separators, archive members, grouped targets
NO_NAME = re.compile(r"[\x00-\x1f\x7f;|\\]|\(.*\)$|&$")


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
    told = {REPORT: as_json(report), SUMMARY: summary.encode(), MANIFEST: as_json(manifest)}
    try:
        (folder / STAMP).unlink(missing_ok=True)
        for path in _models(folder):
            if path.name != name or _differs(path, model):
                path.unlink()
        for file, content in told.items():
            _write(folder / file, content)
        copy(model, folder / name)
        write_atomically(folder / STAMP, f"{manifest['outputs'][name]['sha256']}\n".encode())
    except OSError as error:
        raise _unwritable(folder, error) from error


def withhold(folder: Path, report: Mapping[str, Any], summary: str) -> None:
    """Write reports only; what an earlier build shipped is taken away, the stamp first.

    Raises:
        StorageError: if the folder cannot be written.
    """
    told = {REPORT: as_json(report), SUMMARY: summary.encode()}
    try:
        for path in (folder / STAMP, *_models(folder), folder / MANIFEST):
            path.unlink(missing_ok=True)
        for file, content in told.items():
            _write(folder / file, content)
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
    try:
        model, known = folder / report["shipped"], manifest["outputs"][report["shipped"]]["sha256"]
    except (KeyError, TypeError):
        return None
    whole = _models(folder) == [model] and (folder / STAMP).is_file() and file_digest(model) == known
    return report if whole else None


def write_depfile(path: Path, targets: Sequence[Path], prerequisites: Iterable[Path]) -> None:
    """Write make rules as ``gcc -MD -MP`` does: the stamps depend on what was read, and a file that is gone is no error.

    Raises:
        UsageError: if a name cannot stand in a makefile.
    """
    names = list(dict.fromkeys(_near(item) for item in prerequisites))
    rule = f"{' '.join(_as_target(_near(item)) for item in targets)}: {' '.join(map(_escape, names))}\n"
    text = rule + "".join(f"\n{_as_target(name)}:\n" for name in names)
    if EQUALS in text:
        text = f"{EQUALS} := =\n{text}"
    try:
        _write(path, os.fsencode(text))
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
    """Return a path as make will see it: relative to where the build runs, if it lies below (and is not like a user's home)."""
    whole = os.path.normpath(path.absolute())
    near = os.path.relpath(whole)
    return whole if near.startswith((os.pardir, "~")) else near


def _escape(name: str) -> str:
    """Return a name as make reads it among the prerequisites of a rule."""
    found = NO_NAME.search(name)
    if found is not None:
        what = "a line break" if found[0] in {"\n", "\r"} else repr(found[0])
        raise UsageError(f"{name!r}: a file name with {what} cannot stand in a depfile; rename it, or build without --depfile")
    return re.sub(r"[ #:*?\[\]]", r"\\\g<0>", name.replace("$", "$$").replace("=", f"$({EQUALS})"))


def _as_target(name: str) -> str:
    """Return a name as make reads it before a colon, where ``%`` would make the rule a pattern."""
    return _escape(name).replace("%", "\\%")


def _unwritable(where: Path, error: OSError) -> StorageError:
    return StorageError(f"{where}: cannot be written: {error.strerror or error}; free space or name another output with --out")
