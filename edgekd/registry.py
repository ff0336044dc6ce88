# SPDX-License-Identifier: Apache-2.0
"""Runtimes and devices by name: built-in modules, and those that other packages offer as entry points. Loaded when asked."""

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
    """Return the names of a kind (``runtimes`` or ``devices``), sorted; imports none of them."""
    package = importlib.import_module(f"edgekd.{kind}")
    return tuple(sorted({module.name for module in pkgutil.iter_modules(package.__path__)} | set(_entry_points(kind))))


def knows(kind: str, name: str) -> bool:
    """Return whether there is one of that name; plug-ins are asked only for a name that is not built in."""
    return _is_built_in(kind, name) or name in _entry_points(kind)


def runtime(name: str) -> Runtime:
    """Return a runtime.

    Raises:
        RecipeError: if there is none of that name.
    """
    return cast("Runtime", _load("runtimes", name))


def device(kind: str) -> Device:
    """Return a device kind.

    Raises:
        RecipeError: if there is none of that name.
    """
    return cast("Device", _load("devices", kind))


def source_folder(kind: str, name: str) -> Path:
    """Return the folder of the module that implements one, without importing it.

    Raises:
        RecipeError: if there is none of that name.
    """
    module = f"edgekd.{kind}.{name}" if _is_built_in(kind, name) else _entry_point(kind, name).module
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None  # noqa: S101  (both kinds of name were just looked up)
    return Path(spec.origin).parent


def _load(kind: str, name: str) -> Any:
    return importlib.import_module(f"edgekd.{kind}.{name}") if _is_built_in(kind, name) else _entry_point(kind, name).load()


def _entry_point(kind: str, name: str) -> Any:
    offered = _entry_points(kind)
    if name not in offered:
        raise RecipeError(f"'{name}' is not one of edgekd's {kind}; {expected_one_of(name, names(kind))}")
    return offered[name]


def _is_built_in(kind: str, name: str) -> bool:
    return name.isidentifier() and importlib.util.find_spec(f"edgekd.{kind}.{name}") is not None


def _entry_points(kind: str) -> dict[str, Any]:
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=f"edgekd.{kind}")}
