# SPDX-License-Identifier: Apache-2.0
"""Runtimes and devices by name: built-in modules, and plug-ins (entry points of other packages). Each is imported on first use."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgekd.errors import RecipeError, expected_one_of

if TYPE_CHECKING:
    from edgekd.ports import Device, Runtime


def names(kind: str) -> tuple[str, ...]:
    """Return the names of a kind (``runtimes`` or ``devices``), sorted, without importing them."""
    package = importlib.import_module(f"edgekd.{kind}")
    return tuple(sorted({module.name for module in pkgutil.iter_modules(package.__path__)} | set(_entry_points(kind))))


def knows(kind: str, name: str) -> bool:
    """Return whether a name is registered; plug-ins are looked up only for a name that is not built in."""
    return _is_built_in(kind, name) or name in _entry_points(kind)


def runtime(name: str) -> Runtime:
    """Return a runtime.

    Raises:
        RecipeError: if no such name is registered.
    """
    return cast("Runtime", _load("runtimes", name))


def device(kind: str) -> Device:
    """Return the module of a device kind.

    Raises:
        RecipeError: if no such name is registered.
    """
    return cast("Device", _load("devices", kind))


def source_folder(kind: str, name: str) -> Path:
    """Return the folder of the module that implements a runtime or a device kind, without importing it.

    Raises:
        RecipeError: if no such name is registered.
    """
    module = f"edgekd.{kind}.{name}" if _is_built_in(kind, name) else _entry_point(kind, name).module
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise RecipeError(f"'{name}' of edgekd's {kind}: module {module} does not exist; reinstall its package")
    return Path(spec.origin).parent


def _load(kind: str, name: str) -> Any:
    return importlib.import_module(f"edgekd.{kind}.{name}") if _is_built_in(kind, name) else _entry_point(kind, name).load()


def _entry_point(kind: str, name: str) -> Any:
    points = _entry_points(kind)
    if name not in points:
        raise RecipeError(f"'{name}' is not one of edgekd's {kind}; {expected_one_of(name, names(kind))}")
    return points[name]


def _is_built_in(kind: str, name: str) -> bool:
    return name.isidentifier() and importlib.util.find_spec(f"edgekd.{kind}.{name}") is not None


def _entry_points(kind: str) -> dict[str, Any]:
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=f"edgekd.{kind}")}
