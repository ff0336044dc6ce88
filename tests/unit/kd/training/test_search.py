# SPDX-License-Identifier: Apache-2.0
"""The search on scripted training runs: which setting is best is known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from edgekd.domain.losses import Loss
from edgekd.errors import RecipeError
from edgekd.kd.training import loop, search

OPEN = [Loss("kl", weight="auto", temperature="auto"), Loss("ce", 0.1)]


@pytest.fixture
def runs(monkeypatch):
    """Runs whose accuracy is best at T = 2 and weight 0.9 and grows with the epochs; what was trained, in order."""
    seen = []

    def fit(job, work, progress, after_epoch):
        seen.append((job.terms, 0))
        for epoch in range(1, job.epochs + 1):
            seen[-1] = (job.terms, epoch)
            kl = job.terms[0]
            accuracy = 0.5 + 0.05 * epoch - 0.1 * abs(kl.temperature - 2) - 0.1 * abs(kl.weight - 0.9)
            after_epoch(SimpleNamespace(validation_accuracy=accuracy, epoch=epoch), None)

    monkeypatch.setattr(loop, "fit", fit)
    return seen


def job_of(terms, epochs):
    return SimpleNamespace(terms=list(terms), epochs=epochs)


def run(folder, share=5.0, epochs=16):
    return search.search(OPEN, job_of, epochs, share, folder, lambda *_: None)


def test_the_best_setting_is_taken_and_nothing_else_is_touched(tmp_path, runs):
    chosen, trials = run(tmp_path)
    assert [(term.temperature, term.weight) for term in chosen] == [(2.0, 0.9), (None, 0.1)]
    assert len(trials) == 20
    assert search.describe_choice(OPEN, chosen) == "weight of kl = 0.9, temperature of kl = 2.0"


def test_worse_settings_are_stopped_early(tmp_path, runs):
    _, trials = run(tmp_path)
    stopped = [one for one in trials if one.stopped]
    assert stopped
    assert max(len(one.accuracies) for one in trials) == 4
    assert {len(one.accuracies) for one in stopped} == {2}  # while the learning rate still rises, all are left alone
    assert sum(len(one.accuracies) for one in trials) < 0.8 * 4 * len(trials)


@pytest.mark.parametrize("share", [0.13, 0.25, 0.5, 1.0, 2.0])
def test_the_share_is_kept(tmp_path, runs, share):
    _, trials = run(tmp_path, share)
    assert sum(len(one.accuracies) for one in trials) <= share * 16
    assert trials


def test_a_search_that_was_killed_goes_on_and_ends_the_same(tmp_path, runs, monkeypatch):
    (tmp_path / "whole").mkdir()
    whole = run(tmp_path / "whole")
    trained = len(runs)
    runs.clear()
    folder = tmp_path / "killed"
    folder.mkdir()
    fit, count = loop.fit, 0

    def dies(*arguments):
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        fit(*arguments)

    monkeypatch.setattr(loop, "fit", dies)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    monkeypatch.setattr(loop, "fit", fit)
    assert run(folder) == whole
    assert len(runs) == trained


def test_without_classes_there_is_nothing_to_choose_by(tmp_path, monkeypatch):
    def fit(job, work, progress, after_epoch):
        after_epoch(SimpleNamespace(validation_accuracy=None, epoch=1), None)

    monkeypatch.setattr(loop, "fit", fit)
    with pytest.raises(RecipeError, match="'auto': no sample of the validation split has a class"):
        run(tmp_path)


def test_what_was_chosen_can_be_written_and_read(tmp_path, runs):
    chosen, trials = run(tmp_path)
    told = search.as_json(chosen, trials)
    assert [Loss.from_dict(one) for one in told["losses"]] == [Loss.from_dict(one.to_dict()) for one in chosen]
    assert not any(Loss.from_dict(one).is_open for one in told["losses"])
    assert told["epochs"] == sum(len(one["accuracies"]) for one in told["trials"])


def test_every_option_that_may_be_auto_has_choices():
    for name in ("temperature", "weight", "standardize", "label_smoothing"):
        assert len(search.CHOICES[name]) > 1
    assert min(search.CHOICES["temperature"]) == 0.5
