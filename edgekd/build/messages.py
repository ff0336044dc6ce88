# SPDX-License-Identifier: Apache-2.0
"""Messages between a build and the processes of its steps, as JSON: reading one runs no code, whoever has written it.

The process of a step runs the user's code and native parsers, so the build must not trust what it sends. Numbers, strings, lists and
None are themselves. All else is an object with one key, its type: a tuple, a dict with string keys, bytes, a path, a dataclass of edgekd.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

_PATH = type(Path())
_PACKAGE = "edgekd."


class MessageError(Exception):
    """A message is not one that :func:`encode` wrote."""


def encode(value: Any) -> bytes:
    """Return a value as a message.

    Raises:
        TypeError: if it holds anything but JSON values, tuples, bytes, paths and dataclasses.
    """
    return json.dumps(_to_json(value)).encode()


def decode(message: bytes) -> Any:
    """Return the value of a message.

    Raises:
        MessageError: if it is not sound.
    """
    try:
        return _from_json(json.loads(message))
    except (ValueError, TypeError, LookupError, AttributeError, ImportError, RecursionError) as error:
        raise MessageError(f"not a message: {type(error).__name__}: {error}") from error


def _to_json(value: Any) -> Any:
    kind = type(value)
    if kind is list:
        return [_to_json(item) for item in value]
    if kind is tuple:
        return {"tuple": [_to_json(item) for item in value]}
    if kind is dict:
        if any(type(name) is not str for name in value):
            raise TypeError("a key is not a string")
        return {"dict": {name: _to_json(item) for name, item in value.items()}}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is _PATH:
        return {"path": str(value)}
    if hasattr(kind, "__dataclass_fields__"):
        return {f"{kind.__module__}:{kind.__qualname__}": {name: _to_json(getattr(value, name)) for name in kind.__dataclass_fields__}}
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tuple":
        return tuple(_from_json(item) for item in content)
    if kind == "dict":
        return {name: _from_json(item) for name, item in content.items()}
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "path":
        return Path(content)
    module, _, name = kind.partition(":")
    if not module.startswith(_PACKAGE):
        raise ValueError(f"{module} is not a module of edgekd")
    dataclass = getattr(importlib.import_module(module), name)
    if not (isinstance(dataclass, type) and is_dataclass(dataclass)):
        raise ValueError(f"{kind} is not a dataclass")
    return dataclass(**{field: _from_json(item) for field, item in content.items()})
