# SPDX-License-Identifier: Apache-2.0
"""The search on scripted trials, whose best setting is known, and on small real trainings."""

from __future__ import annotations

import json
import math
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
from edgekd.kd.training import search
from edgekd.kd.training.jobs import TrainingJob, TrainingSettings
from edgekd.kd.training.search import LABELS_ONLY, Trial, TrialResult

AUTO = [Loss("kl", weight="auto", temperature="auto"), Loss("ce", 0.1)]
SMOOTHED = [Loss("ce", label_smoothing="auto")]
SAMPLES = 2000


def scores_of(accuracy):
    """Scores of samples, of which this share is right."""
    return tuple(float(index < round(accuracy * SAMPLES)) for index in range(SAMPLES))


class Trials:
    """Runs trials whose accuracy is a function of the choices, and grows with their epochs."""

    def __init__(self, accuracy_of):
        self.accuracy_of, self.trials = accuracy_of, []

    def __call__(self, trial, number, progress):
        assert number == len(self.trials)
        self.trials.append(trial)
        return TrialResult(trial, scores_of(self.accuracy_of(trial) - 0.3 / trial.epochs))


def best_at(temperature=2.0, weight=0.9, labels_only=0.0):
    def accuracy(trial):
        if trial.is_labels_only:
            return labels_only
        choices = trial.choices
        return (
            0.8
            - 0.02 * abs(math.log2(choices.get("0.temperature", temperature) / temperature))
            - 0.02 * abs(math.log(choices.get("0.weight", weight) / weight))
        )

    return accuracy


def run(accuracy_of, losses=AUTO, *, epochs=60, share=3.0, labels_only=True):
    trials = Trials(accuracy_of)
    space = search.search_space(losses, labels_only=labels_only)
    return search.search(space, trials, epochs, share, lambda *_: None), trials.trials


@pytest.mark.parametrize(("temperature", "weight"), [(0.5, 9.0), (4.0, 0.9), (8.0, 0.3), (1.0, 2.7)])
def test_the_best_setting_is_chosen(temperature, weight):
    result, _ = run(best_at(temperature, weight))
    choices = result.best[0].trial.choices
    assert choices == {"0.weight": weight, "0.temperature": temperature}
    losses = search.with_choices(AUTO, choices)
    assert [(loss.temperature, loss.weight) for loss in losses] == [(temperature, weight), (None, 0.1)]
    assert search.describe_choices(AUTO, choices) == f"weight of kl = {weight}, temperature of kl = {temperature}"
    assert not result.is_weak


def test_only_trials_of_equal_length_are_compared():
    result, trials = run(best_at())
    lengths = sorted({trial.epochs for trial in trials})
    assert len(lengths) > 1
    assert lengths[0] >= 6  # a tenth of the student's epochs
    assert {item.trial.epochs for item in (*result.best, *result.second)} == {lengths[-1]}
    for length in lengths:  # a rung is whole before the next begins
        numbers = [number for number, trial in enumerate(trials) if trial.epochs == length]
        assert numbers == list(range(numbers[0], numbers[-1] + 1))


def test_what_is_best_in_a_rung_goes_on_whether_it_is_early_or_late():
    for losses, labels_only in ((AUTO, False), (AUTO, True), (SMOOTHED, False)):
        space = search.search_space(losses, labels_only=labels_only)
        for winner in space:
            result, _ = run(lambda trial, winner=winner: 0.9 if trial.choices == winner else 0.7, losses, labels_only=labels_only)
            assert result.best[0].trial.choices == winner


@pytest.mark.parametrize("epochs", [1, 3, 6, 20, 60, 240])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0, 3.0, 8.0])
def test_all_trials_together_take_no_more_than_the_share_and_most_of_it(epochs, share):
    result, trials = run(best_at(), epochs=epochs, share=share)
    budget = max(min(3, epochs), round(share * epochs))
    assert result.epochs == sum(trial.epochs for trial in trials) <= max(budget, math.ceil(epochs / 10))
    assert max(trial.epochs for trial in trials) <= epochs
    if share >= 3 and epochs >= 20:
        assert result.epochs >= 0.8 * budget


