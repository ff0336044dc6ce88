# SPDX-License-Identifier: Apache-2.0
"""A student that one runtime refuses: the other ships, and a recipe that names the refusing one is an error before training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests import toy

MODELS = """
class Spectrum(nn.Module):  # LiteRT has no complex numbers
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
    def forward(self, x):
        return self.linear(torch.fft.fft(x).abs())
def student():
    return Spectrum()
"""
DATA = toy.DATA.replace("torch.arange(60) % 3\n", "None\n    y = x[:, :3].argmax(1)\n")  # which a network can learn
RECIPE = toy.RECIPE.replace("epochs = 1", "epochs = 30")
HOST = (Path(__file__).parents[2] / "targets" / "host.toml").read_text()
PROTOCOL = HOST.replace("min_runs = 300, min_seconds = 2", "min_runs = 10, min_seconds = 0").replace(', "static_wi8_ai8"', "")


def _build(folder, quantize=""):
    files = {"edgekd.toml": RECIPE + quantize, "models.py": toy.MODELS + MODELS, "data.py": DATA, "host.toml": PROTOCOL}
    for name, content in files.items():
        (folder / name).write_text(content)
    environment = {**os.environ, "EDGEKD_CACHE": str(folder / "cache"), "EDGEKD_LOCK_DIR": str(folder)}
    command = [sys.executable, "-m", "edgekd", "build", "--target", "host.toml", "--json"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_runtime_that_refuses_the_student_is_left_out_before_training_and_the_other_ships(tmp_path):
    process = _build(tmp_path)
    assert process.returncode == 0, process.stderr
    (report,) = json.loads(process.stdout)
    assert report["shipped"] == "toy.onnx"
    reasons = {row["id"]: row["why_not"] for row in report["left_out"]}
    assert list(reasons) == ["export/student/litert", "quantize/litert/dynamic_wi8_afp32/ptq"]
    assert all(reason.startswith("with fresh weights, ") and "complex" in reason for reason in reasons.values())
    assert all("litert/" not in row["id"] for row in report["candidates"])
    lines = process.stderr.splitlines()
    (warning,) = [number for number, line in enumerate(lines) if line.startswith("warning: export/dry_run/litert is left out")]
    assert warning < next(number for number, line in enumerate(lines) if line.startswith("teach"))
    assert not any(line.startswith("export/student/litert") for line in lines)

    named = _build(tmp_path, '[quantize]\nruntimes = ["litert"]\n')
    assert named.returncode == 2
    assert "quantize.runtimes: 'litert' cannot be had" in named.stderr
    assert "distill: done" not in named.stderr
