# SPDX-License-Identifier: Apache-2.0
"""Record what the user's code reads while it runs: files, folders, environment variables, installed packages.

An audit hook of the interpreter reports every file that Python opens or imports, every folder that it lists, and SQLite
databases. Files of safetensors are recorded where they are opened. Files that are mapped into memory without being written are recorded
at the end of a phase. Not recorded: files that other compiled code reads by itself and does not keep mapped (h5py, libsndfile), what
other processes read that the user's code starts, the network, and files that the code wrote itself before it read them. Where the
user's code could read so, ``unseen_readers`` names how; the recipe then declares the files. docs/decisions/0016-cache-trust-and-reads.md
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
from edgekd.store.digests import env_digest, file_digest, listing_digest, tool_version
from edgekd.usercode.declared import NATIVE_READERS, UNSEEN_EVENTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

_SYSTEM_FOLDERS = ("/proc/", "/sys/", "/dev/")
_FIXED_VARIABLES = {"PYTHONHASHSEED", "GOMP_SPINCOUNT"}  # build/worker.py sets them for all steps: what the code reads is no input
_TOOLS = {"edgekd", "numpy", "torch"}  # their versions are in the keys of the steps
_SAFETENSORS = ("safetensors", "safetensors.numpy", "safetensors.torch")  # modules that name the function safe_open
_HANDLERS = {  # audit event -> the watcher's method
    "open": "_on_open",
    "os.listdir": "_on_list",
    "os.scandir": "_on_list",
    "sqlite3.connect": "_on_sqlite",
    "import": "_on_import",
    "os.rename": "_on_rename",
    "os.mkdir": "_on_mkdir",
}
_Stamp = tuple[int, int, int]  # size, time and inode of a file


@dataclass(slots=True)
class Reads:
    """What was read in one phase, by absolute path; a file that was looked for and absent has no stamp."""

    files: dict[str, _Stamp | None] = field(default_factory=dict)
    listings: set[str] = field(default_factory=set)
    imports: set[str] = field(default_factory=set)
    env: set[str] = field(default_factory=set)
    unseen: set[str] = field(default_factory=set)  # by which other means the user's code could read files


class Watcher:
    """Records what is read while a phase runs. Its hook cannot be removed: use one watcher per process, in a process of its own.

    Args:
        recipe_dir: The folder that the recorded names are relative to.
        excluded: Folders that edgekd writes; files in them are not the user's.
        secret: The key of the hashes of environment values.
    """

    def __init__(self, recipe_dir: Path, excluded: tuple[Path, ...], secret: bytes = b"") -> None:
        self.recipe_dir = recipe_dir
        self._secret = secret
        self._excluded = (*_SYSTEM_FOLDERS, *(f"{path}{os.sep}" for path in excluded))
        self._reads: Reads | None = None  # of the phase that runs
        self._written_files: set[str] = set()
        self._created_folders: set[str] = set()
        self._environ = dict(os.environ)  # as the parent process set it, without what the user's code sets itself
        self._stat = os.stat
        self._mapped_before = _mapped_files()
        _is_called_by_user()  # fill its caches and imports now: the hook itself must not import
        sys.addaudithook(self._hook)
        _intercept(os._Environ, "__getitem__", lambda arguments: self._on_environ(arguments[1]))  # noqa: SLF001  (it has no audit event)
        for module in map(importlib.import_module, _SAFETENSORS):
            _intercept(module, "safe_open", lambda arguments: self._on_native_open(arguments[0]))
        _intercept(os, "stat", lambda arguments: self._on_stat(arguments[0]))

    @contextmanager
    def phase(self) -> Iterator[Reads]:
        """Watch a phase. The user's modules are imported anew in it, so that the reads are complete."""
        usercode.forget_modules()
        reads = self._reads = Reads()
        try:
            yield reads
        finally:
            self._reads = None
        modules = [getattr(module, "__file__", None) for module in list(sys.modules.values()) if usercode.is_user_module(module)]
        absent = [str(self.recipe_dir / f"{name}.py") for name in reads.imports if name not in sys.modules]  # a later build may find them
        for path in {*filter(None, modules), *absent, *(_mapped_files() - self._mapped_before)}:
            self._add_file(reads, path)

    def record(self, reads: Reads) -> Record:
        """Return the digests of what was read.

        Raises:
            RecipeError: if a file changed after it was read, and the user's code did not write it.
        """
        sources = [path for path, stamp in reads.files.items() if stamp and path.endswith(".py")]
        return Record(
            files={self._name(path): self._digest(path, stamp) for path, stamp in sorted(reads.files.items())},
            listings={self._name(path): listing_digest(Path(path)) for path in sorted(reads.listings) if path not in self._created_folders},
            env={name: env_digest(self._environ.get(name), self._secret) for name in sorted(reads.env)},
            modules=_imported_distributions(sources, self.recipe_dir),
        )

    def unseen_readers(self, reads: Reads) -> set[str]:
        """Return by which means the user's code could have read files that are not recorded: modules, another process, the network."""
        sources = [path for path, stamp in reads.files.items() if stamp and path.endswith(".py")]
        imported = {name for file in sources for name in _imported_names(file)}
        return reads.unseen | (imported & NATIVE_READERS)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        name = _HANDLERS.get(event)
        reads = self._reads
        if reads is None:
            return
        if event in UNSEEN_EVENTS and _is_user_code_on_the_stack():
            reads.unseen.add(UNSEEN_EVENTS[event])
        if name is None:
            return
        with suppress(OSError, ValueError, TypeError):  # a path that cannot be a file: the call itself will raise
            getattr(self, name)(reads, arguments)

    def _on_open(self, reads: Reads, arguments: tuple[Any, ...]) -> None:
        path, _, flags = arguments
        if isinstance(path, int):
            return
        path = _absolute(path)
        if flags & os.O_ACCMODE != os.O_WRONLY and not flags & (os.O_CREAT | os.O_TRUNC) and not path.endswith(".pyc"):
            self._add_file(reads, path)
        if flags & os.O_ACCMODE != os.O_RDONLY:
            self._written_files.add(path)

    def _on_native_open(self, file: object) -> None:
        if self._reads is not None and isinstance(file, str | bytes | os.PathLike):
            self._add_file(self._reads, _absolute(file))

    def _on_list(self, reads: Reads, arguments: tuple[Any, ...]) -> None:
        caller = sys._getframe(2).f_code.co_filename  # noqa: SLF001  (the only way to find the caller)
        if caller.startswith(("<frozen importlib", str(Path(importlib.__file__).parent))):  # the import system looks for modules
            return
        folder = arguments[0]
        path = str(Path(f"/proc/self/fd/{folder}").readlink()) if isinstance(folder, int) else _absolute(folder or ".")
        if self._is_input(path):
            reads.listings.add(path)

    def _on_sqlite(self, reads: Reads, arguments: tuple[Any, ...]) -> None:
        name = os.fsdecode(arguments[0]).removeprefix("file:").partition("?")[0]
        if name and name != ":memory:":
            path = _absolute(name)
            self._add_file(reads, path)
            if reads.files.get(path) is None:  # SQLite creates it
                self._written_files.add(path)

    def _on_import(self, reads: Reads, arguments: tuple[Any, ...]) -> None:
        if "." not in arguments[0] and _is_called_by_user():
            reads.imports.add(arguments[0])

    def _on_rename(self, _: Reads, arguments: tuple[Any, ...]) -> None:
        self._written_files.add(_absolute(arguments[1]))

    def _on_mkdir(self, _: Reads, arguments: tuple[Any, ...]) -> None:
        self._created_folders.add(_absolute(arguments[0]))

    def _on_environ(self, name: object) -> None:
        if self._reads is not None and isinstance(name, str) and name not in _FIXED_VARIABLES and _is_called_by_user():
            self._reads.env.add(name)

    def _on_stat(self, file: object) -> None:
        """Record a file or folder that the user's code looked for (``exists``, ``is_file``) and that is absent."""
        reads = self._reads
        if reads is None or not isinstance(file, str | bytes | os.PathLike) or not _is_called_by_user():
            return
        path = _absolute(file)
        if path not in reads.files and self._is_input(path):
            try:
                self._stat(path)
            except (OSError, ValueError):
                reads.files[path] = None
                reads.listings.add(path)

    def _add_file(self, reads: Reads, path: str) -> None:
        """Record a file that is read, or looked for and absent."""
        with suppress(OSError, ValueError):
            if path not in reads.files and self._is_input(path):
                reads.files[path] = self._stamp(path)

    def _is_input(self, path: str) -> bool:
        """Return whether a file or folder is the user's, and not made by the user's code in this process."""
        if not usercode.is_user_file(path) or f"{path}{os.sep}".startswith(self._excluded):
            return False
        if path in self._written_files:
            return False
        return not self._created_folders or self._created_folders.isdisjoint([path, *map(str, Path(path).parents)])

    def _stamp(self, path: str) -> _Stamp | None:
        try:
            stat = self._stat(path)
        except FileNotFoundError:
            return None
        if not os.path.isfile(path):  # noqa: PTH113  (a plain string, often)
            raise ValueError(path)  # a folder or a pipe has no digest
        return stat.st_size, stat.st_mtime_ns, stat.st_ino

    def _digest(self, path: str, stamp: _Stamp | None) -> str | None:
        try:
            digest = file_digest(Path(path)) if Path(path).is_file() else None
            stamp_now = None if digest is None else self._stamp(path)
        except OSError as error:
            raise RecipeError(f"{self._name(path)}: was read, and cannot be read now ({error.strerror}); build again") from error
        if path in self._written_files or stamp_now == stamp:
            return digest
        if stamp is None:
            return None  # it appeared meanwhile, so the next build looks again
        raise RecipeError(f"{self._name(path)}: changed while it was read; build again")

    def _name(self, path: str) -> str:
        for folder in (self.recipe_dir, self.recipe_dir.resolve()):
            if Path(path).is_relative_to(folder):
                return str(Path(path).relative_to(folder))
        return path


