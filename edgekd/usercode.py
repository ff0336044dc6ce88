# SPDX-License-Identifier: Apache-2.0
"""The user's own code: found, imported and called, with every mistake in it told in one line."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import RecipeError, expected_one_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from edgekd.domain.recipe import Entry


def load(recipe_dir: Path, entry: Entry) -> Callable[..., Any]:
    """Return the function that an entry names.

    Raises:
        RecipeError: if the file cannot be imported or has no such function.
    """
    path = recipe_dir / entry.file
    if not path.is_file():
        raise RecipeError(f"{entry.file}: no such file in {recipe_dir}")
    module = _module(recipe_dir, path, entry)
    function = getattr(module, entry.function, None)
    if function is None:
        public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise RecipeError(f"{entry.file}: has no function '{entry.function}'; {expected_one_of(entry.function, public)}")
    if not callable(function):
        raise RecipeError(f"{entry.file}: '{entry.function}' is {type(function).__name__}; expected a function")
    return function  # type: ignore[no-any-return]  # checked to be callable


def call(function: Callable[..., Any], entry: Entry, *arguments: Any) -> Any:
    """Call user code.

    Raises:
        RecipeError: if it raises anything, or wants to end the process.
    """
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:  # noqa: BLE001  (the boundary to the user's code)
        raise RecipeError(f"{_place(error, entry)}: {entry.function}() {_what(error)}") from error


def forget(recipe_dir: Path) -> None:
    """Remove the modules of a recipe's folder, so that they are imported anew."""
    root = recipe_dir.resolve()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and Path(file).resolve().is_relative_to(root) and not _is_environment(Path(file)):
            del sys.modules[name]


def _module(recipe_dir: Path, path: Path, entry: Entry) -> ModuleType:
    known = sys.modules.get(path.stem)
    if known is not None and Path(getattr(known, "__file__", None) or "/").resolve() == path.resolve():
        return known
    _forget_siblings(path.parent, recipe_dir)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{entry.file}: cannot be imported; expected a Python file")
    module = importlib.util.module_from_spec(spec)
    folders = [str(recipe_dir.resolve()), str(path.parent.resolve())]
    sys.path[:] = [*dict.fromkeys(folders), *(item for item in sys.path if item not in folders)]
    sys.modules[path.stem] = module
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001  (the boundary to the user's code)
        del sys.modules[path.stem]
        raise RecipeError(f"{_place(error, entry)}: importing it {_what(error)}") from error
    finally:
        sys.dont_write_bytecode = writes
    return module


def _forget_siblings(folder: Path, recipe_dir: Path) -> None:
    """Remove modules of the names in this folder that come from another one: never a stale namesake."""
    names = {path.stem for where in (folder, recipe_dir) for path in where.glob("*.py")}
    roots = {folder.resolve(), recipe_dir.resolve()}
    for name in names:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file and Path(file).resolve().parent not in roots and not _is_environment(Path(file)):
            del sys.modules[name]


def _is_environment(path: Path) -> bool:
    return "site-packages" in path.parts or path.is_relative_to(Path(importlib.util.__file__).parent.parent)


def _place(error: BaseException, entry: Entry) -> str:
    """Return ``file:line`` of the deepest frame in the user's own files."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}:{error.lineno}"
    place = entry.file
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        inside = not _is_environment(path) and not path.is_relative_to(Path(__file__).parent) and not frame.filename.startswith("<")
        if inside:
            place = f"{path.name}:{frame.lineno}"
    return place


def _what(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"wants to end the process (exit code {error.code})"
    text = str(error).strip().splitlines()
    return f"raised {type(error).__name__}" + (f": {text[0]}" if text else "")
