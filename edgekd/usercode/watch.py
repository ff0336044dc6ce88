# SPDX-License-Identifier: Apache-2.0
"""What the user's code reads, seen while it runs: files, folders, environment variables, installed packages.

An audit hook of the interpreter sees every file that Python opens or imports, every folder that it lists, and SQLite data
bases; files that are mapped into memory are seen at the end of a phase. What is not seen: files that compiled code reads
on its own and does not keep mapped (h5py, libsndfile, safetensors), and what other processes read that the user's code
starts. Files that the code wrote itself before it read them are its own business and are not recorded.
"""

from __future__ import annotations

import ast
import functools
import importlib
import os
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import usercode
from edgekd.errors import RecipeError
from edgekd.ports import Record
from edgekd.store.digests import file_digest, listing_digest, tool_version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SYSTEM = ("/proc/", "/sys/", "/dev/")
_TOOLS = {"edgekd", "numpy", "torch"}  # their versions are in the keys of the steps
_HANDLERS = {  # audit event -> the watcher's method
    "open": "_opened",
    "os.listdir": "_listed",
    "os.scandir": "_listed",
    "sqlite3.connect": "_connected",
    "import": "_imported",
    "os.rename": "_wrote",
    "os.mkdir": "_made_folder",
}
_Mark = tuple[int, int, int]  # size, time and inode of a file


@dataclass(slots=True)
class Seen:
    """What was read in one phase, by absolute path; a file that was looked for and absent has no mark."""

    files: dict[str, _Mark | None] = field(default_factory=dict)
    listings: set[str] = field(default_factory=set)
    imports: set[str] = field(default_factory=set)
    env: set[str] = field(default_factory=set)


