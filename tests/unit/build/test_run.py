# SPDX-License-Identifier: Apache-2.0
"""Warnings of a build before its first step."""

from __future__ import annotations

import shutil
from pathlib import Path

from edgekd.build import run

EXAMPLE = Path(__file__).parents[3] / "examples" / "digits"


def _warnings(folder, table):
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("build", "__pycache__"))
    recipe = folder / "edgekd.toml"
    recipe.write_text(f"{recipe.read_text()}\n[target.{table}.budget]\nmax_latency_p95_ms = 1.0\n")
    return run.unknown_target_tables(run.load_plan(recipe, ["host"]))


def test_a_table_of_an_unknown_target_is_reported(tmp_path):
    (line,) = _warnings(tmp_path / "digits", "rpi5x")
    assert line.startswith("[target.rpi5x] ")
    assert "did you mean 'rpi5'?" in line


def test_a_table_of_a_known_target_that_is_not_built_is_not_reported(tmp_path):
    assert _warnings(tmp_path / "digits", "rpi5") == []
