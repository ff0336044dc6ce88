# SPDX-License-Identifier: Apache-2.0
"""The same recipe in one process, and in two processes of torchrun."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests import toy

MODELS = """\
from torch import nn
def teacher():
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
def student():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
def normed():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
def broken():
    raise ValueError("no student today")
"""
LOSSES = """
losses = [
  { kind = "kl", temperature = "auto" }, { kind = "ce", weight = 0.5 }, { kind = "dist" }, { kind = "mse", teacher = "ema" },
  { kind = "hint", taps = [{ student = "0", teacher = "0" }] },
]
search_share = 2.0
batch_size = 7
precision = "float32"
"""
RECIPE = toy.RECIPE.replace("[distill]\nepochs = 1", f"[distill]\nepochs = 4{LOSSES}").replace(
    "[teacher.train]", '[teacher.train]\nprecision = "float32"'
)


def build_arguments(folder, torchrun=(), student="student", epochs=4):
    """Return the arguments of a process that builds a recipe until its student is distilled."""
    folder.mkdir(exist_ok=True)
    text = RECIPE.replace("models.py:student", f"models.py:{student}").replace("epochs = 4", f"epochs = {epochs}")
    for name, content in {"edgekd.toml": text, "models.py": MODELS, "data.py": toy.DATA}.items():
        (folder / name).write_text(content)
    options = ["-r", "edgekd.toml", "--until", "distill", "--inconclusive-ok", "--out", f"out{len(torchrun)}"]
    environment = {**os.environ, "EDGEKD_CACHE": str(folder / "cache")}
    return {"args": [sys.executable, *torchrun, "-m", "edgekd", "build", *options], "cwd": folder, "env": environment}


def build(folder, torchrun=(), **changes):
    """Build; return the process and the epochs of the curve, None if it wrote none."""
    run = subprocess.run(**build_arguments(folder, torchrun, **changes), capture_output=True, text=True, timeout=300, check=False)
    curve = folder / f"out{len(torchrun)}" / "until-distill" / "curve.json"
    return run, json.loads(curve.read_text())["epochs"] if curve.is_file() else None


@pytest.fixture
def torchrun():
    """Return the arguments that start a module in two processes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    return ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]


def test_two_ranks_train_what_one_process_trains(tmp_path, torchrun):
    single, expected = build(tmp_path / "x")
    assert single.returncode == 0, single.stderr
    distributed, curve = build(tmp_path / "x", torchrun)
    assert distributed.returncode == 0, distributed.stderr
    assert "params.settings.ranks 1 -> 2" in distributed.stderr
    assert len(curve) == len(expected) == 4
    for expected_epoch, epoch in zip(expected, curve, strict=True):
        for name in ("train_loss", "validation_loss"):
            assert expected_epoch[name] == pytest.approx(epoch[name], abs=1e-3)
    chosen = [json.loads(path.read_text()) for path in (tmp_path / "x").glob("out*/until-distill/search/chosen.json")]
    assert len(chosen) == 2
    assert chosen[0] == chosen[1]
    assert not list((tmp_path / "x/cache/work").iterdir())


def test_batch_norm_is_warned_of_and_a_user_s_mistake_ends_all_ranks(tmp_path, torchrun):
    normed, curve = build(tmp_path / "x", torchrun, student="normed")
    assert normed.returncode == 0, normed.stderr
    assert curve is not None
    assert "warning: 2 ranks train a module with batch norm: its statistics are those of about 3 of the 7 samples" in normed.stderr
    broken, curve = build(tmp_path / "y", torchrun, student="broken")
    assert broken.returncode == 1  # torchrun has no other exit code
    assert "broken() raised ValueError: no student today" in broken.stderr
    assert curve is None


@pytest.mark.long
def test_ranks_that_were_killed_resume_together(tmp_path, torchrun):
    undisturbed, _ = build(tmp_path / "x", torchrun, epochs=24)
    assert undisturbed.returncode == 0, undisturbed.stderr
    process = subprocess.Popen(**build_arguments(tmp_path / "y", torchrun, epochs=24), start_new_session=True, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "y/cache").glob("work/*/checkpoint")) and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    resumed, _ = build(tmp_path / "y", torchrun, epochs=24)
    assert resumed.returncode == 0, resumed.stderr
    assert not list((tmp_path / "y/cache/work").iterdir())
    students = [sorted((tmp_path / name).glob("out*/until-distill/student.safetensors")) for name in "xy"]
    assert students[0][0].read_bytes() == students[1][0].read_bytes()
