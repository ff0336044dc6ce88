# SPDX-License-Identifier: Apache-2.0
"""Check a document against ``report.schema.json``: the few keywords of JSON Schema that it uses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MAX_NUMBER = 1e300  # a larger one is damage, and cannot be printed
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}


def problems(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield each part of a value that is not as the schema says, with its path."""
    if "$ref" in schema:
        yield from problems(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root, path)
    if "anyOf" in schema and all(any(problems(value, option, root, path)) for option in schema["anyOf"]):
        yield f"{path or 'the document'} is not as expected"
    allowed = [schema["const"]] if "const" in schema else schema.get("enum")
    if allowed is not None and not any(type(value) is type(item) and value == item for item in allowed):
        yield f"{path or 'the document'} is not one of {', '.join(map(str, allowed))}"
    names = schema.get("type", [])
    names = [names] if isinstance(names, str) else names
    if names and not any(_is_of_type(value, name) for name in names):
        yield f"{path or 'the document'} is not of type {' or '.join(names)}"
    elif isinstance(value, dict):
        yield from _object_problems(value, schema, root, path)
    elif isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            yield f"{path} has {len(value)} items"
        for index, item in enumerate(value):
            yield from problems(item, schema.get("items", {}), root, f"{path}[{index}]")


def _object_problems(value: Mapping[str, Any], schema: Mapping[str, Any], root: Mapping[str, Any], path: str) -> Iterator[str]:
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", {})
    prefix = f"{path}." if path else ""
    yield from (f"{prefix}{name} missing" for name in schema.get("required", []) if name not in value)
    for name, item in value.items():
        if name in properties:
            yield from problems(item, properties[name], root, f"{prefix}{name}")
        elif others is False:
            yield f"{prefix}{name} is not known"
        elif isinstance(others, dict):
            yield from problems(item, others, root, f"{prefix}{name}")


def _is_of_type(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, TYPES[name]) and (not isinstance(value, int | float) or abs(value) < MAX_NUMBER)  # neither NaN nor infinite