class Watcher:
    """Sees what is read while a phase runs. Its hook cannot be taken back: one watcher a process, in a process of its own.

    Args:
        recipe_dir: The folder from which the user's files are named.
        own: Folders that edgekd writes; what is read there is not the user's.
    """

    def __init__(self, recipe_dir: Path, own: tuple[Path, ...]) -> None:
        self.recipe_dir = recipe_dir
        self._not_theirs = (*_SYSTEM, *(f"{path}{os.sep}" for path in own))
        self._seen: Seen | None = None
        self._written: set[str] = set()
        self._made: set[str] = set()
        self._environ = dict(os.environ)  # as the parent has it: what the code sets itself is not read from outside
        self._stat = os.stat
        self._mapped = _mapped_files()
        _asked_by_user()  # what it looks up is known from now on: the hook itself must not import
        sys.addaudithook(self._hook)
        _intercept(os._Environ, "__getitem__", lambda arguments: self._read_variable(arguments[1]))  # noqa: SLF001  (audit events have none)
        _intercept(os, "stat", lambda arguments: self._looked_for(arguments[0]))

    @contextmanager
    def phase(self) -> Iterator[Seen]:
        """Watch a phase; the user's modules are imported anew in it, so that what it sees is complete."""
        usercode.forget_modules()
        seen = self._seen = Seen()
        try:
            yield seen
        finally:
            self._seen = None
        modules = [getattr(module, "__file__", None) for module in list(sys.modules.values()) if usercode.is_user_module(module)]
        missed = [str(self.recipe_dir / f"{name}.py") for name in seen.imports if name not in sys.modules]  # may come to be
        for path in {*filter(None, modules), *missed, *(_mapped_files() - self._mapped)}:
            self.note(seen, path)

    def note(self, seen: Seen, path: str) -> None:
        """Note that a file is read, or looked for and absent."""
        with suppress(OSError, ValueError):
            if self._is_theirs(path) and path not in seen.files and not self._is_own_work(path):
                seen.files[path] = self._mark(path)

    def record(self, seen: Seen) -> Record:
        """Return the digests of what was seen.

        Raises:
            RecipeError: if a file was changed by someone else since it was read.
        """
        return Record(
            files={self._name(path): self._digest(path, mark) for path, mark in sorted(seen.files.items())},
            listings={self._name(path): listing_digest(Path(path)) for path in sorted(seen.listings) if path not in self._made},
            env={name: _value_digest(self._environ.get(name)) for name in sorted(seen.env)},
            modules=_distributions([path for path, mark in seen.files.items() if mark and path.endswith(".py")], self.recipe_dir),
        )

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        name = _HANDLERS.get(event)
        seen = self._seen
        if name is None or seen is None:
            return
        with suppress(OSError, ValueError, TypeError):  # a path that cannot be a file: the call itself will say so
            getattr(self, name)(seen, arguments)

    def _opened(self, seen: Seen, arguments: tuple[Any, ...]) -> None:
        path, _, flags = arguments
        if isinstance(path, int):
            return
        path = _absolute(path)
        if flags & os.O_ACCMODE != os.O_WRONLY and not flags & (os.O_CREAT | os.O_TRUNC) and not path.endswith(".pyc"):
            self.note(seen, path)
        if flags & os.O_ACCMODE != os.O_RDONLY:
            self._written.add(path)

    def _listed(self, seen: Seen, arguments: tuple[Any, ...]) -> None:
        caller = sys._getframe(2).f_code.co_filename  # noqa: SLF001  (the only way to see who asks)
        if caller.startswith(("<frozen importlib", str(Path(importlib.__file__).parent))):  # the import system looks around
            return
        place = arguments[0]
        path = str(Path(f"/proc/self/fd/{place}").readlink()) if isinstance(place, int) else _absolute(place or ".")
        if self._is_theirs(path) and not self._is_own_work(path):
            seen.listings.add(path)

    def _connected(self, seen: Seen, arguments: tuple[Any, ...]) -> None:
        name = os.fsdecode(arguments[0]).removeprefix("file:").partition("?")[0]
        if name and name != ":memory:":
            path = _absolute(name)
            self.note(seen, path)
            if seen.files.get(path) is None:  # SQLite makes it
                self._written.add(path)

    def _imported(self, seen: Seen, arguments: tuple[Any, ...]) -> None:
        if "." not in arguments[0] and _asked_by_user():
            seen.imports.add(arguments[0])

    def _read_variable(self, name: object) -> None:
        if self._seen is not None and isinstance(name, str) and _asked_by_user():
            self._seen.env.add(name)

    def _looked_for(self, place: object) -> None:
        """Note a file or folder that the user's code asked for (``exists``, ``is_file``) and that is absent."""
        seen = self._seen
        if seen is None or isinstance(place, int) or not isinstance(place, str | bytes | os.PathLike) or not _asked_by_user():
            return
        path = _absolute(place)
        if self._is_theirs(path) and path not in seen.files and not self._is_own_work(path):
            try:
                self._stat(path)
            except (OSError, ValueError):
                seen.files[path] = None
                seen.listings.add(path)

    def _wrote(self, _: Seen, arguments: tuple[Any, ...]) -> None:
        self._written.add(_absolute(arguments[1]))

    def _made_folder(self, _: Seen, arguments: tuple[Any, ...]) -> None:
        self._made.add(_absolute(arguments[0]))

    def _is_theirs(self, path: str) -> bool:
        return usercode.is_user_file(path) and not f"{path}{os.sep}".startswith(self._not_theirs)

    def _is_own_work(self, path: str) -> bool:
        """Return whether this process wrote the file, or made the folder that it lies in."""
        return path in self._written or path in self._made or bool(self._made and self._made & {str(up) for up in Path(path).parents})

    def _mark(self, path: str) -> _Mark | None:
        try:
            stat = self._stat(path)
        except FileNotFoundError:
            return None
        if not os.path.isfile(path):  # noqa: PTH113  (a plain string, often)
            raise ValueError(path)  # a folder or a pipe: nothing to digest
        return stat.st_size, stat.st_mtime_ns, stat.st_ino

    def _digest(self, path: str, mark: _Mark | None) -> str | None:
        try:
            digest = file_digest(Path(path)) if Path(path).is_file() else None
            now = None if digest is None else self._mark(path)
        except OSError as error:
            raise RecipeError(f"{self._name(path)}: was read, and cannot be read now ({error.strerror}); build again") from error
        if path in self._written or now == mark:
            return digest
        if mark is None:
            return None  # it came to be since, so the next build looks again
        raise RecipeError(f"{self._name(path)}: changed while it was read; build again")

    def _name(self, path: str) -> str:
        for folder in (self.recipe_dir, self.recipe_dir.resolve()):
            if Path(path).is_relative_to(folder):
                return str(Path(path).relative_to(folder))
        return path