def merge_records(records: list[Record]) -> Record:
    """Return the union of several records."""
    return Record(
        files={name: digest for record in records for name, digest in record.files.items()},
        listings={name: digest for record in records for name, digest in record.listings.items()},
        env={name: digest for record in records for name, digest in record.env.items()},
        modules={name: version for record in records for name, version in record.modules.items()},
    )


def code_dependencies(record: Record) -> dict[str, Any]:
    """Return what the code of an entry point depends on, without a path that differs in another checkout.

    A file or folder outside the recipe's folder is named by its last part and its digest.
    """
    files, listings = (
        {_portable_name(name, digest): digest for name, digest in digests.items() if digest is not None}
        for digests in (record.files, record.listings)
    )
    return {"files": files, "listings": listings, "env": dict(record.env), "modules": dict(record.modules)}


def _portable_name(name: str, digest: str) -> str:
    return f"{Path(name).name}:{digest[:16]}" if Path(name).is_absolute() else name


def _intercept(owner: Any, name: str, callback: Callable[[tuple[Any, ...]], None]) -> None:
    """Let a function call back with its arguments before it runs."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        if arguments:
            callback(arguments)
        return original(*arguments, **options)

    for supporting in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks):
        if original in supporting:
            supporting.add(wrapper)
    setattr(owner, name, wrapper)


def _is_called_by_user() -> bool:
    """Return whether the nearest caller outside the standard library's path and environment modules is the user's code."""
    frame = sys._getframe(2)  # noqa: SLF001  (the only way to find the caller)
    skipped = _path_modules()
    while frame.f_back is not None and (frame.f_code.co_filename.startswith("<frozen") or frame.f_code.co_filename in skipped):
        frame = frame.f_back
    return usercode.is_user_file(frame.f_code.co_filename)


def _is_user_code_on_the_stack() -> bool:
    frame: FrameType | None = sys._getframe(2)  # noqa: SLF001  (the only way to find the callers)
    while frame is not None and not usercode.is_user_file(frame.f_code.co_filename):
        frame = frame.f_back
    return frame is not None


@functools.cache
def _path_modules() -> frozenset[str]:
    import _collections_abc
    import genericpath
    import pathlib
    import posixpath

    return frozenset({__file__, *(str(module.__file__) for module in (_collections_abc, genericpath, os, pathlib, posixpath))})


def _absolute(path: Any) -> str:
    return os.path.abspath(os.fsdecode(path))  # noqa: PTH100  (also normalizes; links keep their names)


def _mapped_files() -> set[str]:
    """Return the files that are mapped into memory now, except libraries."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    fields = 6
    mappings = [parts for line in lines if len(parts := line.split(maxsplit=fields - 1)) == fields]
    paths = {
        parts[-1] for parts in mappings if not ("w" in parts[1] and "s" in parts[1])
    }  # a library's own data base is shared and written
    return {path for path in paths if path.startswith("/") and ".so" not in Path(path).name and Path(path).is_file()}


def _imported_distributions(files: list[str], recipe_dir: Path) -> dict[str, str]:
    """Return the versions of the distributions that files of the user import by name."""
    names: set[str] = set()
    for file in files:
        names |= _imported_names(file)
    user_modules = {Path(file).stem for file in files} | {path.stem for path in recipe_dir.iterdir()}
    names -= {*sys.stdlib_module_names, *_TOOLS, *user_modules}
    if not names:
        return {}
    from importlib.metadata import packages_distributions

    distributions_by_name = packages_distributions()
    distributions = {distribution for name in names for distribution in distributions_by_name.get(name, [])}
    return {name: version for name in sorted(distributions) if (version := tool_version(name)) is not None}


@functools.cache
def _imported_names(file: str) -> set[str]:
    try:
        nodes = list(ast.walk(ast.parse(Path(file).read_bytes())))
    except (OSError, SyntaxError, ValueError):
        return set()
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.partition(".")[0] for name in names}
