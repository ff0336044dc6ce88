# SPDX-License-Identifier: Apache-2.0
"""Package: the output folder of one target. A model in it has passed, and the manifest beside it says so.

Order of writing: first the stamp and an earlier model are removed; then the reports and the manifest are written, then the
model that they describe, and the stamp last. So, whenever a build is killed, a model is never beside a manifest or a report of
another one, and make never takes a build for current that was killed or failed.

The folder may hold files of others. Removed are only the stamp, the manifest and what a sound manifest names.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from edgekd.errors import StorageError, UsageError, printable
from edgekd.report import document
from edgekd.report.document import MANIFEST, REPORT
from edgekd.store.digests import file_digest, write_atomically
from edgekd.store.documents import as_json, is_sealed, read, seal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from edgekd.domain.artifact import Artifact

STAMP = "edgekd.stamp"
SUMMARY = "report.md"
MAX_DEPTH = 200  # of folders
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
        if len(folder.parts) > MAX_DEPTH:  # a folder in a folder in a folder ...: to create it is a recursion
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))  # noqa: TRY301  (one message for both)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
        free = shutil.disk_usage(folder).free
    except (OSError, ValueError) as error:
        raise UsageError(f"{printable(str(folder), 300)}: cannot be written: {_reason(error)}; name another output with --out") from None
    if free < MIN_FREE_BYTES:
        raise UsageError(
            f"{folder}: has {free // 2**20} MiB free; expected at least {MIN_FREE_BYTES // 2**20} MiB, or another folder with --out"
        )


def check_recipe(folder: Path, recipe: Path, recipe_name: str) -> None:
    """Check that an output folder holds no output of another recipe, and that nothing of others is in the place of an output.

    A recipe that was renamed takes over its folder: the earlier file is gone.

    Raises:
        UsageError: if it does; its output would be replaced.
    """
    names = (REPORT, SUMMARY, MANIFEST, STAMP, *(f"{recipe_name}.{suffix}" for suffix in ("onnx", "tflite")))
    for name in names:
        if os.path.isdir(folder / name):  # noqa: PTH112  (never raises)
            raise UsageError(f"{folder / name}: is a folder, in the place of an output; rename it, or name another output with --out")
    sound = [item for item in (read(folder / REPORT), read(folder / MANIFEST)) if item is not None and is_sealed(item)]
    last = next((item for item in sound if isinstance(item.get("recipe_file"), dict)), None)
    if last is None:
        if not os.path.lexists(folder / REPORT) and not os.path.lexists(folder / MANIFEST):
            _check_no_model(folder, names[4:])
        return
    owner = document.recipe_file(recipe, folder)
    name, place = last["recipe_file"].get("name"), last["recipe_file"].get("folder")
    is_other_file = name != owner["name"] and not (
        place == owner["folder"] and document.is_file_name(name) and not os.path.lexists(recipe.parent / name)
    )
    if is_other_file or (place != owner["folder"] and last.get("recipe") != recipe_name):
        raise UsageError(
            f"{folder}: holds the output of another recipe, {name!r} (recipe {last.get('recipe')!r}); "
            "name another output with --out, or remove that folder"
        )


def _check_no_model(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if os.path.lexists(folder / name):
            raise UsageError(
                f"{folder / name}: is no output of edgekd, and would be replaced; rename it, or name another output with --out"
            )


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of builds that were killed while they wrote; call it with the folder's lock held."""
    names = "|".join(re.escape(name) for name in (REPORT, SUMMARY, MANIFEST, STAMP, *_outputs(folder)))
    with suppress(OSError):
        for path in folder.iterdir():
            if re.fullmatch(rf"\.(?:{names})\.\d+", path.name):
                path.unlink(missing_ok=True)


def ship(folder: Path, model: Path, name: str, manifest: Mapping[str, Any], report: Mapping[str, Any], summary: str) -> None:
    """Write model, manifest, reports and stamp.

    Raises:
        StorageError: if the folder cannot be written; the stamp has been removed then.
    """
    manifest = seal(manifest)
    texts = {REPORT: as_json(report), SUMMARY: summary.encode(), MANIFEST: as_json(manifest)}
    try:
        (folder / STAMP).unlink(missing_ok=True)
        for path in (folder / output for output in _outputs(folder)):
            if path.name != name or _differs(path, model):
                path.unlink(missing_ok=True)
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
        for path in (folder / STAMP, *(folder / output for output in _outputs(folder)), folder / MANIFEST):
            path.unlink(missing_ok=True)
        for file, content in texts.items():
            _write(folder / file, content)
    except OSError as error:
        raise _unwritable(folder, error) from error


