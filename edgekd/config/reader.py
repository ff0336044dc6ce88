# SPDX-License-Identifier: Apache-2.0
"""TOML to frozen dataclasses, driven by their fields and ``Annotated`` rules; every problem is collected, with its key."""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edgekd.domain.recipe import EntryPoint
from edgekd.domain.rules import Between, Name, NonEmpty, OneOf
from edgekd.errors import RecipeError, expected_one_of

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

T = TypeVar("T")
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_MAX_SHOWN = 80
_INT64 = 2**63
_INVALID = object()  # a value that was refused; its problem is noted
_resolved_hints: dict[type[Any], dict[str, Any]] = {}  # resolving them takes most of the time
_TYPE_NAMES = {bool: "a boolean", int: "an integer", float: "a number", str: "a string"}


class Reader:
    """Collects problems, one line each, while it reads one file."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[str] = []
        self.parsed: dict[str, Any] = {}  # valid tables and entry points by key, also those in tables that are not valid

    def problem(self, key: str, text: str) -> object:
        """Note a problem at a key."""
        self.problems.append(f"{self.file}: {key}: {text}" if key else f"{self.file}: {text}")
        return _INVALID

    def all_parsed(self, kind: type[T]) -> list[tuple[str, T]]:
        """Return all valid objects of a class, with their keys."""
        return [(key, item) for key, item in self.parsed.items() if isinstance(item, kind)]

    def refuse_unknown(self, table: dict[str, Any], known: Collection[str], key: str = "") -> None:
        """Note each key of a table that is not known."""
        for name in table:
            if name not in known:
                self.problem(join_key(key, name), f"unknown key; {expected_one_of(name, known)}")

    def table(self, kind: type[Any], value: object, key: str = "", base: object = None) -> Any:
        """Read a table as a dataclass; ``base`` has the values of absent keys. Return None if the table is not valid."""
        if not isinstance(value, dict):
            self.problem(key, f"{_describe_value(value)}; expected a table")
            return None
        fields = {field.name: field for field in dataclasses.fields(kind)}
        self.refuse_unknown(value, fields, key)
        values: dict[str, Any] = {}
        for name, hint in type_hints(kind).items():
            if name in value:
                values[name] = self.value(hint, value[name], join_key(key, name))
            elif base is not None:
                values[name] = getattr(base, name)
            elif is_required(fields[name]):
                values[name] = self.problem(join_key(key, name), f"missing; expected {_describe_hint(hint)}")
        if any(item is _INVALID for item in values.values()):
            return None
        self.parsed[key] = kind(**values)
        return self.parsed[key]

    def value(self, hint: Any, value: object, key: str, expected: str = "") -> Any:
        """Read one value of a type hint; ``expected`` describes all that is allowed, if that is more than the hint."""
        origin = typing.get_origin(hint)
        if origin is typing.Annotated:
            inner, *rules = typing.get_args(hint)
            result = self.value(inner, value, key, expected)
            return _INVALID if result is _INVALID or self._breaks(rules, result, key) else result
        if origin in {types.UnionType, typing.Union}:
            return self._union(hint, value, key)
        if origin is tuple:
            if not isinstance(value, list):
                return self.problem(key, f"{_describe_value(value)}; expected {expected or 'an array'}")
            items = [self.value(typing.get_args(hint)[0], item, f"{key}[{index}]") for index, item in enumerate(value)]
            return _INVALID if any(item is _INVALID for item in items) else tuple(items)
        if hint is EntryPoint:
            return self._entry_point(value, key, expected)
        if dataclasses.is_dataclass(hint):
            result = self.table(typing.cast("type[Any]", hint), value, key)
            return _INVALID if result is None else result
        return self._scalar(hint, value, key, expected)

    def _union(self, hint: Any, value: object, key: str) -> Any:
        """Read a value of ``X | None``, ``X | Literal[...]`` or both."""
        words = literals(hint)
        if isinstance(value, str) and value in words:
            return value
        (option,) = (item for item in typing.get_args(hint) if item is not type(None) and typing.get_origin(item) is not typing.Literal)
        return self.value(option, value, key, _describe_hint(hint) if words else "")

    def _entry_point(self, value: object, key: str, expected: str) -> Any:
        file, _, function = value.rpartition(":") if isinstance(value, str) else ("", "", "")
        if not file.endswith(".py") or not function.isidentifier():
            problem = f"; expected {expected}" if expected else " is not an entry point; expected 'file.py:function'"
            return self.problem(key, f"{_describe_value(value)}{problem}")
        self.parsed[key] = EntryPoint(file, function)
        return self.parsed[key]

    def _scalar(self, kind: type[Any], value: object, key: str, expected: str) -> Any:
        expected = expected or _TYPE_NAMES[kind]
        if isinstance(value, int) and not -_INT64 <= value < _INT64:  # TOML's own limit, and str() of more digits may fail
            return self.problem(key, f"a number of more than 64 bits; expected {expected}")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            return self.problem(key, f"{_describe_value(value)}; expected {expected}")
        return value

    def _breaks(self, rules: list[Any], value: Any, key: str) -> bool:
        """Note the first rule that a value breaks, and return whether there is one."""
        for rule in rules:
            if isinstance(rule, Between):
                below = rule.low is not None and (value <= rule.low if rule.above else value < rule.low)
                if below or (rule.high is not None and value > rule.high):
                    self.problem(key, f"{_describe_number(value)} is out of range; expected {_describe_range(rule)}")
                    return True
            elif isinstance(rule, OneOf) and value not in rule.choices:
                self.problem(key, f"{_describe_value(value)} is not {rule.what}; {expected_one_of(value, rule.choices)}")
                return True
            elif isinstance(rule, Name) and not SAFE_NAME.fullmatch(value):
                allowed = "expected at most 64 letters, digits, '.', '_' and '-', a letter or digit first"
                self.problem(key, f"{_describe_value(value)} cannot name a folder; {allowed}")
                return True
            elif isinstance(rule, NonEmpty) and not value:
                self.problem(key, "is empty; expected at least one item" if isinstance(value, tuple) else "is empty; expected some text")
                return True
        return False


def type_hints(kind: type[Any]) -> dict[str, Any]:
    """Return the type hints of a dataclass, with their rules."""
    if kind not in _resolved_hints:
        _resolved_hints[kind] = typing.get_type_hints(kind, include_extras=True)
    return _resolved_hints[kind]


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Return whether a field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def literals(union: Any) -> list[str]:
    """Return the strings that a union names as ``Literal``."""
    return [word for option in typing.get_args(union) if typing.get_origin(option) is typing.Literal for word in typing.get_args(option)]


def join_key(key: str, name: str) -> str:
    """Return the dotted key of a name in a table, quoted where TOML needs quotes."""
    name = name if _BARE_KEY.fullmatch(name) else repr(name)
    return f"{key}.{name}" if key else name


def _describe_value(value: object) -> str:
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "an array"
    if isinstance(value, str):
        return repr(value if len(value) <= _MAX_SHOWN else f"{value[:_MAX_SHOWN]}...")  # repr keeps it on one line
    return str(value).lower() if isinstance(value, bool) else str(value)


def _describe_hint(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        for rule in arguments[1:]:
            if isinstance(rule, OneOf):
                return f"one of {', '.join(sorted(rule.choices))}"
            if isinstance(rule, Between) and rule.low == rule.high is not None:
                return _describe_range(rule)
        return _describe_hint(arguments[0])
    if origin is tuple:
        return "an array"
    if origin in {types.UnionType, typing.Union}:
        return " or ".join(_describe_hint(option) for option in arguments if option is not type(None))
    if origin is typing.Literal:
        return " or ".join(f'"{word}"' for word in arguments)
    return "'file.py:function'" if hint is EntryPoint else _TYPE_NAMES.get(hint, "a table")


def _describe_range(rule: Between) -> str:
    low, high = map(_describe_number, (rule.low, rule.high))
    if low == high:
        return low
    if rule.high is None:
        return f"more than {low}" if rule.above else f"at least {low}"
    return f"more than {low}, at most {high}" if rule.above else f"a number from {low} to {high}"


def _describe_number(value: float | None) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_toml(path: Path, what: str, advice: str) -> dict[str, Any]:
    """Return the content of a TOML file.

    Args:
        path: The file.
        what: What it contains, for errors.
        advice: What to do if it does not exist, for the error.

    Raises:
        RecipeError: if it cannot be read, or is not valid TOML.
    """
    shown = display_path(path)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # reading a pipe may never end
            raise RecipeError(f"{shown}: is not a regular file; expected a {what}, a TOML file")
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors write a byte order mark
    except FileNotFoundError:
        raise RecipeError(f"{shown}: no such {what}; {advice}") from None
    except IsADirectoryError:
        raise RecipeError(f"{shown}: is a folder; expected a {what}, a TOML file") from None
    except OSError as error:
        raise RecipeError(f"{shown}: the {what} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{shown}: is not UTF-8 at byte {error.start}; expected a {what}, a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{shown}: is not valid TOML: {str(error)[:1].lower()}{str(error)[1:]}") from None
    except RecursionError:
        raise RecipeError(f"{shown}: is not valid TOML: nested too deeply") from None
    except ValueError:  # int() refuses more than 4300 digits
        raise RecipeError(f"{shown}: is not valid TOML: a number has too many digits") from None


def display_path(path: Path) -> str:
    """Return a path relative to the current folder if it is in it, else as it is."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except (ValueError, OSError):  # it is elsewhere, or the current folder does not exist any more
        return str(path)


def check_unique(reader: Reader, key: str, items: Sequence[object]) -> None:
    """Note items that an array has more than once."""
    if duplicates := sorted({str(item) for item in items if items.count(item) > 1}):
        reader.problem(key, f"has {', '.join(duplicates)} twice; expected each once")
