# SPDX-License-Identifier: Apache-2.0
"""The search on scripted training runs: which setting is best is known."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from edgekd.domain.artifact import Artifact
from edgekd.domain.losses import Loss
from edgekd.errors import RecipeError
from edgekd.kd.training import search

AUTO_LOSSES = [Loss("kl", weight="auto", temperature="auto"), Loss("ce", 0.1)]


class Run(SimpleNamespace):
    """A trainer after some epochs, as callbacks see it."""


@pytest.fixture
def runs(monkeypatch):
    """Runs whose accuracy is best at T = 2 and weight 0.9 and grows with the epochs; the losses of each and its epochs, in order."""
    trained = []

    def fit(job, work, progress, callbacks):
        trained.append((job.losses, 0))
        for epoch in range(1, job.epochs + 1):
            trained[-1] = (job.losses, epoch)
            kl = job.losses[0]
            accuracy = 0.5 + 0.05 * epoch - 0.1 * abs(kl.temperature - 2) - 0.1 * abs(kl.weight - 0.9)
            for callback in callbacks:
                callback.after_epoch(Run(curve=[SimpleNamespace(validation_accuracy=accuracy, epoch=epoch)]))

    monkeypatch.setattr(search, "fit", fit)
    return trained


def make_job(losses, epochs):
    return SimpleNamespace(losses=list(losses), epochs=epochs)


def run(folder, share=5.0, epochs=16):
    return search.search(AUTO_LOSSES, make_job, epochs, share, folder, lambda *_: None)


def test_the_best_setting_is_chosen_and_nothing_else_is_changed(tmp_path, runs):
    chosen, trials = run(tmp_path)
    assert [(loss.temperature, loss.weight) for loss in chosen] == [(2.0, 0.9), (None, 0.1)]
    assert len(trials) == 20
    assert search.describe_choice(AUTO_LOSSES, chosen) == "weight of kl = 0.9, temperature of kl = 2.0"


def test_worse_settings_are_pruned(tmp_path, runs):
    _, trials = run(tmp_path)
    pruned = [trial for trial in trials if trial.pruned]
    assert pruned
    assert max(len(trial.accuracies) for trial in trials) == 4
    assert {len(trial.accuracies) for trial in pruned} == {2}  # none while the learning rate still rises
    assert search.total_epochs(trials) < 0.8 * 4 * len(trials)


@pytest.mark.parametrize("share", [0.13, 0.25, 0.5, 1.0, 2.0])
def test_all_trials_together_stay_within_the_share(tmp_path, runs, share):
    _, trials = run(tmp_path, share)
    assert search.total_epochs(trials) <= share * 16
    assert trials


def test_a_search_that_was_killed_resumes_and_ends_the_same(tmp_path, runs, monkeypatch):
    (tmp_path / "whole").mkdir()
    whole = run(tmp_path / "whole")
    trained = len(runs)
    runs.clear()
    folder = tmp_path / "killed"
    folder.mkdir()
    fit, count = search.fit, 0

    def dies(*arguments):
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        fit(*arguments)

    monkeypatch.setattr(search, "fit", dies)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    monkeypatch.setattr(search, "fit", fit)
    assert run(folder) == whole
    assert len(runs) == trained


def test_without_classes_there_is_nothing_to_compare_by(tmp_path, monkeypatch):
    def fit(job, work, progress, callbacks):
        callbacks[0].after_epoch(Run(curve=[SimpleNamespace(validation_accuracy=None, epoch=1)]))

    monkeypatch.setattr(search, "fit", fit)
    with pytest.raises(RecipeError, match="'auto': no sample of the validation split has a class"):
        run(tmp_path)


def test_the_choice_is_written_and_read(tmp_path, runs, monkeypatch):
    student = SimpleNamespace(losses=AUTO_LOSSES, settings=SimpleNamespace(epochs=16))
    monkeypatch.setattr(search, "replace", lambda item, **changes: SimpleNamespace(**{**vars(item), **changes}))
    monkeypatch.setattr(search, "student_job", lambda params, inputs, folder: make_job(params.losses, params.settings.epochs))
    monkeypatch.setattr(search, "with_choices", with_choices)
    context = SimpleNamespace(recipe_dir=tmp_path, out=tmp_path, work=tmp_path, progress=lambda *_: None)
    chosen, trials = search.run_search(SimpleNamespace(student=student, share=5.0), {}, context)
    read = search.read_chosen(Artifact(tmp_path / "chosen.json", "", 0))
    assert [loss.to_dict() for loss in read] == [loss.to_dict() for loss in chosen]
    assert not any(loss.has_auto for loss in read)
    assert json.loads((tmp_path / "chosen.json").read_text())["epochs"] == search.total_epochs(trials)


def with_choices(losses, choices):
    changes = [{name.partition(".")[2]: value for name, value in choices.items() if name[0] == str(index)} for index in range(len(losses))]
    return [replace(loss, **options) for loss, options in zip(losses, changes, strict=True)]


def test_every_option_that_may_be_auto_has_choices():
    for name in ("temperature", "weight", "standardize", "label_smoothing"):
        assert len(search.CHOICES[name]) > 1
    assert min(search.CHOICES["temperature"]) == 0.5
