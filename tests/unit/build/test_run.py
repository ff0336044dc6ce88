# SPDX-License-Identifier: Apache-2.0
"""What a build checks before its first step."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgekd.build import run
from edgekd.errors import RecipeError

EXAMPLE = Path(__file__).parents[3] / "examples" / "digits"


@pytest.fixture
def recipe(tmp_path):
    shutil.copytree(EXAMPLE, tmp_path / "digits", ignore=shutil.ignore_patterns("build", "__pycache__"))
    return tmp_path / "digits" / "edgekd.toml"


def _load(recipe, table):
    recipe.write_text(f"{recipe.read_text()}\n[target.{table}.budget]\nmax_latency_p95_ms = 1.0\n")
    return run.load_plan(recipe, ["host"])


def test_a_table_of_an_unknown_target_is_refused(recipe):
    with pytest.raises(RecipeError) as caught:
        _load(recipe, "rpi5x")
    (problem,) = caught.value.problems
    assert problem.startswith("edgekd.toml: [target.rpi5x]: there is no target of that name, so its budget would not be read")
    assert "did you mean 'rpi5'?" in problem
    assert problem.endswith("expected a name that edgekd targets lists, or a profile rpi5x.toml beside the recipe")


def test_a_table_of_a_known_target_that_is_not_built_is_allowed(recipe):
    assert "rpi5" in _load(recipe, "rpi5").recipe.target


@pytest.mark.parametrize("folder", [".", "targets"])
def test_a_table_of_the_user_s_own_profile_is_allowed(recipe, folder):
    (recipe.parent / folder).mkdir(exist_ok=True)
    shutil.copyfile(EXAMPLE.parents[1] / "targets" / "host.toml", recipe.parent / folder / "mine.toml")
    assert "mine" in _load(recipe, "mine").recipe.target
