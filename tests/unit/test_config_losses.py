# SPDX-License-Identifier: Apache-2.0
"""The losses of a recipe as they are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgekd import config
from edgekd.domain.recipe import LOSSES
from edgekd.errors import RecipeError

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits"


def _losses(folder, kind, options):
    """Read the digits' recipe with one loss, written as TOML."""
    shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("build", "__pycache__"))
    recipe = folder / "edgekd.toml"
    written = ", ".join(f"{name} = {json.dumps(value)}" for name, value in {"kind": kind, **options}.items())
    lines = [f"losses = [{{ {written} }}]" if line.startswith("losses = ") else line for line in recipe.read_text().splitlines()]
    recipe.write_text("\n".join(lines))
    return config.load_recipe(recipe).distill.losses


@pytest.mark.parametrize("kind", LOSSES)
def test_each_kind_of_loss_takes_its_options_and_no_other(tmp_path, kind):
    options = {name: value if isinstance(value, bool) else 0.5 for name, value in LOSSES[kind].items()}
    (loss,) = _losses(tmp_path, kind, options)
    assert (loss.given, loss.options) == (options, options)
    (plain,) = _losses(tmp_path, kind, {})
    assert (plain.given, plain.options) == ({}, LOSSES[kind])
    for name in {"temperature", "standardize", "label_smoothing", "target_weight", "inter_weight"} - options.keys():
        with pytest.raises(RecipeError, match=f"'{kind}' has no {name}; expected one of "):
            _losses(tmp_path, kind, {name: name == "standardize" or 1.0})
