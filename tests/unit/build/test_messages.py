# SPDX-License-Identifier: Apache-2.0
"""Messages between processes: every step of a plan survives, and nothing else than values comes out."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekd.build import messages
from edgekd.build.run import load_plan
from edgekd.domain.artifact import Artifact
from edgekd.ports import Record, StageResult

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("[df]*/*.toml"))  # those that need no fetched weights


@pytest.mark.parametrize("recipe", EXAMPLES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_steps_of_a_plan_survive(recipe):
    for step in load_plan(recipe, ("host",)).steps:
        assert messages.decode(messages.encode(step)) == step


@pytest.mark.parametrize(
    "value",
    [
        StageResult(
            {"accuracy": 0.5, "best": None}, ("warning: a", "b"), Record({"a.py": "1", "b.py": None}, {}, {"X": None}, {"numpy": "2"})
        ),
        (Path("/a b"), Artifact(Path("x"), "0" * 64, 3), b"\x00\xff", [1, (2, [])], {"dict": {"tuple": []}, "": ()}),
        os.fsdecode(b"\xff.npy"),
        float("inf"),
    ],
)
def test_values_survive_with_their_types(value):
    copy = messages.decode(messages.encode(value))
    assert copy == value
    assert repr(copy) == repr(value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
    )
)
def test_any_plain_value_survives(value):
    assert messages.decode(messages.encode(value)) == value


@pytest.mark.parametrize("value", [object(), {1: 2}, {"a": {2, 3}}, os.getcwd])
def test_other_values_are_not_sent(value):
    with pytest.raises(TypeError):
        messages.encode(value)


@pytest.mark.parametrize(
    "message",
    [
        pickle.dumps(os.getcwd),
        b"",
        b"\xff",
        b"{}",
        b'{"tuple": 1}',
        b'{"a": 1, "b": 2}',
        b'{"bytes": "x"}',
        b'{"os:system": {"command": "true"}}',
        b'{"edgekd.errors:RecipeError": {}}',
        b'{"edgekd.build.worker:Worker": {}}',
        b'{"edgekd.missing:Step": {}}',
        b'{"edgekd.ports:Step": {"unknown": 1}}',
        b"[" * 100_000,
        json.dumps({"edgekd.ports:": {}}).encode(),
    ],
)
def test_what_is_no_message_is_refused(message):
    with pytest.raises(messages.MessageError):
        messages.decode(message)
