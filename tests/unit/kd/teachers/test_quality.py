# SPDX-License-Identifier: Apache-2.0
"""Which teachers are refused, warned of and accepted, by their outputs for labelled samples."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edgekd.kd.output_spec import OutputSpec
from edgekd.kd.teachers.quality import probability_problem, quality_problems

CLASSES, MULTILABEL, REGRESSION = OutputSpec(), OutputSpec("multilabel"), OutputSpec("regression")
FINE, WARNED, REFUSED = None, False, True


def logits_for(labels, accuracy, width, seed=0):
    """Return logits that predict a share of the labels, and another class for the rest."""
    generator = np.random.default_rng(seed)
    is_right = generator.permutation(len(labels)) < accuracy * len(labels)
    predicted = np.where(is_right, labels, (labels + generator.integers(1, width, len(labels))) % width)
    logits = generator.standard_normal((len(labels), width)) * 0.1
    logits[np.arange(len(labels)), predicted] += 3
    return logits.astype(np.float32)


def verdict(spec, outputs, labels):
    problems = quality_problems(spec, np.asarray(outputs, np.float32), labels)
    return max((problem.is_worthless for problem in problems), default=None)


@pytest.mark.parametrize(
    ("accuracy", "width", "count", "expected"),
    [
        (0.95, 10, 12, FINE),
        (0.95, 10, 250, FINE),
        (0.75, 2, 40, FINE),
        (0.3, 100, 400, FINE),
        (0.1, 10, 250, REFUSED),
        (0.13, 10, 250, REFUSED),
        (0.2, 10, 250, WARNED),  # better than chance, and hardly of use
        (0.1, 10, 20, WARNED),  # too few samples to be sure
        (0.5, 2, 60, WARNED),
        (0.5, 2, 3000, REFUSED),
        (0.01, 100, 400, REFUSED),
    ],
)
def test_accuracy_is_compared_with_the_commonest_class(accuracy, width, count, expected):
    labels = np.arange(count) % width
    assert verdict(CLASSES, logits_for(labels, accuracy, width), labels) == expected


def test_a_fine_teacher_of_few_samples_is_hardly_ever_warned_of_and_never_refused():
    labels = np.arange(24) % 4
    verdicts = [verdict(CLASSES, logits_for(labels, 0.85, 4, seed), labels) for seed in range(200)]
    assert verdicts.count(FINE) == 200


@pytest.mark.parametrize("width", [2, 10, 50])
def test_classes_in_another_order_are_named(width):
    labels = np.arange(400) % width
    order = np.random.default_rng(1).permutation(width) if width > 2 else np.array([1, 0])
    logits = logits_for(labels, 0.95, width)[:, order]
    (problem,) = quality_problems(CLASSES, logits, labels)
    assert problem.is_worthless
    assert "its classes seem to be in another order than the labels, in which it would be right on 95.0%" in problem.text
    if width <= 10:
        columns = json.loads(problem.text.partition("return logits[:, ")[2][:-1])
        assert (logits[:, columns].argmax(1) == labels).mean() == 0.95
    else:
        assert "for example, its output " in problem.text


def test_two_classes_that_are_swapped_give_a_warning():
    labels = np.arange(400) % 10
    (problem,) = quality_problems(CLASSES, logits_for(labels, 0.95, 10)[:, [0, 1, 3, 2, 4, 5, 6, 7, 8, 9]], labels)
    assert not problem.is_worthless
    assert "return logits[:, [0, 1, 3, 2, 4, 5, 6, 7, 8, 9]]" in problem.text


def test_a_teacher_of_rare_classes_that_ranks_them_is_fine_and_one_that_does_not_is_not():
    labels = (np.arange(600) % 20 == 0).astype(np.int64)
    generator = np.random.default_rng(0)
    ranking = labels + 0.5 * generator.standard_normal(600) - 3  # never predicts class 1
    assert verdict(CLASSES, np.stack([np.zeros(600), ranking], 1), labels) is FINE
    constant = np.stack([np.zeros(600), 0.1 * generator.standard_normal(600) - 3], 1)
    assert verdict(CLASSES, constant, labels) is WARNED  # 600 samples with 30 of the class do not prove it
    assert verdict(CLASSES, np.tile(constant, (20, 1)), np.tile(labels, 20)) is REFUSED


def test_samples_without_a_label_are_left_out():
    labels = np.arange(300) % 3
    logits = logits_for(labels, 0.9, 3)
    unlabelled = np.where(np.arange(300) % 2, -1, labels)
    assert verdict(CLASSES, logits, unlabelled) is FINE
    assert verdict(CLASSES, logits[::-1].copy(), np.full(300, -1)) is FINE  # nothing is known


@pytest.mark.parametrize("heads", [(3, 3), (3, 4)])
def test_each_head_is_judged(heads):
    labels = np.stack([np.arange(300) % 3, np.arange(300) // 3 % heads[1]], 1)
    outputs = np.concatenate([logits_for(labels[:, head], 0.9, heads[head], head) for head in (0, 1)], 1)
    spec = OutputSpec(heads=heads)
    assert verdict(spec, outputs, labels) is FINE
    outputs[:, 3:] = logits_for(labels[:, 1], 0.2, heads[1])
    assert verdict(spec, outputs, labels) == (REFUSED if heads == (3, 4) else FINE)  # equal heads are the tokens of a sequence


def test_independent_labels_are_judged_by_their_ranking():
    generator = np.random.default_rng(0)
    labels = (generator.random((400, 5)) < [0.02, 0.05, 0.1, 0.3, 0.5]).astype(np.int64)
    outputs = 2 * labels + generator.standard_normal((400, 5)) - 4
    assert verdict(MULTILABEL, outputs, labels) is FINE
    assert verdict(MULTILABEL, outputs[::-1], labels) is REFUSED
    (reversed_sign,) = quality_problems(MULTILABEL, -outputs.astype(np.float32), labels)
    assert "is their sign reversed?" in reversed_sign.text
    (reordered,) = quality_problems(MULTILABEL, np.roll(outputs, 1, axis=1).astype(np.float32), labels)
    assert "in another order than the labels" in reordered.text
    assert reordered.is_worthless


def test_numbers_are_compared_with_their_mean():
    generator = np.random.default_rng(0)
    labels = generator.standard_normal((300, 2)).astype(np.float32) * [1, 50] + [0, 200]
    outputs = labels + generator.standard_normal((300, 2)) * [0.5, 25]
    assert verdict(REGRESSION, outputs, labels) is FINE
    assert verdict(REGRESSION, outputs[::-1], labels) is REFUSED
    assert verdict(REGRESSION, outputs[:9][::-1], labels[:9]) in {WARNED, REFUSED}
    (problem,) = quality_problems(REGRESSION, (outputs / 100).astype(np.float32), labels)
    assert not problem.is_worthless
    assert "seems to have another unit than the labels" in problem.text


def softmax(logits):
    exponentials = np.exp(logits)
    return exponentials / exponentials.sum(1, keepdims=True)


LOGITS = np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32) * 3
PROBABILITIES = softmax(LOGITS)
SIGMOIDS = 1 / (1 + np.exp(-LOGITS))


@pytest.mark.parametrize(
    ("spec", "outputs", "expected", "remedy"),
    [
        (CLASSES, LOGITS, FINE, ""),
        (CLASSES, PROBABILITIES, REFUSED, "return torch.log(p)"),
        (CLASSES, PROBABILITIES.astype(np.float16).astype(np.float32), REFUSED, "return torch.log(p)"),
        (CLASSES, np.eye(4, dtype=np.float32)[np.arange(60) % 4], REFUSED, "return torch.log(p)"),
        (CLASSES, np.log(PROBABILITIES), WARNED, "leave out its last log_softmax"),
        (CLASSES, SIGMOIDS, WARNED, "expected logits"),
        (OutputSpec(heads=(2, 2)), np.concatenate([softmax(LOGITS[:, :2]), softmax(LOGITS[:, 2:])], 1), REFUSED, "return torch.log(p)"),
        (OutputSpec(heads=(1, 3)), LOGITS, FINE, ""),
        (MULTILABEL, SIGMOIDS, REFUSED, "return torch.logit(p)"),
        (MULTILABEL, LOGITS, FINE, ""),
        (REGRESSION, PROBABILITIES, FINE, ""),
    ],
)
def test_probabilities_are_recognized(spec, outputs, expected, remedy):
    problem = probability_problem(spec, outputs)
    assert (problem and problem.is_worthless) == expected
    assert problem is None or remedy in problem.text


def test_small_logits_of_fresh_weights_are_not_taken_for_probabilities():
    assert probability_problem(CLASSES, np.full((2, 3), 0.6, np.float32), trained=False) is None
