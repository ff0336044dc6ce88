# SPDX-License-Identifier: Apache-2.0
"""Mappings -> frozen dataclasses, driven by their fields and ``Annotated`` rules; every problem is collected, with its key."""

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
_LONGEST_SHOWN = 80
_INT64 = 2**63
_BAD = object()  # stands for a value that was refused; its problem is already told
_known_hints: dict[type[Any], dict[str, Any]] = {}  # resolving them is the costly part
_KINDS = {bool: "a boolean", int: "a whole number", float: "a number", str: "a string", list: "an array", dict: "a table"}


class Reader:
    """Collects problems, one line each, while it reads one file."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.problems: list[str] = []
        self.made: dict[str, Any] = {}  # tables and entries that could be read, by key, whether or not what holds them could

    def problem(self, key: str, text: str) -> object:
        """Note a problem at a key."""
        self.problems.append(f"{self.where}: {key}: {text}" if key else f"{self.where}: {text}")
        return _BAD

    def all_parsed(self, kind: type[T]) -> list[tuple[str, T]]:
        """Return what could be read of a kind, with its keys."""
        return [(key, item) for key, item in self.made.items() if isinstance(item, kind)]

    def refuse_unknown(self, value: dict[str, Any], known: Collection[str], key: str = "") -> None:
        """Note each key of a table that is not known."""
        for name in value:
            if name not in known:
                self.problem(join(key, name), f"unknown key; {expected_one_of(name, known)}")

    def table(self, kind: type[Any], value: object, key: str = "", base: object = None) -> Any:
        """Read a table as a dataclass; ``base`` gives the values of keys that are not there. None if that is not possible."""
        if not isinstance(value, dict):
            self.problem(key, f"{_found(value)}; expected a table")
            return None
        known = {field.name: field for field in dataclasses.fields(kind)}
        self.refuse_unknown(value, known, key)
        read: dict[str, Any] = {}
        for name, hint in _hints(kind).items():
            if name in value:
                read[name] = self.value(hint, value[name], join(key, name))
            elif base is not None:
                read[name] = getattr(base, name)
            elif _required(known[name]):
                read[name] = self.problem(join(key, name), f"missing; expected {_describe(hint)}")
        if any(item is _BAD for item in read.values()):
            return None
        self.made[key] = kind(**read)
        return self.made[key]

    def value(self, hint: Any, value: object, key: str) -> Any:
        """Read one value as a type hint says."""
        if typing.get_origin(hint) is typing.Annotated:
            inner, *rules = typing.get_args(hint)
            read = self.value(inner, value, key)
            return read if read is _BAD or not self._breaks(rules, read, key) else _BAD
        origin = typing.get_origin(hint)
        if origin in {types.UnionType, typing.Union}:
            return self._union(typing.get_args(hint), value, key)
        if origin is tuple:
            if not isinstance(value, list):
                return self.problem(key, f"{_found(value)}; expected an array")
            item = typing.get_args(hint)[0]
            items = [self.value(item, each, f"{key}[{index}]") for index, each in enumerate(value)]
            return _BAD if any(each is _BAD for each in items) else tuple(items)
        if hint is EntryPoint:
            return self._entry(value, key)
        if dataclasses.is_dataclass(hint):
            read = self.table(typing.cast("type[Any]", hint), value, key)
            return _BAD if read is None else read
        return self._plain(hint, value, key)

    def _union(self, hints: tuple[Any, ...], value: object, key: str) -> Any:
        options = [hint for hint in hints if hint is not type(None)]
        words = [word for hint in options if typing.get_origin(hint) is typing.Literal for word in typing.get_args(hint)]
        if words:
            options = [hint for hint in options if typing.get_origin(hint) is not typing.Literal]
            if value in words:
                return value
        if len(options) == 1:
            return self.value(options[0], value, key)
        array = next((hint for hint in options if typing.get_origin(hint) is tuple), None)
        if isinstance(value, list) and array is not None:
            return self.value(array, value, key)
        if not isinstance(value, str):
            return self.problem(key, f"{_found(value)}; expected {' or '.join(_describe(hint) for hint in options)}")
        return self.value(EntryPoint, value, key) if EntryPoint in options and ":" in value else value

    def _entry(self, value: object, key: str) -> Any:
        file, _, function = value.rpartition(":") if isinstance(value, str) else ("", "", "")
        if not file.endswith(".py") or not function.isidentifier():
            return self.problem(key, f"{_found(value)} names no code; expected 'file.py:function'")
        self.made[key] = EntryPoint(file, function)
        return self.made[key]

    def _plain(self, hint: Any, value: object, key: str) -> Any:
        if isinstance(value, int) and not -_INT64 <= value < _INT64:  # TOML's own limit, and str() of more digits may fail
            return self.problem(key, f"a number of more than 64 bits; expected {_KINDS[hint]}")
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if type(value) is not hint:
            return self.problem(key, f"{_found(value)}; expected {_KINDS[hint]}")
        if hint is float and not math.isfinite(typing.cast("float", value)):
            return self.problem(key, f"{value}; expected a number")
        return value

    def _breaks(self, rules: list[Any], value: Any, key: str) -> bool:
        for rule in rules:
            if isinstance(rule, Between):
                low, high = rule.low, rule.high
                below = low is not None and (value <= low if rule.above else value < low)
                if below or (high is not None and value > high):
                    self.problem(key, f"{value:g} is out of range; expected {_range(rule)}")
                    return True
            elif isinstance(rule, OneOf) and value not in rule.choices:
                self.problem(key, f"{_found(value)} is not {rule.what}; {expected_one_of(value, rule.choices)}")
                return True
            elif isinstance(rule, Name) and not SAFE_NAME.fullmatch(value):
                allowed = "expected at most 64 letters, digits, '.', '_' and '-', a letter or digit first"
                self.problem(key, f"{_found(value)} cannot name a folder; {allowed}")
                return True
            elif isinstance(rule, NonEmpty) and not value:
                self.problem(key, "is empty; expected at least one item" if isinstance(value, tuple) else "is empty; expected some text")
                return True
        return False


def _hints(kind: type[Any]) -> dict[str, Any]:
    if kind not in _known_hints:
        _known_hints[kind] = typing.get_type_hints(kind, include_extras=True)
    return _known_hints[kind]


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def join(key: str, name: str) -> str:
    """Return the dotted key of a name in a table, quoted where TOML asks for it."""
    name = name if _BARE_KEY.fullmatch(name) else repr(name)
    return f"{key}.{name}" if key else name


def _found(value: object) -> str:
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "an array"
    if isinstance(value, str):
        return repr(value if len(value) <= _LONGEST_SHOWN else f"{value[:_LONGEST_SHOWN]}...")  # repr keeps it on one line
    return str(value).lower() if isinstance(value, bool) else str(value)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Annotated:
        inner, *rules = typing.get_args(hint)
        for rule in rules:
            if isinstance(rule, OneOf):
                return f"one of {', '.join(sorted(rule.choices))}"
            if isinstance(rule, Between) and rule.low == rule.high is not None:
                return _range(rule)
        return _describe(inner)
    if typing.get_origin(hint) is tuple:
        return "an array"
    if typing.get_origin(hint) in {types.UnionType, typing.Union}:
        return " or ".join(_describe(option) for option in typing.get_args(hint) if option is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(f'"{word}"' for word in typing.get_args(hint))
    if hint is EntryPoint:
        return "'file.py:function'"
    return _KINDS.get(hint, "a table")


def _range(rule: Between) -> str:
    if rule.low == rule.high:
        return f"{rule.low:g}"
    if rule.high is None:
        return f"more than {rule.low:g}" if rule.above else f"at least {rule.low:g}"
    return f"a number from {rule.low:g} to {rule.high:g}"


def read_toml(path: Path, what: str, advice: str) -> dict[str, Any]:
    shown = display_path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a byte order mark
    except FileNotFoundError:
        raise RecipeError(f"{shown}: no such {what}; {advice}") from None
    except IsADirectoryError:
        raise RecipeError(f"{shown}: is a folder; expected a {what}, a TOML file") from None
    except OSError as error:
        raise RecipeError(f"{shown}: the {what} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{shown}: is not UTF-8 at byte {error.start}; expected a {what}, a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{shown}: is no TOML: {str(error)[:1].lower()}{str(error)[1:]}") from None
    except RecursionError:
        raise RecipeError(f"{shown}: is no TOML: nested too deeply") from None
    except ValueError:  # int() refuses more than 4300 digits
        raise RecipeError(f"{shown}: is no TOML: a number has too many digits") from None


def display_path(path: Path) -> str:
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except (ValueError, OSError):  # it lies elsewhere, or the current folder is gone
        return str(path)


def check_once(reader: Reader, key: str, items: Sequence[object]) -> None:
    if twice := sorted({str(item) for item in items if items.count(item) > 1}):
        reader.problem(key, f"has {', '.join(twice)} twice; expected each once")
