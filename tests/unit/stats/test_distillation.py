# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from benchmarks import equal_arms
from edgekd.stats import distillation
from edgekd.stats.jackknife import Jackknife
from edgekd.stats.scores import ModelScores

LABELS = np.arange(400) % 4


def _scored(accuracy, seed, mean_confidence=4.0):
    """Return scores of a student that is correct on about this share of the samples, the easy ones first."""
    generator = np.random.default_rng(seed)
    hardness = (np.arange(400) * 7 % 400) / 400
    is_correct = hardness + generator.normal(0, 0.05, 400) < accuracy
    outputs = generator.normal(0, 0.1, (400, 4)).astype(np.float32)
    outputs[np.arange(400), np.where(is_correct, LABELS, (LABELS + 1) % 4)] += mean_confidence
    scores = (outputs.argmax(1) == LABELS).astype(np.float64)
    return ModelScores(float(scores.mean()), outputs, scores, None, "x86-64-v3")


def _judge(distilled, no_teacher, label_smoothing, teacher=0.95, *, calibrated=True):
    methods = {
        name: [_scored(accuracy, 10 * number + seed) for seed in range(5)]
        for number, (name, accuracy) in enumerate(
            [("distilled", distilled), ("no_teacher", no_teacher), ("label_smoothing", label_smoothing)]
        )
    }
    validation = {name: [item.accuracy for item in by_seed] for name, by_seed in methods.items()}
    return distillation.judge_distillation(methods, validation, _scored(teacher, 99), LABELS, np.arange(400), calibrated=calibrated)


def test_helps_is_judged_against_the_strongest_baseline():
    result = _judge(0.88, 0.80, 0.82)
    assert (result["outcome"], result["baseline"], result["seeds"]) == ("HELPS", "label_smoothing", 5)
    gains = {row["baseline"]: row["pp"] for row in result["gains"]}
    assert gains["no_teacher"] == pytest.approx(8, abs=2)
    assert gains["label_smoothing"] == pytest.approx(6, abs=2)
    assert result["gap_closed"] == pytest.approx(8 / 15, abs=0.15)
    assert result["flags"] == []


def test_no_effect_if_only_the_weaker_baseline_is_beaten():
    result = _judge(0.85, 0.80, 0.852)
    assert (result["outcome"], result["baseline"]) == ("NO EFFECT", "label_smoothing")


def test_hurts_if_a_baseline_is_better():
    assert _judge(0.75, 0.82, 0.80)["outcome"] == "HURTS"


def test_a_teacher_worse_than_a_student_trained_on_labels_is_flagged():
    result = _judge(0.80, 0.85, 0.84, teacher=0.80)
    assert result["gap_closed"] is None
    assert [flag for flag in result["flags"] if "no better than a student that is trained on labels only" in flag]


def test_a_student_that_has_reached_its_teacher_is_flagged():
    assert [flag for flag in _judge(0.94, 0.88, 0.89)["flags"] if "the student has reached its teacher" in flag]


def _with_errors_in_class_0(scored):
    scores = scored.scores.copy()
    scores[(LABELS == 0) & (np.arange(400) % 3 > 0)] = 0
    return ModelScores(float(scores.mean()), scored.outputs, scores, None, scored.instruction_set)


@pytest.mark.parametrize(("teacher_errs", "student_errs", "is_flagged"), [(True, True, True), (True, False, False), (False, True, False)])
def test_errors_in_a_class_that_teacher_and_students_share_are_flagged(teacher_errs, student_errs, is_flagged):
    methods = {
        name: [_scored(0.9, 10 * number + seed) for seed in range(5)]
        for number, name in enumerate(("distilled", "no_teacher", "label_smoothing"))
    }
    teacher = _scored(0.95, 99)
    if student_errs:
        methods["distilled"] = [_with_errors_in_class_0(item) for item in methods["distilled"]]
    result = distillation.judge_distillation(
        methods,
        {name: [0.9] for name in methods},
        _with_errors_in_class_0(teacher) if teacher_errs else teacher,
        LABELS,
        np.arange(400),
        calibrated=False,
    )
    flags = [flag for flag in result["flags"] if flag.startswith("the student shares its teacher's errors in class")]
    assert [flag.split(":")[0].rpartition(" ")[2] for flag in flags] == (["0"] if is_flagged else [])


def test_calibration_is_reported_only_for_logits_of_classes():
    assert all(row["ece"] is None and row["nll"] is None for row in _judge(0.9, 0.8, 0.8, calibrated=False)["methods"])
    assert all(0 < row["ece"] < 1 and row["nll"] > 0 for row in _judge(0.9, 0.8, 0.8)["methods"])


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy():
    outputs = np.log(np.tile([0.7, 0.1, 0.1, 0.1], (100, 1))).astype(np.float32)
    labels = np.where(np.arange(100) < 50, 0, 1)
    assert distillation.calibration_error(outputs, labels) == pytest.approx(0.2, abs=1e-6)
    labels = np.where(np.arange(100) < 70, 0, 1)
    assert distillation.calibration_error(outputs, labels) == pytest.approx(0, abs=1e-6)
    assert distillation.negative_log_likelihood(outputs, np.zeros(100, dtype=int)) == pytest.approx(-np.log(0.7), rel=1e-5)


def test_a_metric_of_the_whole_set_is_judged_by_the_jackknife():
    def scored(accuracy, seed):
        noise = np.random.default_rng(0).normal(0, 0.001, 50) + np.random.default_rng(seed).normal(0, 0.0002, 50)
        return ModelScores(accuracy, np.zeros((400, 1)), None, Jackknife(accuracy + noise, 50), "x86-64-v3")

    def outcome(gain, *, undefined=False):
        methods = {
            name: [scored(0.8 + offset + 0.001 * seed, 10 * number + seed) for seed in range(4)]
            for number, (name, offset) in enumerate([("distilled", gain), ("no_teacher", 0.0), ("label_smoothing", -0.01)])
        }
        if undefined:
            methods["distilled"][0].jackknife.values[3] = np.nan
        validation = {"distilled": [0.8], "no_teacher": [0.8], "label_smoothing": [0.7]}
        groups = np.arange(400) % 50
        return distillation.judge_distillation(methods, validation, scored(0.9, 77), LABELS, groups, calibrated=False)["outcome"]

    assert outcome(0.03) == "HELPS"
    assert outcome(0.0) == "NO EFFECT"
    assert outcome(0.03, undefined=True) == "NO EFFECT"


def test_one_speaker_shows_no_effect():
    methods = {name: [_scored(share, seed) for seed in range(3)] for name, share in (("distilled", 0.95), ("no_teacher", 0.6))}
    validation = {name: [item.accuracy for item in by_seed] for name, by_seed in methods.items()}
    result = distillation.judge_distillation(methods, validation, _scored(0.97, 99), LABELS, np.zeros(400), calibrated=True)
    assert (result["outcome"], result["gains"][0]["interval_pp"]) == ("NO EFFECT", None)


@pytest.mark.parametrize("scenario", [equal_arms.Scenario(3, 1000, None, 200, 3.0), equal_arms.Scenario(5, 360, 6, 360, 4.0)])
def test_equal_students_are_seldom_called_better(scenario):
    helps, hurts = equal_arms.shares(scenario, 300)
    assert helps <= 0.04
    assert hurts <= 0.055  # the strongest of two baselines is compared
