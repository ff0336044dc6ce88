# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch.nn import functional

from edgekd.kd import losses, output_spec
from edgekd.kd.output_spec import OutputSpec


def random_logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def total(spec, loss, student, *targets):
    """Return the mean of a loss over the rows of outputs and labels."""
    rows = [
        output_spec.logit_rows(spec, item) if item.is_floating_point() else output_spec.label_rows(spec, item)
        for item in (student, *targets)
    ]
    values = [loss(*items) for items in zip(*rows, strict=True)]
    return sum(values) / len(values)


def softened_kl(student, teacher):
    return losses.kl(student, teacher, 2.0)


def test_independent_labels_give_the_binary_cross_entropy():
    student, labels = random_logits(5, 4), torch.randint(0, 2, (5, 4))
    expected = functional.binary_cross_entropy_with_logits(student, labels.float())
    assert total(OutputSpec("multilabel"), losses.ce, student, labels).item() == pytest.approx(expected.item(), rel=1e-6)


def test_independent_labels_give_the_binary_divergence():
    student, teacher = random_logits(5, 4), random_logits(5, 4, seed=1)
    p, q = (teacher / 2).sigmoid(), (student / 2).sigmoid()
    expected = 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    loss = total(OutputSpec("multilabel"), softened_kl, student, teacher)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_each_head_has_its_own_loss():
    student, labels = random_logits(5, 7), torch.stack([torch.randint(0, 3, (5,)), torch.randint(0, 4, (5,))], dim=1)
    expected = (functional.cross_entropy(student[:, :3], labels[:, 0]) + functional.cross_entropy(student[:, 3:], labels[:, 1])) / 2
    assert total(OutputSpec(heads=(3, 4)), losses.ce, student, labels).item() == pytest.approx(expected.item(), rel=1e-6)


def test_tokens_without_a_label_do_not_count():
    student, labels = random_logits(5, 6 * 3), torch.randint(0, 3, (5, 6))
    labels[:, 4:] = -1
    expected = functional.cross_entropy(student.reshape(5, 6, 3)[:, :4].reshape(-1, 3), labels[:, :4].reshape(-1))
    assert total(OutputSpec(heads=(3,) * 6), losses.ce, student, labels).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("spec", [OutputSpec(), OutputSpec("multilabel"), OutputSpec(heads=(3, 3)), OutputSpec(heads=(2, 4))])
def test_the_divergence_of_logits_from_themselves_is_zero(spec):
    student = random_logits(5, 6)
    assert total(spec, softened_kl, student, student).item() == pytest.approx(0, abs=1e-6)


def test_correct_predictions_are_counted():
    assert output_spec.count_correct(OutputSpec(), torch.eye(3), torch.tensor([0, 1, -1])) == (2, 2)
    assert output_spec.count_correct(
        OutputSpec("multilabel"), torch.tensor([[1.0, -1.0], [2.0, 3.0]]), torch.tensor([[1, 0], [0, -1]])
    ) == (2, 3)
    assert output_spec.count_correct(OutputSpec(heads=(2, 3)), torch.tensor([[1.0, 0, 0, 0, 5]]), torch.tensor([[0, 1]])) == (1, 2)
    assert output_spec.count_correct(OutputSpec("regression"), torch.ones(3, 2), torch.ones(3, 2)) == (0, 0)


def test_labels_are_parsed_as_the_output_spec_has_them():
    assert output_spec.parse_labels(OutputSpec(), np.array([0, 1])).tolist() == [0, 1]
    assert output_spec.parse_labels(OutputSpec(), np.array([0.5, 1])) is None
    assert output_spec.parse_labels(OutputSpec("multilabel"), np.array([[0.0, 1.0]])).tolist() == [[0, 1]]
    assert output_spec.parse_labels(OutputSpec(heads=(2, 2)), np.array([[0, 1]])).dtype == torch.int64
    assert output_spec.parse_labels(OutputSpec("regression"), np.array([1, 2])).tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize(
    ("spec", "labels", "width", "message"),
    [
        (OutputSpec("multilabel"), np.zeros((4, 3)), 4, r"labels are float64 \[3\] each; expected 4 of 0 and 1"),
        (OutputSpec("multilabel"), np.full((4, 3), 2), 3, "int64 \\[3\\] each, 2 among them; expected 3 of 0 and 1"),
        (OutputSpec("multilabel"), np.array([[0.0, 0.5, 1.0]]), 3, "0.5 among them; expected 3 of 0 and 1"),
        (OutputSpec("regression"), np.array([1.0, -1e300]), 1, "has the number 1e\\+300; expected numbers in the range of float32"),
        (OutputSpec("regression"), np.zeros(4), 2, "expected 2 numbers for 2 outputs"),
        (OutputSpec(heads=(2, 3)), np.zeros((4, 2), int), 6, "add up to 5; the student has 6 outputs"),
        (OutputSpec(heads=(2, 3)), np.zeros((4, 3), int), 5, "expected 2 class ids"),
        (OutputSpec(heads=(2, 3)), np.full((4, 2), 2), 5, "head 0 has 2 classes and the label 2"),
    ],
)
def test_labels_that_do_not_match_are_reported(spec, labels, width, message):
    assert re.search(message, output_spec.label_problem(spec, labels, width))


def test_labels_that_match_are_accepted():
    assert output_spec.label_problem(OutputSpec(), np.zeros(4), 2) is None
    assert output_spec.label_problem(OutputSpec("multilabel"), np.eye(3), 3) is None
    assert output_spec.label_problem(OutputSpec("regression"), np.zeros(4), 1) is None
    assert output_spec.label_problem(OutputSpec("regression"), np.zeros((4, 2)), 2) is None
    assert output_spec.label_problem(OutputSpec(heads=(2, 3)), np.array([[1, 2], [-1, 0]]), 5) is None


def test_mse_labels_is_the_mean_over_known_numbers():
    student, labels = random_logits(3, 2), torch.tensor([[1.0, float("nan")], [0.0, 2.0], [float("nan")] * 2])
    student.requires_grad_()
    known = [(0, 0), (1, 0), (1, 1)]
    expected = sum((student[at] - labels[at]) ** 2 for at in known) / 3
    loss = losses.mse_labels(student, labels)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.isfinite(student.grad).all()
    assert losses.mse_labels(student, torch.full((3, 2), float("nan"))).item() == 0


@pytest.mark.parametrize("spec", [OutputSpec(), OutputSpec(heads=(2, 3)), OutputSpec("multilabel")])
def test_only_minus_one_means_no_label(spec):
    labels = np.array([[0, 1], [-1, 1], [1, -1]])
    assert output_spec.below_range_problem(spec, labels) is None
    assert output_spec.below_range_problem(spec, np.zeros((0, 2), int)) is None
    labels[1:] = -100
    problem = output_spec.below_range_problem(spec, labels)
    assert problem == (
        "has the label -100 (4 labels are below -1); expected class ids from 0, or -1 where there is none; "
        "replace torch's -100: labels[labels == -100] = -1"
    )
    labels[1:] = [0, -2]
    assert output_spec.below_range_problem(spec, labels).endswith("or -1 where there is none")
    assert output_spec.below_range_problem(OutputSpec("regression"), labels) is None
