# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from edgekd.domain.artifact import Artifact
from edgekd.domain.losses import Loss
from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError
from edgekd.kd import modules
from edgekd.kd.training import autotune
from tests.stored import store

CODE = """
from torch import nn

def student():
    return nn.Linear(4, 3)

def teacher():
    return nn.Sequential(nn.Linear(4, 2000), nn.ReLU(), nn.Linear(2000, 2000), nn.ReLU(), nn.Linear(2000, 3))
"""
PARAMS = {
    "model": "worth_user.py:student",
    "reference": "worth_user.py:teacher",
    "epochs": 20,
    "batch_size": 8,
    "optimizer": "sgd",
    "learning_rate": 0.01,
    "weight_decay": 0.0,
    "seed": 0,
    "threads": 1,
    "augment": None,
    "views": None,
}
OPEN = [Loss("kl", temperature="auto", weight="auto", standardize="auto"), Loss("ce", 0.1)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "worth_user.py").write_text(CODE)
    (tmp_path / "out").mkdir()
    yield tmp_path
    sys.modules.pop("worth_user", None)


def run(folder, within):
    generator, inputs = np.random.default_rng(0), {}
    for split, count in (("train", 64), ("validation", 16)):
        np.save(folder / f"{split}.x.npy", generator.normal(size=(count, 4)).astype(np.float32))
        np.save(folder / f"{split}.labels.npy", np.arange(count) % 3)
        store(folder / f"{split}.outputs.safetensors", generator.normal(size=(1, count, 3)).astype(np.float32), split)
        found = {"inputs.0": "x.npy", "labels": "labels.npy", "outputs": "outputs.safetensors"}
        inputs |= {f"{split}.{name}": Artifact(folder / f"{split}.{file}", "", 0) for name, file in found.items()}
    modules.save_weights(modules.build_module(folder, EntryPoint("worth_user.py", "teacher")), folder / "w.safetensors")
    inputs["reference"] = Artifact(folder / "w.safetensors", "", 0)
    context = SimpleNamespace(recipe_dir=folder, out=folder / "out", work=folder, progress=lambda *_: None)
    result = autotune.choose_epochs({**PARAMS, "break_even_inferences": within}, inputs, context, OPEN)
    return result, json.loads((folder / "out" / "epochs.json").read_text())


@pytest.mark.parametrize(
    ("inferences", "epoch_s", "saved_s", "expected"),
    [(1000, 0.5, 0.001, 2), (1499, 0.5, 0.001, 2), (10, 0.5, 0.001, 0), (1000, 0.5, -0.001, 0)],
)
def test_as_many_epochs_are_trained_as_the_inferences_win_back(inferences, epoch_s, saved_s, expected):
    assert autotune.break_even_epochs(inferences, epoch_s, saved_s) == expected


def test_what_costs_and_what_saves_is_timed_on_the_networks_themselves(folder):
    result, kept = run(folder, 10**9)
    assert kept == {"epochs": 20}
    assert result.metrics["teacher_seconds"] > 2 * result.metrics["student_seconds"] > 0
    assert result.metrics["epoch_seconds"] > 0
    (note,) = result.notes
    assert note.startswith("distill: all 20 epochs are won back within 1,000,000,000 inferences: an epoch takes ")


def test_training_ends_where_it_is_no_longer_won_back(folder, monkeypatch):
    monkeypatch.setattr(autotune, "_epoch_seconds", lambda *_: 2.0)
    monkeypatch.setattr(autotune, "_inference_seconds", lambda *_: (0.003, 0.001))
    result, kept = run(folder, 7500)
    assert kept == {"epochs": 7}
    assert result.notes[0].startswith("distill: 7 of 20 epochs, and no more, are won back within 7,500 inferences: an epoch takes 2 s, ")


def test_where_not_even_one_epoch_is_won_back_there_is_an_error_and_no_file(folder):
    with pytest.raises(
        RecipeError, match=r"distill.break_even_inferences: an epoch takes .* not one epoch is won back within 1 inferences"
    ):
        run(folder, 1)
    assert not (folder / "out" / "epochs.json").exists()
