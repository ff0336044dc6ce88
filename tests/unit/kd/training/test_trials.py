# SPDX-License-Identifier: Apache-2.0
"""Trials on small real trainings."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.domain.artifact import Artifact
from edgekd.domain.losses import Loss
from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError
from edgekd.kd.data import Samples
from edgekd.kd.training import search, trials
from edgekd.kd.training.jobs import TrainingJob, TrainingSettings
from edgekd.kd.training.search import Trial, TrialResult

AUTO = [Loss("kl", weight="auto"), Loss("ce", 0.1)]
SMOOTHED = [Loss("ce", label_smoothing="auto")]


def real_job(trial):
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(64, 4, generator=generator), torch.arange(64) % 3
    samples = Samples((inputs,), labels, None)

    def objective(logits, teacher_logits, labels, epoch):
        return nn.functional.cross_entropy(logits, labels, label_smoothing=float(trial.choices["0.label_smoothing"]))

    settings = TrainingSettings(trial.epochs, 16, "adamw", 0.05, 0.0, trial.repetition, 1)
    return TrainingJob("distill", EntryPoint("models.py", "net"), lambda: nn.Linear(4, 3), samples, samples, objective, settings)


def real_search(folder, run_trial=trials._run_trial):
    def run(trial, number, progress):
        return run_trial(trial, real_job(trial), folder / f"trial.{number}", progress, stores_weights=trial.epochs == 20)

    return search.search(search.search_space(SMOOTHED, labels_only=False), run, 20, 3.0, lambda *_: None)


def test_a_search_that_was_killed_resumes_with_its_trials_and_ends_the_same(tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole, fit, trained = real_search(tmp_path / "whole"), trials.fit, []

    def dies(*arguments):
        trained.append(arguments)
        if len(trained) == 4:
            raise KeyboardInterrupt
        return fit(*arguments)

    monkeypatch.setattr(trials, "fit", dies)
    with pytest.raises(KeyboardInterrupt):
        real_search(tmp_path / "killed")
    assert real_search(tmp_path / "killed") == whole
    assert len(trained) == len(whole.results) + 1  # only the trial that was killed began again


def test_the_scores_are_those_of_the_trained_weights(tmp_path):
    trial = Trial({"0.label_smoothing": 0.1}, 5)
    result = trials._run_trial(trial, real_job(trial), tmp_path / "trial.0", lambda *_: None, stores_weights=False)
    (tmp_path / "again").mkdir()
    weights, _ = trials.fit(real_job(trial), tmp_path / "again", lambda *_: None)
    module = nn.Linear(4, 3)
    module.load_state_dict(weights)
    validation = real_job(trial).validation
    expected = (module(*validation.inputs).argmax(1) == validation.labels).double()
    assert result.scores == tuple(expected.tolist())
    assert result.accuracy == pytest.approx(float(expected.mean()))


def test_without_classes_there_is_nothing_to_compare_by(tmp_path):
    job = real_job(Trial({"0.label_smoothing": 0.1}, 3))
    unlabelled = replace(job.validation, labels=torch.full((64,), -1))
    job = replace(job, validation=unlabelled, objective=lambda logits, *_: logits.square().mean())
    with pytest.raises(RecipeError, match="'auto': no sample of the validation split has a class"):
        trials._run_trial(Trial({}, 3), job, tmp_path / "trial.0", lambda *_: None, stores_weights=False)


def test_the_choice_is_written_and_read(tmp_path, monkeypatch):
    np.save(tmp_path / "labels.npy", np.arange(6) % 3)
    np.save(tmp_path / "inputs.npy", np.zeros((6, 4), np.float32))
    inputs = {
        "train.labels": Artifact(tmp_path / "labels.npy", "", 0),
        "train.inputs.0": Artifact(tmp_path / "inputs.npy", "", 0),
    }
    monkeypatch.setattr(trials, "student_job", lambda params, inputs, folder: params)
    monkeypatch.setattr(trials, "_run_trial", lambda trial, job, folder, progress, **_: TrialResult(trial, (float(job.losses[0].weight),)))
    student = search_params(AUTO)
    context = SimpleNamespace(recipe_dir=tmp_path, out=tmp_path, work=tmp_path, progress=lambda *_: None)
    result, epochs = trials.run_search(student, inputs, context)
    read = trials.read_chosen(Artifact(tmp_path / "chosen.json", "", 0))
    assert [loss.weight for loss in read] == [81.0, 0.1]
    assert not any(loss.has_auto for loss in read)
    document = json.loads((tmp_path / "chosen.json").read_text())
    assert document["epochs"] == epochs == result.epochs - 60  # one of the two whole trainings is the student's own
    assert len(document["trials"]) == len(result.results)


def search_params(losses):
    from edgekd.kd.training.jobs import SearchParams, StudentParams

    settings = TrainingSettings(60, 16, "adamw", 0.05, 0.0, 0, 1)
    return SearchParams(StudentParams("models.py:net", tuple(losses), settings, "x86-64-v3"), 3.0, labels_only=True)