def union(records: list[Record]) -> Record:
    """Return all that was read in several phases."""
    found = Record({}, {}, {}, {})
    for record in records:
        found = Record(
            {**found.files, **record.files},
            {**found.listings, **record.listings},
            {**found.env, **record.env},
            {**found.modules, **record.modules},
        )
    return found


def code(record: Record) -> dict[str, Any]:
    """Return what the code of an entry needs, without a path that another checkout would not have.

    A file or folder outside the recipe's folder is named by its last part and its digest.
    """
    named = {
        kind: {_portable(name, digest): digest for name, digest in found.items() if digest is not None}
        for kind, found in (("files", record.files), ("listings", record.listings))
    }
    return {**named, "env": dict(record.env), "modules": dict(record.modules)}


def _portable(name: str, digest: str) -> str:
    return f"{Path(name).name}:{digest[:16]}" if Path(name).is_absolute() else name


def _intercept(owner: Any, name: str, tell: Callable[[tuple[Any, ...]], None]) -> None:
    """Let a function tell of its arguments before it runs."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def told(*arguments: Any, **options: Any) -> Any:
        if arguments:
            tell(arguments)
        return original(*arguments, **options)

    for able in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks):
        if original in able:
            able.add(told)
    setattr(owner, name, told)


def _asked_by_user() -> bool:
    """Return whether the nearest caller outside the standard library's path and environment modules is the user's."""
    frame = sys._getframe(2)  # noqa: SLF001  (the only way to see who asks)
    while frame.f_back is not None and (frame.f_code.co_filename.startswith("<frozen") or frame.f_code.co_filename in _ways()):
        frame = frame.f_back
    return usercode.is_user_file(frame.f_code.co_filename)


@functools.cache
def _ways() -> frozenset[str]:
    import _collections_abc
    import genericpath
    import pathlib
    import posixpath

    return frozenset({__file__, *(str(module.__file__) for module in (_collections_abc, genericpath, os, pathlib, posixpath))})


def _absolute(path: Any) -> str:
    return os.path.abspath(os.fsdecode(path))  # noqa: PTH100  (also normalises; links stay as they are named)


def _value_digest(value: str | None) -> str | None:
    import hashlib

    return None if value is None else hashlib.sha256(os.fsencode(value)).hexdigest()


def _mapped_files() -> set[str]:
    """Return the files that are mapped into memory now and are no libraries."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    fields = 6
    paths = {parts[-1] for line in lines if len(parts := line.split(maxsplit=fields - 1)) == fields}
    return {path for path in paths if path.startswith("/") and ".so" not in Path(path).name and Path(path).is_file()}


def _distributions(files: list[str], recipe_dir: Path) -> dict[str, str]:
    """Return the versions of the distributions that files of the user import by name."""
    names: set[str] = set()
    for file in files:
        names |= _imports(file)
    own = {Path(file).stem for file in files} | {path.stem for path in recipe_dir.iterdir()}
    names -= {*sys.stdlib_module_names, *_TOOLS, *own}
    if not names:
        return {}
    from importlib.metadata import packages_distributions

    known = packages_distributions()
    found = {distribution for name in names for distribution in known.get(name, [])}
    return {name: version for name in sorted(found) if (version := tool_version(name)) is not None}


@functools.cache
def _imports(file: str) -> set[str]:
    try:
        nodes = list(ast.walk(ast.parse(Path(file).read_bytes())))
    except (OSError, SyntaxError, ValueError):
        return set()
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    plain |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.partition(".")[0] for name in plain}
