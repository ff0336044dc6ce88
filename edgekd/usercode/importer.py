# SPDX-License-Identifier: Apache-2.0
"""Import and call the user's code; every error in it is reported in one line.

Files of the user are always compiled from their source: no bytecode is written beside them, and existing bytecode is
ignored (Python compares only size and seconds, so it would miss a quick edit).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import signal
import sys
import traceback
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES, ExtensionFileLoader, FileFinder, ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import EdgekdError, RecipeError, expected_one_of, printable
from edgekd.usercode import settings
from edgekd.usercode.running import running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import CodeType, ModuleType

    from edgekd.domain.recipe import EntryPoint

# modules that no file of the user may replace: other code in this process imports them when it needs them
_RESERVED = frozenset(
    [
        "ai_edge_litert",
        "ai_edge_quantizer",
        "edgekd",
        "litert_torch",
        "numpy",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "onnxsim",
        "safetensors",
        "scipy",
        "torch",
    ]
)
_search_folders: list[Path] = []  # the folder of the recipe whose code is loaded in this process, and those of its entry points


def load_function(recipe_dir: Path, entry: EntryPoint) -> Callable[..., Any]:
    """Return the function that an entry names; its file is imported under its stem, the recipe's folder first on the path.

    Raises:
        RecipeError: if the file cannot be imported or has no such function.
    """
    recipe_dir = recipe_dir.absolute()
    path = Path(os.path.normpath(recipe_dir / entry.file))
    if path.suffix != ".py" or not path.is_file():
        raise RecipeError(_describe_missing_file(recipe_dir, path, entry))
    _activate(recipe_dir, path.parent)
    module = _load_module(path, entry)
    function = getattr(module, entry.function, None)
    if function is None:
        raise RecipeError(f"{entry.file}: has no function '{entry.function}'; {_available_functions(module, entry.function)}")
    if not callable(function):
        raise RecipeError(
            f"{entry.file}: '{entry.function}' is {_with_article(function)}; expected a function; {_available_functions(module, '')}"
        )
    return function  # type: ignore[no-any-return]  # checked to be callable


def call_user_code(function: Callable[..., Any], entry: EntryPoint, *arguments: Any, what: str | None = None) -> Any:
    """Call user code, with the recipe's folder as the current one; ``what`` names it in the error, by default ``function()``.

    Raises:
        RecipeError: if it raises anything but an interrupt, or tries to end the process.
    """
    with _user_errors(entry, what or f"{entry.function}()"), in_recipe_dir():
        return function(*arguments)


def forget_modules() -> None:
    """Remove all modules of the user from this process, so that they are imported anew."""
    for name in [name for name, module in list(sys.modules.items()) if is_user_module(module)]:
        del sys.modules[name]
    for path in list(sys.path_importer_cache):
        if is_user_file(path):
            del sys.path_importer_cache[path]


def is_user_file(path: str) -> bool:
    """Return whether a file is the user's: neither Python's, nor an installed package's, nor edgekd's."""
    return not f"{path}{os.sep}".startswith(("<", *_library_folders()))


def quieten_libraries() -> None:
    """Drop the warnings of installed packages in this process, by ``warnings`` and by ``logging``; their errors and all of the user's stay.

    Packages warn of each other when they are imported (torchao and torch: four lines in each step), and the last lines that a process
    prints are the reason that a message has for its end.
    """
    import logging
    import warnings

    show_warning, call_handlers = warnings.showwarning, logging.Logger.callHandlers

    def show_users_warning(message: Warning | str, category: type[Warning], filename: str, *arguments: Any, **options: Any) -> None:
        if is_user_file(filename):
            show_warning(message, category, filename, *arguments, **options)

    def call_handlers_for_users(logger: logging.Logger, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR or is_user_file(record.pathname):
            call_handlers(logger, record)

    warnings.showwarning = show_users_warning
    logging.Logger.callHandlers = call_handlers_for_users  # type: ignore[method-assign,assignment]  # packages have handlers of their own


def is_user_module(module: object) -> bool:
    """Return whether a module was imported from the user's files."""
    spec = getattr(module, "__spec__", None)
    if isinstance(getattr(spec, "loader", None), _Source | _Extension):
        return True
    if spec is None or getattr(spec, "origin", None) is not None:
        return False
    paths = getattr(spec, "submodule_search_locations", None) or ()  # of a package without __init__.py
    return any(Path(path).is_relative_to(folder) for path in paths for folder in _search_folders)


