# SPDX-License-Identifier: Apache-2.0
"""A small recipe and a small target profile, and functions that write and load them."""

from __future__ import annotations

import json

import pytest

from edgekd.errors import RecipeError

RECIPE = {
    "schema": 1,
    "name": "toy",
    "data": {"splits": "data.py:splits"},
    "teacher": {"model": "models.py:teacher", "weights": "teacher.safetensors"},
    "student": {"model": "models.py:student", "inputs": [{"name": "image", "shape": [1, 8, 8]}]},
    "distill": {"epochs": 3},
}
TARGET = {
    "schema": 1,
    "name": "board",
    "title": "A board",
    "cpu": {"isa": "x86-64-v3", "core": "any", "cores": 4, "mhz": 1800, "features": ["avx2"], "lacks": ["avx512f"]},
    "limits": {"memory_mib": 64, "storage_mib": 32},
    "runtimes": [{"name": "litert", "package": "ai-edge-litert", "threads": [1, 4]}],
    "schemes": ["float32"],
    "device": {"kinds": ["local", "ssh"], "arch": "x86_64"},
    "protocol": {"warmup_runs": 1, "min_runs": 300, "min_seconds": 2},
}
FACTS = {
    "arch": "x86_64",
    "core": "GenuineIntel-6-85",
    "features": ["avx2", "fma"],
    "instruction_set": "x86-64-v3",
    "cores": 8,
    "mhz": 2600,
    "memory_bytes": 4 * 2**30 + 1,
    "storage_bytes": 10 * 2**30,
}
NATIVE = {
    "cpu": {"isa": "native", "core": "native", "cores": "native", "mhz": "native", "features": "native"},
    "limits": {"memory_mib": "native", "storage_mib": "native"},
    "device": {"kinds": ["local"], "arch": "native"},
}


def _toml(value):
    """Write a value as TOML; a table inline."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return str(value) if isinstance(value, float) else json.dumps(value)


def write_toml(folder, document, name="it.toml"):
    """Write a document, and the files that it names, into a folder; return its path."""
    for file in ("data.py", "models.py", "teacher.safetensors", "teacher.onnx"):
        (folder / file).touch()
    path = folder / name
    path.write_text("\n".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in document.items()))
    return path


def problems_of(load, *arguments, **changes):
    """Return the problems that loading reports."""
    with pytest.raises(RecipeError) as caught:
        load(*arguments, **changes)
    return caught.value.problems
