# SPDX-License-Identifier: Apache-2.0
"""The search on scripted trials, whose best setting is known."""

from __future__ import annotations

import math

import pytest

from edgekd.domain.losses import Loss
from edgekd.kd.training import search
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
    standardized = [Loss("kl", temperature="auto", standardize="auto")]
    for losses, labels_only in ((AUTO, False), (standardized, True), (SMOOTHED, False)):
        space = search.search_space(losses, labels_only=labels_only)
        for winner in space:
            result, _ = run(lambda trial, winner=winner: 0.9 if trial.choices == winner else 0.7, losses, labels_only=labels_only)
            assert result.best[0].trial.choices == winner
            assert not result.is_weak


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 2.7), (8.0, 0.3), (0.5, 0.3)])
def test_where_not_all_settings_can_be_tried_the_next_one_is_near_the_best(temperature, weight):
    losses = [Loss("kl", weight="auto", temperature="auto", standardize="auto")]
    result, trials = run(best_at(temperature, weight), losses, labels_only=True)
    assert result.is_weak
    assert [trial.choices for trial in trials[:2]] == [
        {"0.weight": 0.9, "0.temperature": 4.0, "0.standardize": False},
        {LABELS_ONLY: 0.1},
    ]
    assert {name: result.best[0].trial.choices[name] for name in ("0.temperature", "0.weight")} == {
        "0.temperature": temperature,
        "0.weight": weight,
    }


def test_a_search_of_one_trial_does_not_leave_the_teacher_out():
    result, _ = run(best_at(), epochs=60, share=0.1)
    assert result.best[0].trial.choices == {"0.weight": 0.9, "0.temperature": 4.0}


def test_students_with_and_without_a_teacher_are_compared_by_whole_trainings():
    def learns_faster(trial):  # with the teacher, and ends lower
        return 0.8 if trial.is_labels_only else 0.79 + 0.3 * (trial.epochs < 60)

    def learns_slower(trial):
        return 0.8 if trial.is_labels_only else 0.81 - 0.3 * (trial.epochs < 60)

    for accuracy, chosen in ((learns_faster, True), (learns_slower, False)):
        result, trials = run(accuracy)
        assert result.best[0].trial.is_labels_only is chosen
        assert [item.trial.epochs for item in (*result.best, *result.second)] == [60, 60]
        assert sum(trial.epochs == 60 for trial in trials) == 2
        assert result.epochs <= 240  # one of them is the student's own training
    assert max(trial.epochs for trial in run(learns_faster, share=1.5)[1]) < 60


def test_few_settings_are_trained_from_several_seeds():
    luck = {0.0: (0.08, -0.08, 0.0), 0.2: (0.0, 0.03, 0.03)}  # one seed alone would choose 0

    def accuracy(trial):
        smoothing = trial.choices["0.label_smoothing"]
        return 0.7 + 0.05 * (smoothing == 0.2) + luck.get(smoothing, (0, 0, 0))[trial.repetition]

    result, trials = run(accuracy, SMOOTHED, labels_only=False)
    assert result.best[0].trial.choices == {"0.label_smoothing": 0.2}
    first = [trial for trial in trials if trial.epochs == trials[0].epochs]
    assert {trial.repetition for trial in first} == {0, 1}
    assert len(result.best) == len(result.second) == search.FINAL_SEEDS


@pytest.mark.parametrize("epochs", [1, 3, 6, 20, 60, 240])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0, 3.0, 8.0])
def test_all_trials_together_take_no_more_than_the_share_and_most_of_it(epochs, share):
    result, trials = run(best_at(), epochs=epochs, share=share)
    budget = max(min(3, epochs), round(share * epochs))
    assert result.epochs == sum(trial.epochs for trial in trials) <= max(budget, math.ceil(epochs / 10)) + epochs * (share >= 2)
    assert max(trial.epochs for trial in trials) <= epochs
    if share >= 3 and epochs >= 20:
        assert result.epochs >= 0.8 * budget


def test_a_search_that_cannot_try_all_settings_says_so_and_tries_those_near_the_defaults():
    result, trials = run(best_at(), epochs=6, share=3.0)
    assert result.is_weak
    assert {trial.epochs for trial in trials} == {3, 6}
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
    _, trials = run(best_at(labels_only=0.1), share=1.9)
    assert {trial.epochs for trial in trials if trial.is_labels_only} == {trial.epochs for trial in trials if not trial.is_labels_only}


def test_what_is_left_repeats_the_two_best_with_other_seeds():
    result, _ = run(best_at(), [Loss("kl", standardize="auto")], epochs=10, share=12.0, labels_only=False)
    assert [item.trial.repetition for item in result.best] == [item.trial.repetition for item in result.second] == [0, 1, 2, 3]


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