class _Source(SourceFileLoader):
    """Imports a file from its source, and remembers the source."""

    source: bytes | None = None

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        self.source = self.get_data(path)
        code: CodeType = self.source_to_code(self.source, path)
        return code

    def is_current(self) -> bool:
        try:
            return self.source is None or Path(self.path).read_bytes() == self.source
        except OSError:
            return False


class _Extension(ExtensionFileLoader):
    """Imports a compiled module of the user."""


class _Finder(FileFinder):
    """Finds the user's modules in one folder, except those in a recipe's folders that would replace Python's or a runtime's."""

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        return None if _is_reserved(fullname) and Path(self.path) in _search_folders else super().find_spec(fullname, target)


def _finder(path: str) -> _Finder:
    if not is_user_file(path) or not Path(path).is_dir():
        raise ImportError(path)  # the next hook takes over
    return _Finder(path, (_Extension, EXTENSION_SUFFIXES), (_Source, SOURCE_SUFFIXES))


def _is_reserved(name: str) -> bool:
    return name in sys.stdlib_module_names or name in _RESERVED


def _activate(recipe_dir: Path, folder: Path) -> None:
    """Put a recipe's folders first on the import path, and drop modules of other folders and those whose source changed."""
    if _finder not in sys.path_hooks:
        sys.path_hooks.insert(0, _finder)
    if _search_folders[:1] != [recipe_dir]:
        _deactivate()
        _search_folders.append(recipe_dir)
    loaded = [(name, module) for name, module in list(sys.modules.items()) if is_user_module(module)]
    if any(isinstance(loader, _Source) and not loader.is_current() for loader in (module.__loader__ for _, module in loaded)):
        forget_modules()
    folders = list(dict.fromkeys([recipe_dir, folder, *_search_folders[1:]]))
    sys.path[:] = [*map(str, folders), *(item for item in sys.path if Path(item) not in folders)]
    _search_folders[:] = folders
    for path in map(str, folders):
        sys.path_importer_cache.pop(path, None)  # there may be new files since it was listed
    for name, module in loaded:
        package = name.partition(".")[0]
        if _is_shadowed(package, sys.modules.get(package, module), folders[:2]):
            sys.modules.pop(name, None)


def _deactivate() -> None:
    """Forget the recipe whose code is loaded."""
    forget_modules()
    sys.path[:] = [item for item in sys.path if Path(item) not in _search_folders]
    _search_folders.clear()


def _is_shadowed(name: str, module: ModuleType, folders: list[Path]) -> bool:
    """Return whether an import of this name would now find another file than the one it was imported from."""
    files = (path for folder in folders for path in (folder / name / "__init__.py", folder / f"{name}.py") if path.is_file())
    first = next(files, None)
    return first is not None and module.__spec__ is not None and module.__spec__.origin != str(first)