def test_a_search_that_cannot_try_all_settings_says_so_and_tries_those_near_the_defaults():
    result, trials = run(best_at(), epochs=6, share=3.0)
    assert result.is_weak
    assert {trial.epochs for trial in trials} == {3}
    assert {"0.weight": 0.9, "0.temperature": 4.0} in [trial.choices for trial in trials]


@pytest.mark.parametrize(("temperature", "weight"), [(16.0, 0.9), (0.25, 0.9), (4.0, 27.0), (4.0, 0.1)])
def test_where_an_end_wins_the_list_grows(temperature, weight):
    result, _ = run(best_at(temperature, weight), labels_only=False)
    assert result.best[0].trial.choices == {"0.weight": weight, "0.temperature": temperature}


def test_the_label_smoothing_of_a_baseline_grows():
    result, trials = run(lambda trial: 0.5 + 0.2 * trial.choices["0.label_smoothing"], SMOOTHED, labels_only=False)
    assert result.best[0].trial.choices == {"0.label_smoothing": 0.6}
    assert not any(trial.is_labels_only for trial in trials)


def test_on_a_tie_labels_alone_are_better_and_then_the_default():
    assert run(lambda trial: 0.8)[0].best[0].trial.choices == {LABELS_ONLY: 0.1}
    assert run(lambda trial: 0.8, labels_only=False)[0].best[0].trial.choices == {"0.weight": 0.9, "0.temperature": 4.0}


def test_labels_alone_are_chosen_only_where_no_loss_with_a_teacher_is_better():
    assert LABELS_ONLY in run(best_at(labels_only=0.81))[0].best[0].trial.choices
    assert LABELS_ONLY not in run(best_at(labels_only=0.79))[0].best[0].trial.choices
    assert search.with_choices(AUTO, {LABELS_ONLY: 0.3}) == (Loss("ce", label_smoothing=0.3),)
    assert search.describe_choices(AUTO, {LABELS_ONLY: 0.3}) == "labels only, label smoothing 0.3"


def test_labels_alone_are_in_every_rung():
    _, trials = run(best_at(labels_only=0.1))
    assert {trial.epochs for trial in trials if trial.is_labels_only} == {trial.epochs for trial in trials if not trial.is_labels_only}


def test_what_is_left_repeats_the_two_best_with_other_seeds():
    result, _ = run(best_at(), [Loss("kl", standardize="auto")], epochs=10, share=6.0, labels_only=False)
    assert [item.trial.repetition for item in result.best] == [item.trial.repetition for item in result.second] == [0, 1, 2]


def test_the_margin_is_paired_by_sample():
    first, second = scores_of(0.8), scores_of(0.79)
    trial = Trial({}, 3)
    result = search.SearchResult([], [TrialResult(trial, first)], [TrialResult(trial, second)], is_weak=False)
    margin, interval = result.margin()
    assert margin == pytest.approx(0.01)
    assert 0 < interval.low < margin < interval.high  # the same 20 samples, all in favor of one
    missing = (float("nan"), *first[1:])
    half = search.SearchResult([], [TrialResult(trial, missing)], [TrialResult(trial, (float("nan"), *second[1:]))], is_weak=False)
    assert half.margin()[0] == pytest.approx(20 / (SAMPLES - 1))


def test_one_setting_is_chosen_without_a_second():
    result, _ = run(lambda trial: 0.5, [Loss("kl", temperature=2.0)], labels_only=False)
    assert (dict(result.best[0].trial.choices), result.second) == ({}, ())


def real_job(trial):
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(64, 4, generator=generator), torch.arange(64) % 3
    samples = Samples((inputs,), labels, None)

    def objective(logits, teacher_logits, labels, epoch):
        return nn.functional.cross_entropy(logits, labels, label_smoothing=float(trial.choices["0.label_smoothing"]))

    settings = TrainingSettings(trial.epochs, 16, "adamw", 0.05, 0.0, trial.repetition, 1)
    return TrainingJob("distill", EntryPoint("models.py", "net"), lambda: nn.Linear(4, 3), samples, samples, objective, settings)


