# SPDX-License-Identifier: Apache-2.0
"""Any document is read or refused with messages; nothing else is raised, and what is read is valid under the JSON Schema."""

from __future__ import annotations

import copy
import dataclasses
import json
import os

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekd import config
from edgekd.config import reader, schema
from edgekd.errors import RecipeError
from tests.unit.config.documents import FACTS, NATIVE, RECIPE, TARGET, write_toml


def _paths(value, prefix=()):
    """Return the path of each value of a document, tables and arrays included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix, *(path for key, item in items for path in _paths(item, (*prefix, key)))]


FULL = {
    **RECIPE,
    "distill": {"epochs": 3, "losses": [{"kind": "kl", "temperature": 2.0}], "threads": 1},
    "quantize": {"schemes": ["float32"], "runtimes": ["litert"], "io": "float32"},
    "evaluate": {"metric": "top1"},
    "budget": {"max_size_kib": 1},
    "target": {"rpi4": {"budget": {"max_size_kib": 2}, "quantize": {"io": "float32"}}},
}
SCHEMAS = {name: jsonschema.Draft202012Validator(schema.json_schema(name)) for name in schema.DOCUMENTS}
SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.sampled_from(["native", "auto", "data.py:splits", "a.py:b", "float32", "", "\0", "../x"]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab.\n", max_size=2), inner, max_size=2), max_leaves=4
)


@pytest.mark.parametrize(
    ("name", "document", "load"),
    [("recipe", FULL, config.load_recipe), ("target", {**TARGET, **NATIVE}, lambda path: config.load_target(str(path), FACTS))],
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_document_is_read_or_refused(tmp_path, name, document, load, data):
    changed = copy.deepcopy(document)
    for _ in range(data.draw(st.integers(1, 3))):
        *steps, last = data.draw(st.sampled_from([path for path in _paths(changed) if path]))
        container = changed
        for step in steps:
            container = container[step]
        container[last] = data.draw(VALUES)
    try:
        result = load(write_toml(tmp_path, changed))
    except RecipeError as error:
        assert min(len(problem.splitlines()) == 1 < problem.count(": ") for problem in error.problems)  # noqa: PT017  (or it is read)
    else:
        assert json.dumps(dataclasses.asdict(result), allow_nan=False)
        SCHEMAS[name].validate(changed)


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "edgekd.toml")
    with pytest.raises(RecipeError, match="is not a regular file; expected a recipe, a TOML file"):
        reader.read_toml(tmp_path / "edgekd.toml", "recipe", "")
