# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from edgekd.domain.artifact import Artifact
from edgekd.kd.training import autotune
from edgekd.kd.training.execution import AutotuneParams, ExecutionMode, read_execution_mode

BFLOAT16 = ExecutionMode("bfloat16")
LINEAR = "from torch import nn\ndef student():\n    return nn.Linear(4, 3)\n"
WITHOUT_BFLOAT16 = """\
import torch
from torch import nn
class Picky(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        if y.dtype == torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        return y
def student():
    return Picky(4, 3)
"""


@pytest.fixture(autouse=True)
def _forget_user_module():
    yield
    sys.modules.pop("autotune_user", None)


def choose(folder, code, *others):
    (folder / "autotune_user.py").write_text(code)
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32))
    context = SimpleNamespace(recipe_dir=folder, out=folder, work=folder, progress=lambda *_: None)
    params = AutotuneParams((ExecutionMode(), *others), "autotune_user.py:student", 8, "sgd", 1, "x")
    result = autotune.choose_execution_mode("distill", params, {"train.inputs.0": Artifact(folder / "x.npy", "", 0)}, context)
    return read_execution_mode(Artifact(folder / "execution_mode.json", "", 0)), result


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([[3.0] * 9, [2.0] * 9], 1),
        ([[3.0] * 9, [2.0] * 8 + [9.0]], 1),
        ([[3.0] * 9, [2.0] * 7 + [3.0] * 2], 0),
        ([[3.0] * 9, [2.0] * 9, [1.9] * 9], 1),
        ([[3.0] * 9, [2.9] * 9, [2.0] * 9], 2),
        ([[3.0] * 9], 0),
    ],
)
def test_a_mode_is_chosen_if_it_is_faster_by_enough_in_all_rounds_but_one(seconds, expected):
    modes = [ExecutionMode(), BFLOAT16, ExecutionMode(accelerator="cuda")]
    assert autotune.fastest(dict(zip(modes, seconds, strict=False))) == modes[expected]


def test_modes_are_timed_interleaved_and_the_choice_is_written(tmp_path, monkeypatch):
    _, result = choose(tmp_path, LINEAR, BFLOAT16, ExecutionMode(accelerator="cpu:0", accelerator_name="it"))
    assert set(result.metrics["speeds"]) == {"bfloat16", "float32 on cpu:0 (it)"}
    assert min(result.metrics["speeds"].values()) > 0
    (note,) = result.notes
    assert note.startswith("autotune_user.py:student: bfloat16 is ")
    assert " times as fast as float32; it is trained in " in note
    for speedup, expected in ((2.0, BFLOAT16), (0.9, ExecutionMode())):
        monkeypatch.setattr(
            autotune,
            "time_interleaved",
            lambda runners, speedup=speedup: {mode: [1 / (speedup if mode == BFLOAT16 else 1)] * 9 for mode in runners},
        )
        assert choose(tmp_path, LINEAR, BFLOAT16)[0] == expected


@pytest.mark.parametrize(
    ("code", "mode", "why"),
    [
        (WITHOUT_BFLOAT16, BFLOAT16, "not implemented for 'BFloat16'"),
        (LINEAR, ExecutionMode(accelerator="cuda", accelerator_name="T1"), "CUDA|NVIDIA"),
    ],
)
def test_a_mode_that_fails_is_left_out_with_a_warning(tmp_path, code, mode, why):
    if mode.accelerator == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    chosen, result = choose(tmp_path, code, mode)
    assert (chosen, result.metrics["speeds"]) == (ExecutionMode(), {})
    (note,) = result.notes
    assert note.startswith(f"warning: autotune_user.py:student is not trained in {mode}, which fails: ")
    assert any(part in note for part in why.split("|"))