def real_search(folder, run_trial=search._run_trial):
    def run(trial, number, progress):
        return run_trial(trial, real_job(trial), folder / f"trial.{number}", progress)

    return search.search(search.search_space(SMOOTHED, labels_only=False), run, 20, 3.0, lambda *_: None)


def test_a_search_that_was_killed_resumes_with_its_trials_and_ends_the_same(tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole, fit, trained = real_search(tmp_path / "whole"), search.fit, []

    def dies(*arguments):
        trained.append(arguments)
        if len(trained) == 4:
            raise KeyboardInterrupt
        return fit(*arguments)

    monkeypatch.setattr(search, "fit", dies)
    with pytest.raises(KeyboardInterrupt):
        real_search(tmp_path / "killed")
    assert real_search(tmp_path / "killed") == whole
    assert len(trained) == len(whole.results) + 1  # only the trial that was killed began again


def test_the_scores_are_those_of_the_trained_weights(tmp_path):
    trial = Trial({"0.label_smoothing": 0.1}, 5)
    result = search._run_trial(trial, real_job(trial), tmp_path / "trial.0", lambda *_: None)
    (tmp_path / "again").mkdir()
    weights, _ = search.fit(real_job(trial), tmp_path / "again", lambda *_: None)
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
        search._run_trial(Trial({}, 3), job, tmp_path / "trial.0", lambda *_: None)


def test_the_choice_is_written_and_read(tmp_path, monkeypatch):
    np.save(tmp_path / "labels.npy", np.arange(6) % 3)
    np.save(tmp_path / "inputs.npy", np.zeros((6, 4), np.float32))
    inputs = {
        "train.labels": Artifact(tmp_path / "labels.npy", "", 0),
        "train.inputs.0": Artifact(tmp_path / "inputs.npy", "", 0),
    }
    monkeypatch.setattr(search, "student_job", lambda params, inputs, folder: params)
    monkeypatch.setattr(
        search, "_run_trial", lambda trial, job, folder, progress: TrialResult(trial, scores_of(0.5 + job.losses[0].weight / 100))
    )
    student = search_params(AUTO)
    context = SimpleNamespace(recipe_dir=tmp_path, out=tmp_path, work=tmp_path, progress=lambda *_: None)
    result = search.run_search(student, inputs, context)
    read = search.read_chosen(Artifact(tmp_path / "chosen.json", "", 0))
    assert [loss.weight for loss in read] == [81.0, 0.1]
    assert not any(loss.has_auto for loss in read)
    document = json.loads((tmp_path / "chosen.json").read_text())
    assert document["epochs"] == result.epochs
    assert len(document["trials"]) == len(result.results)


def search_params(losses):
    from edgekd.kd.training.jobs import SearchParams, StudentParams

    settings = TrainingSettings(60, 16, "adamw", 0.05, 0.0, 0, 1)
    return SearchParams(StudentParams("models.py:net", tuple(losses), settings, "x86-64-v3"), 3.0, labels_only=True)


@pytest.mark.parametrize(
    ("loss", "default"),
    [
        (Loss("kl", temperature="auto"), 4.0),
        (Loss("dist", temperature="auto"), 1.0),
        (Loss("kl", weight="auto"), 0.9),
        (Loss("kl", standardize="auto"), False),
        (Loss("ce", label_smoothing="auto"), 0.0),
    ],
)
def test_the_default_of_each_loss_is_the_first_setting(loss, default):
    assert list(search.search_space([loss], labels_only=False)[0].values()) == [default]


def test_every_option_that_may_be_auto_has_choices():
    for name in ("temperature", "weight", "standardize", "label_smoothing"):
        assert len(search.CHOICES[name]) > 1
    assert min(search.CHOICES["temperature"]) == 0.5
