# SPDX-License-Identifier: Apache-2.0
"""JSON Schema (draft 2020-12) of recipes and target profiles, from the dataclasses and rules that the reader uses; for editors.

It covers keys, types, ranges, and the options of each kind of loss. The reader also checks what spans several fields.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from edgekd.config.profiles import NATIVE
from edgekd.config.reader import SAFE_NAME, is_required, literals, type_hints
from edgekd.domain.losses import FROZEN, LABEL_LOSSES, LOSSES, TAPPED, Loss
from edgekd.domain.recipe import EntryPoint, Recipe
from edgekd.domain.rules import Between, Name, NonEmpty, OneOf, OrNative
from edgekd.domain.target import Target

DOCUMENTS = {"recipe": Recipe, "target": Target}
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}
_ENTRY_POINT = {"type": "string", "pattern": r"\.py:[^\W\d]\w*$"}
_NAME_PATTERN = f"^{SAFE_NAME.pattern}$"


def json_schema(document: str) -> dict[str, Any]:
    """Return the schema of a ``recipe`` or a ``target`` profile."""
    definitions: dict[str, Any] = {}
    root = _object(DOCUMENTS[document], definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:edgekd:schema:{document}",
        "title": f"edgekd {document}",
        **root,
        "$defs": dict(sorted(definitions.items())),
    }


def render(document: str) -> str:
    """Return the schema as JSON text."""
    return json.dumps(json_schema(document), indent=1) + "\n"


def _object(kind: type[Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a dataclass; classes that it uses become definitions."""
    descriptions = _descriptions(kind)
    hints, fields = type_hints(kind), dataclasses.fields(kind)
    properties = {}
    for field in fields:
        schema = {**_value(hints[field.name], definitions), "description": descriptions.get(field.name, "")}
        if field.default is not dataclasses.MISSING and field.default is not None:
            schema["default"] = _plain(field.default)
        properties[field.name] = schema
    required = [field.name for field in fields if is_required(field)]
    return {
        "description": _summary(kind),
        "type": "object",
        "properties": properties,
        **({"required": required} if required else {}),
        "additionalProperties": False,
        **({"allOf": [_loss_options(loss) for loss in LOSSES]} if kind is Loss else {}),
    }


def _value(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a type hint."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        schema = _value(arguments[0], definitions)
        for rule in arguments[1:]:
            schema = _with_rule(schema, rule)
        return schema
    if origin in {types.UnionType, typing.Union}:
        words = literals(hint)
        (option,) = (item for item in arguments if item is not type(None) and typing.get_origin(item) is not typing.Literal)
        schema = _value(option, definitions)
        return {"anyOf": [{"enum": words}, schema]} if words else schema
    if origin is tuple:
        return {"type": "array", "items": _value(arguments[0], definitions)}
    if origin is Mapping:
        items = _value(arguments[1], definitions)
        return {"type": "object", "propertyNames": {"pattern": _NAME_PATTERN}, "additionalProperties": items}
    if hint is EntryPoint:
        return {**_ENTRY_POINT}
    if hint in _TYPES:
        return {"type": _TYPES[hint]}
    if hint.__name__ not in definitions:
        definitions[hint.__name__] = _object(hint, definitions)
    return {"$ref": f"#/$defs/{hint.__name__}"}


def _with_rule(schema: dict[str, Any], rule: object) -> dict[str, Any]:
    """Return a schema with a rule of ``Annotated`` added."""
    if isinstance(rule, OneOf):
        return {"enum": sorted(rule.choices)}
    if isinstance(rule, OrNative):
        return {"anyOf": [{"const": NATIVE}, schema]}
    keywords: dict[str, Any] = {}
    if isinstance(rule, Between):
        if rule.low == rule.high:
            return {"const": rule.low}
        bounds = {"exclusiveMinimum" if rule.above else "minimum": rule.low, "maximum": rule.high}
        keywords = {name: bound for name, bound in bounds.items() if bound is not None}
    elif isinstance(rule, Name):
        keywords = {"pattern": _NAME_PATTERN}
    elif isinstance(rule, NonEmpty):
        keywords = {"minItems" if schema["type"] == "array" else "minLength": 1}
    return {**schema, **keywords}


def _loss_options(kind: str) -> dict[str, Any]:
    """Return which keys a loss of a kind has, with the defaults of that kind."""
    names = ["kind", "weight", "epochs", "taps", "teacher", *LOSSES[kind]]
    properties: dict[str, Any] = {name: {"default": value} for name, value in LOSSES[kind].items()}
    properties["taps"] = {"minItems": 1} if kind in TAPPED else {"maxItems": 0}
    if kind in (*TAPPED, *LABEL_LOSSES):
        properties["teacher"] = {"const": FROZEN}
    required = {"required": ["taps"]} if kind in TAPPED else {}
    return {
        "if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]},
        "then": {"propertyNames": {"enum": names}, "properties": properties, **required},
    }


def _plain(value: Any) -> Any:
    """Return a default as JSON; for a dataclass, only what differs from the defaults of its fields."""
    if dataclasses.is_dataclass(value):
        values = {field.name: (getattr(value, field.name), field.default) for field in dataclasses.fields(value)}
        return {name: _plain(item) for name, (item, default) in values.items() if item != default}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _summary(kind: type[Any]) -> str:
    """Return the docstring of a class up to its attributes, as one line without markup."""
    return _text(inspect.cleandoc(kind.__doc__ or "").partition("\nAttributes:")[0])


def _descriptions(kind: type[Any]) -> dict[str, str]:
    """Return what the docstrings of a class and of its bases say about each attribute."""
    descriptions = {}
    for base in reversed(kind.__mro__):
        attributes = inspect.cleandoc(base.__doc__ or "").partition("\nAttributes:\n")[2]
        for name, text in re.findall(r"^    (\w+): (.+(?:\n     .+)*)", attributes, re.MULTILINE):
            descriptions[name] = _text(text)
    return descriptions


def _text(markup: str) -> str:
    return " ".join(markup.replace("``", "").split())
