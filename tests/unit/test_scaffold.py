# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from dataclasses import fields

import pytest

from edgekd import config, scaffold
from edgekd.domain import recipe
from edgekd.errors import UsageError


def test_the_written_recipe_loads(tmp_path):
    assert [path.name for path in scaffold.write(tmp_path / "new")] == ["edgekd.toml", "data.py", "models.py"]
    assert config.load_recipe(tmp_path / "new" / "edgekd.toml").name == "shapes"


def test_nothing_that_is_there_is_touched(tmp_path):
    (tmp_path / "models.py").write_text("mine")
    with pytest.raises(UsageError, match=r"has models\.py already, and init overwrites nothing"):
        scaffold.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["models.py"]
    assert (tmp_path / "models.py").read_text() == "mine"


def test_a_link_that_leads_nowhere_is_not_replaced(tmp_path):
    (tmp_path / "data.py").symlink_to(tmp_path / "gone.py")
    with pytest.raises(UsageError, match=r"has data\.py already"):
        scaffold.write(tmp_path)


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        scaffold.write(tmp_path / "file")


@pytest.mark.parametrize(
    "table", [recipe.Budget, recipe.Quantize, recipe.Evaluate, recipe.Training, recipe.Distill, recipe.Teacher, recipe.Data]
)
def test_every_key_of_a_recipe_is_told(table):
    text = (scaffold.TEMPLATES / "edgekd.toml").read_text()
    assert [field.name for field in fields(table) if not re.search(rf"\b{field.name}\b", text)] == []


def test_every_default_that_is_told_is_the_default(tmp_path):
    text = (scaffold.TEMPLATES / "edgekd.toml").read_text()
    told = dict(re.findall(r"^# (label_smoothing|weight_decay|seed|max_float_ops|max_overlap|learning_rate) = (\S+)", text, re.MULTILINE))
    assert float(told["label_smoothing"]) == recipe.Training(1).label_smoothing
    assert float(told["weight_decay"]) == recipe.Training(1).weight_decay
    assert float(told["learning_rate"]) == recipe.Training(1).learning_rate
    assert int(told["max_float_ops"]) == recipe.Quantize().max_float_ops
    assert int(told["max_overlap"]) == recipe.Data(recipe.EntryPoint("d.py", "s")).max_overlap
