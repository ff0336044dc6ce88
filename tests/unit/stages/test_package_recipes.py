# SPDX-License-Identifier: Apache-2.0
"""An output folder belongs to one recipe, and files of others in it stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgekd.errors import UsageError
from edgekd.report import document
from edgekd.stages import package
from tests import outputs

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="module")
def report():
    return json.loads((GOLDEN / "report_pass.json").read_text())


def test_the_folder_of_another_recipe_is_refused(tmp_path, report):
    out = tmp_path / "build" / "host"
    recipes = [tmp_path / name for name in ("edgekd.toml", "b.toml")]
    for recipe in recipes:
        recipe.write_text("")
    package.check_recipe(out, recipes[0], "keywords")  # nothing there yet
    outputs.ship(out, report)
    package.check_recipe(out, recipes[0], "keywords")
    package.check_recipe(out, recipes[0], "renamed")
    with pytest.raises(UsageError, match=r"holds the output of another recipe, 'edgekd.toml' \(recipe 'keywords'\); name another"):
        package.check_recipe(out, recipes[1], "keywords")
    (out / "report.json").unlink()  # the manifest says it too
    with pytest.raises(UsageError, match="holds the output of another recipe"):
        package.check_recipe(out, recipes[1], "keywords")
    recipes[0].rename(tmp_path / "c.toml")
    package.check_recipe(out, tmp_path / "c.toml", "keywords")  # the recipe's file was renamed


def test_recipes_of_other_folders_are_distinguished_in_a_common_output_folder(tmp_path, report):
    recipes = [tmp_path / name / "edgekd.toml" for name in ("a", "b")]
    for recipe in recipes:
        recipe.parent.mkdir()
        recipe.write_text("")
    out = tmp_path / "out" / "host"
    owner = document.recipe_file(recipes[0], out)
    assert set(owner) == {"name", "folder"}
    assert len(owner["folder"]) == 4  # no folder of the user
    outputs.ship(out, {**report, "recipe_file": owner})
    package.check_recipe(out, recipes[0], "renamed")
    package.check_recipe(out, recipes[1], "keywords")  # the same recipe in another checkout
    with pytest.raises(UsageError, match="holds the output of another recipe"):
        package.check_recipe(out, recipes[1], "other")


@pytest.mark.parametrize("name", ["toy.onnx", "toy.tflite"])
def test_a_model_of_others_is_not_overwritten(tmp_path, report, name):
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(UsageError, match="is no output of edgekd, and would be replaced; rename it, or name another output with --out"):
        package.check_recipe(tmp_path, tmp_path / "edgekd.toml", "toy")


@pytest.mark.parametrize("name", ["report.json", "report.md", "manifest.json", "edgekd.stamp", "toy.onnx"])
def test_a_folder_in_the_place_of_an_output_is_refused_before_the_build(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match="is a folder, in the place of an output"):
        package.check_recipe(tmp_path, tmp_path / "edgekd.toml", "toy")
