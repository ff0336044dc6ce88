# SPDX-License-Identifier: Apache-2.0
"""What a build says before it begins."""

from __future__ import annotations

import shutil
from pathlib import Path

from edgekd.build import run, pipeline
from edgekd import config
from edgekd.plan import resolve

EXAMPLE = Path(__file__).parents[3] / "examples" / "digits"


def _told(folder, table):
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("build", "__pycache__"))
    recipe = folder / "edgekd.toml"
    recipe.write_text(f"{recipe.read_text()}\n[target.{table}.budget]\nmax_latency_p95_ms = 1.0\n")
    plan = resolve(config.load_recipe(recipe), [config.load_target("host")], pipeline.PIPELINE)
    return run.misspelt_targets(plan)


def test_a_table_of_no_target_is_told(tmp_path):
    (line,) = _told(tmp_path / "digits", "rpi5x")
    assert line.startswith("[target.rpi5x] ")
    assert "did you mean 'rpi5'?" in line


def test_a_table_of_a_target_that_is_not_built_is_silent(tmp_path):
    assert _told(tmp_path / "digits", "rpi5") == []