def _load_module(path: Path, entry: EntryPoint) -> ModuleType:
    name = path.stem
    loaded = sys.modules.get(name)
    if loaded is not None and is_user_module(loaded) and loaded.__spec__ is not None and loaded.__spec__.origin == str(path):
        return loaded
    if _is_reserved(name) or (loaded is not None and not is_user_module(loaded)):
        raise RecipeError(f"{entry.file}: has the name of the module '{name}' of Python or of an installed package; rename the file")
    spec = importlib.util.spec_from_file_location(name, path, loader=_Source(name, str(path)))
    if spec is None or spec.loader is None:
        raise RecipeError(f"{entry.file}: cannot be imported; expected a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _user_errors(entry, "importing it"), in_recipe_dir():
            spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


@contextlib.contextmanager
def _user_errors(entry: EntryPoint, what: str) -> Iterator[None]:
    """Turn whatever the user's code raises into an error of one line."""
    try:
        with running(str(entry)), settings.restored(str(entry)):
            yield
    except EdgekdError:
        raise
    except BaseException as error:  # the boundary to the user's code, which may raise anything
        if isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            raise  # in a program of the user's; processes of edgekd ignore the signal, so there the code itself raised it
        raise RecipeError(f"{_location(error) or entry.file}: {_describe_error(error, what)}") from error


def describe_user_error(error: BaseException) -> str | None:
    """Return an error message if an exception comes from the user's code, called in some other way (a hook, an overridden method)."""
    location = _location(error)
    return None if location is None else f"{location}: {_describe_error(error, 'the code')}"


def in_recipe_dir() -> contextlib.AbstractContextManager[None]:
    """Return a context in which the recipe's folder is the current one, so that relative paths mean the same in every stage."""
    return contextlib.chdir(_search_folders[0]) if _search_folders else contextlib.nullcontext()


def _location(error: BaseException) -> str | None:
    """Return ``file:line`` of the deepest frame in the user's files, relative to the recipe's folder; None if there is none."""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__) if is_user_file(frame.filename)]
    frames = [
        (file, line) for file, line in frames if Path(file).is_absolute()
    ]  # the compiled code of a library names its source otherwise
    if isinstance(error, SyntaxError) and error.filename and is_user_file(error.filename):
        frames.append((error.filename, error.lineno))
    if not frames:
        return None
    file, line = frames[-1]
    folder = _search_folders[0] if _search_folders else Path.cwd()
    return f"{os.path.relpath(file, folder)}:{line}"


def _describe_error(error: BaseException, what: str) -> str:
    try:
        lines = str(error).strip().splitlines()
    except BaseException:  # noqa: BLE001  (its own method may raise anything)
        lines = ["(its text cannot be read: str() of it raises)"]
    text = f": {printable(lines[0])}" if lines else ""
    if isinstance(error, SystemExit):
        return f"{what} tried to end the process (SystemExit{text}); it must return"
    if isinstance(error, SyntaxError):
        return f"is not valid Python ({printable(str(error.msg))})"
    hint = f"; install '{error.name}' where edgekd is installed, or correct the name" if isinstance(error, ModuleNotFoundError) else ""
    return f"{what} raised {printable(type(error).__name__)}{text}{hint}"


def _describe_missing_file(recipe_dir: Path, path: Path, entry: EntryPoint) -> str:
    if path.is_file():
        return f"{entry.file}: is not a Python file; expected file.py:{entry.function}"
    siblings = sorted(sibling.name for sibling in path.parent.glob("*.py")) if path.parent.is_dir() else []
    hint = expected_one_of(path.name, siblings) if siblings else "the folder has no Python file"
    return f"{entry.file}: no such file in {recipe_dir}; {hint}"


def _available_functions(module: ModuleType, requested: str) -> str:
    public = [
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return expected_one_of(requested, public) if public else "it defines none"


def _with_article(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


@functools.cache
def _library_folders() -> tuple[str, ...]:
    """Return the folders of files that are not the user's: Python's, those of installed packages, edgekd's."""
    import site
    import sysconfig

    paths = sysconfig.get_paths()
    folders = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    folders |= {*site.getsitepackages(), site.getusersitepackages(), str(Path(__file__).parents[1])}
    folders |= {path for path in sys.path if path.endswith((".zip", "-packages"))}
    return tuple(sorted({f"{path}{os.sep}" for folder in folders for path in (folder, os.path.realpath(folder))}))
