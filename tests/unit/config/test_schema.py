# SPDX-License-Identifier: Apache-2.0
"""The JSON Schema of recipes and target profiles: it is valid, and it accepts and refuses what the reader does."""

from __future__ import annotations

import copy
import json
import tomllib
from dataclasses import fields
from pathlib import Path

import jsonschema
import pytest

from edgekd import cli, config
from edgekd.config import schema
from edgekd.domain import losses
from edgekd.domain.recipe import Recipe
from edgekd.domain.target import Target
from edgekd.errors import RecipeError

ROOT = Path(__file__).parents[3]
TEMPLATE = ROOT / "edgekd" / "templates" / "edgekd.toml"
RECIPES = [*(path for path in sorted((ROOT / "examples").glob("*/*.toml"))), TEMPLATE]
PROFILES = sorted((ROOT / "targets").glob("*.toml"))
FILES = [*((path, "recipe") for path in RECIPES), *((path, "target") for path in PROFILES)]
VALIDATORS = {name: jsonschema.Draft202012Validator(schema.json_schema(name)) for name in schema.DOCUMENTS}

RECIPE = tomllib.loads((ROOT / "examples" / "digits" / "edgekd.toml").read_text())
HOST = tomllib.loads((ROOT / "targets" / "host.toml").read_text())
# path of a key, and a value that is wrong there
WRONG = {
    "recipe": [
        (("nme",), "x"),
        (("schema",), 2),
        (("name",), "a/b"),
        (("data", "splits"), "data.py"),
        (("data", "splits"), "data.txt:splits"),
        (("data", "max_overlap"), -1),
        (("student", "inputs"), []),
        (("student", "inputs", 0, "shape"), [1, 0]),
        (("student", "inputs", 0, "dtype"), "float64"),
        (("student", "task"), "classes"),
        (("student", "heads"), [1]),
        (("teacher", "train", "label_smoothing"), 1.5),
        (("distill", "epochs"), "30"),
        (("distill", "epochs"), True),
        (("distill", "epochs"), 1.5),
        (("distill", "epoch"), 30),
        (("distill", "learning_rate"), 0),
        (("distill", "baselines"), {"seeds": 1}),
        (("distill", "losses"), []),
        (("distill", "losses", 0, "kind"), "kld"),
        (("distill", "losses", 0, "weight"), 0),
        (("distill", "losses", 0, "weight"), "atuo"),
        (("distill", "losses", 0, "label_smoothing"), 0.1),
        (("distill", "losses", 0, "taps"), [{"student": "0", "teacher": "0"}]),
        (("distill", "losses", 0, "teacher"), "previous"),
        (("distill", "losses", 1, "teacher"), "ema"),
        (("distill", "losses", 1, "temperature"), 2.0),
        (("distill", "losses", 1, "kind"), "hint"),
        (("distill", "teacher_weighting"), "weights"),
        (("quantize",), {"schemes": "all"}),
        (("quantize",), {"schemes": []}),
        (("quantize",), {"runtimes": "litert"}),
        (("evaluate",), {"metric": "top5"}),
        (("budget", "max_accuracy_drop_pp"), 101),
        (("budget", "max_latency_p95_ms"), 0),
        (("target",), {"rpi 4": {}}),
        (("target",), {"rpi4": {"budgets": {}}}),
        (("target",), {"rpi4": {"budget": {"max_size_kb": 1}}}),
    ],
    "target": [
        (("base",), "rpi4"),
        (("title",), ""),
        (("cpu", "cores"), 0),
        (("cpu", "cores"), "all"),
        (("cpu", "features"), "avx2"),
        (("limits", "memory"), 1),
        (("limits", "memory_mib"), 0),
        (("runtimes",), []),
        (("runtimes", 0, "threads"), [0]),
        (("runtimes", 0, "threads"), ["all"]),
        (("schemes",), ["static-int8"]),
        (("device", "kinds"), ["telnet"]),
        (("device", "arch"), "arm64"),
        (("protocol", "min_runs"), "native"),
        (("protocol", "min_seconds"), -1),
    ],
}


def _changed(document, path, value):
    changed = copy.deepcopy(document)
    container = changed
    for key in path[:-1]:
        container = container[key]
    container[path[-1]] = value
    return changed


def test_there_is_a_recipe_or_profile_for_each_file():
    assert (len(RECIPES), len(PROFILES)) == (10, 15)


