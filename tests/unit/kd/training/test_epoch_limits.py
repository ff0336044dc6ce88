# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from edgekd.domain.artifact import Artifact
from edgekd.domain.losses import Loss
from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError
from edgekd.kd import modules
from edgekd.kd.training import epoch_limits
from edgekd.kd.training.epoch_limits import read_epochs
from edgekd.kd.training.jobs import EpochLimitParams, StudentParams, TrainingSettings
from edgekd.ports import StageResult
from tests.stored import store

CODE = """
from torch import nn

def student():
    return nn.Linear(4, 3)

def teacher():
    return nn.Sequential(nn.Linear(4, 2000), nn.ReLU(), nn.Linear(2000, 2000), nn.ReLU(), nn.Linear(2000, 3))
"""
STUDENT = StudentParams(
    "break_even_user.py:student",
    (Loss("kl", temperature="auto", weight="auto", standardize="auto"), Loss("ce", 0.1)),
    TrainingSettings(20, 8, "sgd", 0.01, 0.0, 0, 1),
    "x",
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "break_even_user.py").write_text(CODE)
    (tmp_path / "out").mkdir()
    yield tmp_path
    sys.modules.pop("break_even_user", None)


def run(folder, inferences=None, minutes=None, share=0.0):
    generator, inputs = np.random.default_rng(0), {}
    for split, count in (("train", 64), ("validation", 16)):
        np.save(folder / f"{split}.x.npy", generator.normal(size=(count, 4)).astype(np.float32))
        np.save(folder / f"{split}.labels.npy", np.arange(count) % 3)
        store(folder / f"{split}.soft_targets.safetensors", generator.normal(size=(1, count, 3)).astype(np.float32), split)
        files = {"inputs.0": "x.npy", "labels": "labels.npy", "soft_targets": "soft_targets.safetensors"}
        inputs |= {f"{split}.{name}": Artifact(folder / f"{split}.{file}", "", 0) for name, file in files.items()}
    modules.save_weights(modules.build_module(folder, EntryPoint("break_even_user.py", "teacher")), folder / "w.safetensors")
    inputs["reference"] = Artifact(folder / "w.safetensors", "", 0)
    context = SimpleNamespace(recipe_dir=folder, out=folder / "out", work=folder, progress=lambda *_: None)
    result = epoch_limits.choose_epochs(
        EpochLimitParams(STUDENT, minutes, share, inferences, "break_even_user.py:teacher"), inputs, context
    )
    return result, read_epochs(Artifact(folder / "out" / "epochs.json", "", 0))


@pytest.mark.parametrize(
    ("inferences", "epoch_s", "saved_s", "expected"),
    [(1000, 0.5, 0.001, 2), (1499, 0.5, 0.001, 2), (10, 0.5, 0.001, 0), (1000, 0.5, -0.001, 0)],
)
def test_as_many_epochs_are_trained_as_the_inferences_make_up_for(inferences, epoch_s, saved_s, expected):
    assert epoch_limits.break_even_epochs(inferences, epoch_s, saved_s) == expected


def test_costs_and_savings_are_timed_on_the_networks_themselves(folder):
    result, epochs = run(folder, 10**9)
    assert epochs == 20
    assert result.metrics["teacher_seconds"] > 2 * result.metrics["student_seconds"] > 0
    assert result.metrics["epoch_seconds"] > 0
    (note,) = result.notes
    assert note.startswith("distill: all 20 epochs break even within 1,000,000,000 inferences: an epoch takes ")


def test_training_ends_where_it_no_longer_breaks_even(folder, monkeypatch):
    monkeypatch.setattr(epoch_limits, "_epoch_seconds", lambda *_: 2.0)
    monkeypatch.setattr(epoch_limits, "_inference_seconds", lambda *_: (0.003, 0.001))
    result, epochs = run(folder, 7500)
    assert epochs == 7
    assert result.notes[0].startswith("distill: 7 of 20 epochs, and no more, break even within 7,500 inferences: an epoch takes 2 s, ")


def test_training_ends_where_the_minutes_end_and_a_search_takes_its_share(folder, monkeypatch):
    monkeypatch.setattr(epoch_limits, "_epoch_seconds", lambda *_: 5.0)
    assert run(folder, minutes=1) == (
        StageResult({"epoch_seconds": 5.0}, ("distill: 12 of 20 epochs, and no more, fit in 1 minutes: an epoch takes 5 s",)),
        12,
    )
    result, epochs = run(folder, minutes=1, share=3.0)
    assert epochs == 3
    assert result.notes[0].endswith("an epoch takes 5 s, and a search as long as 3 trainings comes first")
    monkeypatch.setattr(epoch_limits, "_inference_seconds", lambda *_: (0.003, 0.001))
    assert run(folder, inferences=5000, minutes=1)[1] == 2
    assert run(folder, inferences=50_000, minutes=1)[1] == 12
    assert run(folder, minutes=60)[1] == 20


def test_where_not_one_epoch_fits_there_is_an_error(folder):
    with pytest.raises(RecipeError, match=r"distill.max_minutes: not one epoch fits in 1e-06 minutes: an epoch takes "):
        run(folder, minutes=1e-6)


def test_where_not_even_one_epoch_breaks_even_there_is_an_error_and_no_file(folder):
    with pytest.raises(
        RecipeError, match=r"distill.break_even_inferences: an epoch takes .* not one epoch breaks even within 1 inferences"
    ):
        run(folder, 1)
    assert not (folder / "out" / "epochs.json").exists()