def confirm(folder: Path, summary: str) -> None:
    """Update the time of the stamp and restore the summary, for a build with a cached verdict.

    Raises:
        StorageError: if the folder cannot be written.
    """
    try:
        _write(folder / SUMMARY, summary.encode())
        with suppress(FileNotFoundError):
            os.utime(folder / STAMP)
    except OSError as error:
        raise _unwritable(folder, error) from error


def read_previous(folder: Path, warn: Callable[[str], None] | None = None) -> dict[str, Any] | None:
    """Return the last report, or None if there is none that can be trusted: its model must be there, byte for byte.

    ``warn`` is called with the reason why a report is not trusted.
    """
    if not os.path.lexists(folder / REPORT):
        return None
    try:
        report = document.read(folder)
    except UsageError as error:
        problem = str(error).removesuffix("; build again")
    else:
        if (report["shipped"] is not None) == os.path.lexists(folder / STAMP):
            return report
        problem = f"{folder}: the build that wrote it did not finish"
    if warn is not None:
        warn(f"warning: {problem}; this target is judged again")
        if os.path.lexists(folder / MANIFEST) and document.read_manifest(folder) is None:
            warn(f"warning: {folder / MANIFEST}: is damaged or was changed, so a model that it named is not removed")
    return None


def copy_stage(folder: Path, files: Mapping[str, Artifact], recipe: Mapping[str, Any]) -> None:
    """Copy the files of a stage, by their paths in the folder, with a manifest; remove those that an earlier manifest names.

    Raises:
        StorageError: if the folder cannot be written.
    """
    outputs = {name: {"sha256": artifact.digest, "bytes": artifact.size_bytes} for name, artifact in files.items()}
    last = document.read_manifest(folder) or {"outputs": {}}
    stale = [name for name in last["outputs"] if name not in files and all(map(document.is_file_name, name.split("/")))]
    try:
        for name in stale:
            (folder / name).unlink(missing_ok=True)
        _write(folder / MANIFEST, as_json(seal({"schema": 1, **recipe, "outputs": outputs})))
        for name, artifact in files.items():
            copy(artifact.path, folder / name)
    except OSError as error:
        raise _unwritable(folder, error) from error


def depfile_text(targets: Sequence[Path], prerequisites: Iterable[Path]) -> bytes:
    """Return make rules as ``gcc -MD -MP`` writes them: the stamps depend on the files that the build read; a missing one is no error.

    Raises:
        UsageError: if a name cannot be written in a makefile.
    """
    names = list(dict.fromkeys(map(_path_for_make, prerequisites)))
    rule = f"{' '.join(_escape_target(_path_for_make(path)) for path in targets)}: {' '.join(map(_escape, names))}\n"
    text = rule + "".join(f"\n{_escape_target(name)}:\n" for name in names)
    if EQUALS in text:
        text = f"{EQUALS} := =\n{text}"
    return os.fsencode(text)


def write_depfile(path: Path, targets: Sequence[Path], prerequisites: Iterable[Path]) -> None:
    """Write the rules of ``depfile_text`` to a file.

    Raises:
        UsageError: if a name cannot be written in a makefile.
        StorageError: if the file cannot be written.
    """
    text = depfile_text(targets, prerequisites)
    try:
        _write(path, text)
    except OSError as error:
        raise _unwritable(path, error) from error


def copy(source: Path, path: Path) -> None:
    """Copy a file, unless the destination has the same bytes already."""
    if _differs(path, source):
        write_atomically(path, source.read_bytes())


def _outputs(folder: Path) -> list[str]:
    """Return the names of the files that the manifest in a folder names; none if it is missing, damaged or changed."""
    manifest = document.read_manifest(folder) or {"outputs": {}}
    return sorted(filter(document.is_file_name, manifest["outputs"]))


def _differs(path: Path, other: Path) -> bool:
    try:
        return not path.is_file() or file_digest(path) != file_digest(other)
    except PermissionError:  # a file that cannot be read is replaced
        return True


def _write(path: Path, content: bytes) -> None:
    with suppress(PermissionError):
        if path.is_file() and path.read_bytes() == content:
            return
    write_atomically(path, content)


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
    return StorageError(f"{where}: cannot be written: {_reason(error)}; free space or name another output with --out")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
