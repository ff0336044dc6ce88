# SPDX-License-Identifier: Apache-2.0
"""What the command line costs: nothing heavy is imported before a stage needs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {
    "ai_edge_litert",
    "ai_edge_quantizer",
    "importlib.metadata",
    "jax",
    "litert_torch",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "onnxsim",
    "rich",
    "safetensors",
    "scipy",
    "torch",
}


def _imported(program):
    """Return which heavy modules a program leaves behind, in a process of its own."""
    tail = f"; import sys; sys.stderr.write('\\n' + ' '.join(sorted(set(sys.modules) & set({sorted(HEAVY)!r}))))"
    done = subprocess.run([sys.executable, "-c", program + tail], capture_output=True, text=True, check=True)
    return done.stderr.rsplit("\n", 1)[1].split()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["targets"], ["schema"], ["build", "--help"], ["report", "--help"]])
def test_light_commands_import_nothing_heavy(arguments):
    assert _imported(f"from edgekd import cli; assert cli.run({arguments!r}) == 0") == []


@pytest.mark.parametrize(
    "module",
    ["api", "build.run", "build.pipeline", "build.judge", "plan", "config", "store.cache", "usercode", "stats.intervals", "harness.runner"],
)
def test_modules_import_nothing_heavy(module):
    assert _imported(f"import edgekd.{module}") == []


def test_the_check_sees_a_heavy_import():
    assert _imported("import numpy") == ["numpy"]