@pytest.mark.parametrize("name", schema.DOCUMENTS)
def test_the_schema_is_valid_json_schema(name):
    document = json.loads(schema.render(name))
    jsonschema.Draft202012Validator.check_schema(document)
    assert document == schema.json_schema(name)
    assert document["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert document["$id"] == f"urn:edgekd:schema:{name}"


@pytest.mark.parametrize(("path", "name"), FILES, ids=lambda value: str(value).removeprefix(f"{ROOT}/"))
def test_all_files_of_the_repository_are_valid(path, name):
    VALIDATORS[name].validate(tomllib.loads(path.read_text()))


@pytest.mark.parametrize(("path", "name"), FILES, ids=lambda value: str(value).removeprefix(f"{ROOT}/"))
def test_the_first_line_of_a_file_names_its_schema(path, name, tmp_path):
    directive, _, file = path.read_text().splitlines()[0].partition(" ")
    assert directive == "#:schema"
    if path == TEMPLATE:  # edgekd init writes the schema
        assert file == "./edgekd.schema.json"
    else:
        assert (path.parent / file).read_text() == schema.render(name)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Return a function that reads a document as edgekd does, without the detour through TOML."""

    def load_document(name, document):
        monkeypatch.setattr(tomllib, "loads", lambda text: copy.deepcopy(document))
        return config.load_recipe(tmp_path / "it.toml") if name == "recipe" else config.load_target(str(tmp_path / "it.toml"))

    for file in ("it.toml", "data.py", "models.py"):
        (tmp_path / file).touch()
    return load_document


@pytest.mark.parametrize(("name", "document"), [("recipe", RECIPE), ("target", HOST)])
def test_the_unchanged_documents_are_accepted(name, document, load):
    assert load(name, document)
    assert VALIDATORS[name].is_valid(document)


@pytest.mark.parametrize(("name", "path", "value"), [(name, *change) for name, changes in WRONG.items() for change in changes])
def test_the_schema_and_the_reader_refuse_the_same(name, path, value, load):
    document = _changed({"recipe": RECIPE, "target": HOST}[name], path, value)
    assert not VALIDATORS[name].is_valid(document)
    with pytest.raises(RecipeError):
        load(name, document)


@pytest.mark.parametrize("kind", losses.LOSSES)
def test_a_loss_takes_the_options_of_its_kind(kind):
    taps = {"taps": [{"student": "0", "teacher": "1"}]} if kind in losses.TAPPED else {}
    loss = {"kind": kind, "weight": "auto", "epochs": [1, 2], **losses.LOSSES[kind], **taps}
    VALIDATORS["recipe"].validate(_changed(RECIPE, ("distill", "losses"), [loss]))
    for option in {name for options in losses.LOSSES.values() for name in options} - losses.LOSSES[kind].keys():
        value = "heads" if option == "over" else 0.5
        assert not VALIDATORS["recipe"].is_valid(_changed(RECIPE, ("distill", "losses"), [{**loss, option: value}])), option


def _objects(node):
    if isinstance(node, dict):
        if "properties" in node and "additionalProperties" in node:
            yield node
        for value in node.values():
            yield from _objects(value)
    elif isinstance(node, list):
        for value in node:
            yield from _objects(value)


@pytest.mark.parametrize(("name", "kind", "count"), [("recipe", Recipe, 15), ("target", Target, 6)])
def test_every_key_is_described(name, kind, count):
    document = schema.json_schema(name)
    objects = list(_objects(document))
    assert len(objects) == count
    assert list(document["properties"]) == [field.name for field in fields(kind)]
    for item in objects:
        assert item["description"].endswith(".")
        assert item["additionalProperties"] is False
        assert [key for key, value in item["properties"].items() if not value["description"].endswith(".")] == []


def test_defaults_are_those_of_the_dataclasses():
    distill = schema.json_schema("recipe")["$defs"]["Distill"]["properties"]
    assert distill["losses"]["default"] == [{"kind": "kl", "weight": 0.9}, {"kind": "ce", "weight": 0.1}]
    assert (distill["batch_size"]["default"], distill["search_share"]["default"]) == (128, 3.0)
    assert "default" not in distill["epochs"]
    assert "default" not in distill["threads"]


@pytest.mark.parametrize(("arguments", "name"), [([], "recipe"), (["recipe"], "recipe"), (["target"], "target")])
def test_the_command_prints_it(arguments, name, capsys):
    assert cli.run(["schema", *arguments]) == 0
    assert json.loads(capsys.readouterr().out) == schema.json_schema(name)
