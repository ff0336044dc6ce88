# SPDX-License-Identifier: Apache-2.0
"""Data and user code at the level of the stage: what ends the child, what only the whole run can check, and what is allowed.

Invalid splits and models one by one: ``tests/unit/stages/test_inspect_*.py`` and ``test_bad_code.py``.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from edgekd import config
from edgekd.errors import RecipeError
from edgekd.ports import Context
from edgekd.stages import inspect
from tests import toy
from tests.processes import run_step

RECIPE = toy.RECIPE.replace("[teacher.train]\nepochs = 1\n", '[teacher.train]\nepochs = 1\naugment = "data.py:augment"\n')
TRAINED_ELSEWHERE = RECIPE.replace('[teacher.train]\nepochs = 1\naugment = "data.py:augment"\n', 'weights = "teacher.safetensors"\n')
DATA = (
    toy.DATA
    + """\
def augment(x, generator):
    return x + torch.rand(x.shape, generator=generator)
def score(outputs, labels):
    return (outputs.argmax(1) == labels).astype(float)
def metric(outputs, labels):
    return float((outputs.argmax(1) == labels).mean())
"""
)
START, RETURN = "    generator =", "    return splits\n"


def _inspect(folder, data=DATA, models=toy.MODELS, recipe=RECIPE):
    for name, text in (("data.py", data), ("models.py", models), ("edgekd.toml", recipe)):
        (folder / name).write_text(text)
    for name in ("out", "work"):
        (folder / name).mkdir()
    step = inspect.steps(config.load_recipe(folder / "edgekd.toml"), [])[0]
    return run_step(step, Context(folder, folder / "out", folder / "work", lambda share, text: None))


BAD = {
    "crashes": (
        {"data": DATA.replace(START, f"    import ctypes; ctypes.string_at(0)\n{START}")},
        "data.py:splits: the process was ended by signal SIGSEGV at data.py:4 while this ran",
    ),
    "crashes in the student": (
        {"models": toy.MODELS + "    return 1\ndef student():\n    import ctypes\n    ctypes.string_at(0)\n"},
        "models.py:student: the process was ended by signal SIGSEGV at models.py:10 while this ran",
    ),
    "prints and ends": (
        {"data": DATA.replace(START, f"    print('one\\ntwo'); import os; os._exit(0)\n{START}")},
        "data.py:splits: the process ended with exit code 0 while this ran; its last output: one | two",
    ),
    "closes all files": (
        {"data": DATA.replace(START, f"    import os; os.closerange(3, 100); os._exit(4)\n{START}")},
        "data.py:splits: the process ended with exit code 4 while this ran",
    ),
    "leaves a process behind": (
        {"data": DATA.replace(START, f"    import os, time\n    if os.fork() == 0: time.sleep(2); os._exit(0)\n    os._exit(5)\n{START}")},
        "data.py:splits: the process ended with exit code 5 while this ran",
    ),
    "reads a file that changes": (
        {
            "data": DATA.replace(
                START,
                f"    import subprocess\n    open('notes.txt').read()\n    subprocess.run(['cp', 'data.py', 'notes.txt'])\n{START}",
            )
        },
        "notes.txt: changed while it was read; build again",
    ),
    "has three splits wrong": (
        {
            "data": DATA.replace(
                RETURN, f"    for name in ('train', 'validation', 'evaluation'): splits[name] = TensorDataset(x, y + 0.5)\n{RETURN}"
            )
        },
        "\n".join(
            f"data.py:splits: {name}: labels are float32; expected one whole number per sample, its class id"
            for name in ("train", "validation", "evaluation")
        ),
    ),
    "has labels for more classes": (
        {"data": DATA.replace("% 3", "% 5")},
        "\n".join(
            f"data.py:splits: {name}: has the label 4, but teacher and student have 3 classes (0 to 2); {count} of {total} labels are above"
            for name, count, total in (("train", 12, 30), ("validation", 4, 10), ("evaluation", 8, 20))
        ),
    ),
    "has one output": (
        {"models": toy.MODELS.replace("(4, 3)", "(4, 1)")},
        "models.py:student and models.py:teacher: teacher and student have one output; top-1 needs one for each class, at least two",
    ),
    "scores in percent": (
        {"recipe": RECIPE + '[evaluate]\nscore = "data.py:score"\n', "data": DATA.replace("labels).astype(float)", "labels) * 100.0")},
        "data.py:score: returned ndarray of shape [20] for 20 samples; expected 20 scores from 0 to 1",
    ),
    "has a metric without a value": (
        {"recipe": RECIPE + '[evaluate]\nmetric = "data.py:metric"\n', "data": DATA.replace("return float(", "(")},
        "data.py:metric: returned NoneType None; expected one finite number for the whole set, at most 1 (0.93, not 93)",
    ),
    "augments with another generator": (
        {"data": DATA.replace(", generator=generator)", ")")},
        "data.py:augment: returns different batches for the same batch and seed; draw only from the generator that it gets",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_code_that(name, tmp_path):
    (tmp_path / "notes.txt").write_text("old text")
    parts, message = BAD[name]
    with pytest.raises(RecipeError) as caught:
        _inspect(tmp_path, **parts)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


def test_a_user_metric_with_allowed_overlap_and_unlabelled_samples(tmp_path):
    data = (
        DATA.replace("torch.arange(60) % 3", "torch.rand(60, generator=generator)")
        .replace("(outputs.argmax(1) == labels).mean()", "1 - abs(outputs[:, 0] - labels).mean() / 1000")
        .replace(
            RETURN,
            f"    splits['evaluation'] = TensorDataset(x[28:], y[28:])\n    splits['validation'] = TensorDataset(x[:9], y[:9])\n"
            f"    splits['unlabelled'] = torch.randn(7, 4, generator=generator)\n{RETURN}",
        )
    )
    from safetensors.torch import save_file
    from torch import nn

    save_file(nn.Linear(4, 3).state_dict(), tmp_path / "teacher.safetensors")
    recipe = TRAINED_ELSEWHERE.replace('data.py:splits"', 'data.py:splits"\nmax_overlap = 9') + '[evaluate]\nmetric = "data.py:metric"\n'
    result = _inspect(tmp_path, data, recipe=recipe)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["splits"]["evaluation"] == {"samples": 32, "classes": None, "overlap": {"train": 2}}
    assert summary["splits"]["validation"]["overlap"] == {"train": 9, "calibration": 8}
    assert summary["splits"]["unlabelled"]["samples"] == 7
    assert np.load(tmp_path / "out" / "unlabelled.inputs.0.npy").shape == (7, 4)
    assert np.load(tmp_path / "out" / "evaluation.labels.npy").dtype == np.float32
    assert result.notes == ("evaluation has 32 samples; accuracy is known only roughly",)


def test_rare_classes_are_noted(tmp_path):
    data = DATA.replace("y[:30])\n", "y[:30].clamp(max=1))\n").replace("60", "400").replace("x[40:], y[40:]", "x[40:350], y[40:350]")
    data = data.replace(RETURN, f"    y[41:45] = 2\n    y[45:350] = y[45:350] % 2\n{RETURN}")
    result = _inspect(tmp_path, data)
    assert result.notes == (
        "train has no sample of class 2, which evaluation has",
        "evaluation has fewer than 10 samples of class 2; their accuracy says little",
    )
