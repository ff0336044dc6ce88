# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import re
import tomllib
from dataclasses import fields

import jsonschema
import pytest

from edgekd import config, scaffold
from edgekd.domain import budget, recipe, scheme
from edgekd.errors import UsageError


def test_the_written_recipe_loads(tmp_path):
    assert [path.name for path in scaffold.write(tmp_path / "new")] == ["edgekd.toml", "data.py", "models.py", "edgekd.schema.json"]
    assert config.load_recipe(tmp_path / "new" / "edgekd.toml").name == "shapes"


def test_the_schema_of_the_recipe_is_beside_it(tmp_path):
    recipe_path = scaffold.write(tmp_path)[0]
    directive = recipe_path.read_text().splitlines()[0]
    assert directive == f"#:schema ./{scaffold.SCHEMA}"
    validator = jsonschema.Draft202012Validator(json.loads((tmp_path / scaffold.SCHEMA).read_text()))
    validator.validate(tomllib.loads(recipe_path.read_text()))


def test_existing_files_are_not_changed(tmp_path):
    (tmp_path / "models.py").write_text("mine")
    with pytest.raises(UsageError, match=r"has models\.py already, and init overwrites nothing"):
        scaffold.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["models.py"]
    assert (tmp_path / "models.py").read_text() == "mine"


def test_a_dangling_link_is_not_replaced(tmp_path):
    (tmp_path / "data.py").symlink_to(tmp_path / "missing.py")
    with pytest.raises(UsageError, match=r"has data\.py already"):
        scaffold.write(tmp_path)


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        scaffold.write(tmp_path / "file")


@pytest.mark.parametrize(
    "table", [budget.Budget, scheme.Quantize, recipe.Evaluate, recipe.Training, recipe.Distill, recipe.Teacher, recipe.Data]
)
def test_the_template_has_every_key(table):
    text = (scaffold.TEMPLATES / "edgekd.toml").read_text()
    assert [field.name for field in fields(table) if not re.search(rf"\b{field.name}\b", text)] == []


def test_the_defaults_in_the_template_are_correct(tmp_path):
    text = (scaffold.TEMPLATES / "edgekd.toml").read_text()
    defaults = dict(
        re.findall(r"^# (label_smoothing|weight_decay|seed|max_float_ops|max_overlap|learning_rate) = (\S+)", text, re.MULTILINE)
    )
    assert float(defaults["label_smoothing"]) == recipe.Training(1).label_smoothing
    assert float(defaults["weight_decay"]) == recipe.Training(1).weight_decay
    assert float(defaults["learning_rate"]) == recipe.Training(1).learning_rate
    assert int(defaults["max_float_ops"]) == scheme.Quantize().max_float_ops
    assert int(defaults["max_overlap"]) == recipe.Data(recipe.EntryPoint("d.py", "s")).max_overlap
