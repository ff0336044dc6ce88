# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from edgekd.domain import losses as domain
from edgekd.domain.losses import Loss
from edgekd.kd import losses
from edgekd.kd.losses import features


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    return [3 * torch.randn(7, 5, generator=generator) for _ in range(2)]


LABELS = torch.tensor([0, 4, 2, 2, 1, 3, 0])


def _log_softmax(values):
    values = values.astype(np.float64)
    return values - np.log(np.exp(values - values.max(1, keepdims=True)).sum(1, keepdims=True)) - values.max(1, keepdims=True)


def _kl(student, teacher, temperature):
    student, teacher = (_log_softmax(logits.numpy() / temperature) for logits in (student, teacher))
    return temperature**2 * (np.exp(teacher) * (teacher - student)).sum(1).mean()


def test_every_kind_of_loss_in_the_recipe_has_a_function():
    assert set(losses.LOSSES) | set(features.FEATURES) == set(domain.LOSSES)
    assert set(features.FEATURES) == set(domain.TAPPED)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_kl_is_the_mean_over_samples_of_the_divergence_times_the_square_of_the_temperature(logits, temperature):
    assert losses.kl(*logits, temperature).item() == pytest.approx(_kl(*logits, temperature), rel=1e-5)


def test_ce_is_the_mean_over_labelled_samples(logits):
    expected = -_log_softmax(logits[0].numpy())[np.arange(7), LABELS.numpy()].mean()
    assert losses.ce(logits[0], LABELS).item() == pytest.approx(expected, rel=1e-6)
    labels = LABELS.clone()
    labels[3:] = losses.UNLABELLED
    expected = -_log_softmax(logits[0].numpy())[np.arange(3), LABELS.numpy()[:3]].mean()
    assert losses.ce(logits[0], labels).item() == pytest.approx(expected, rel=1e-6)


def test_label_smoothing_spreads_probability_over_all_classes(logits):
    target = np.full((7, 5), 0.1 / 5)
    target[np.arange(7), LABELS.numpy()] += 0.9
    expected = -(target * _log_softmax(logits[0].numpy())).sum(1).mean()
    assert losses.ce(logits[0], LABELS, 0.1).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_ce_of_class_probabilities_is_the_mean_of_that_of_both_labels_by_their_shares(logits, label_smoothing):
    partners, shares = LABELS.flip(0), torch.linspace(0.5, 1, 7)
    probabilities = torch.zeros(7, 5)
    for row in range(7):
        probabilities[row, LABELS[row]] += shares[row]
        probabilities[row, partners[row]] += 1 - shares[row]
    probabilities[2] = 0  # has no label
    labelled = [row for row in range(7) if row != 2]
    parts = [
        share * losses.ce(logits[0][[row]], labels[[row]], label_smoothing)
        for row in labelled
        for labels, share in ((LABELS, shares[row]), (partners, 1 - shares[row]))
    ]
    expected = float(sum(parts)) / len(labelled)
    assert losses.ce(logits[0], probabilities, label_smoothing).item() == pytest.approx(expected, rel=1e-5)


def test_ce_without_labels_is_zero_and_has_no_gradient(logits):
    student = logits[0].requires_grad_()
    loss = losses.ce(student, torch.full((7,), losses.UNLABELLED))
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


def test_kl_of_equal_logits_is_zero(logits):
    assert losses.kl(logits[0], logits[0], 4.0).item() == pytest.approx(0, abs=1e-6)
    assert losses.kl(*logits, 4.0).item() > 0.01


def test_further_impossible_classes_do_not_change_a_loss(logits):
    padded = [torch.cat([item, torch.full((7, 90), -1e4)], dim=1) for item in logits]
    assert losses.kl(*padded, 4.0).item() == pytest.approx(losses.kl(*logits, 4.0).item(), rel=1e-6)
    assert losses.ce(padded[0], LABELS).item() == pytest.approx(losses.ce(logits[0], LABELS).item(), rel=1e-6)


def test_a_loss_does_not_depend_on_the_size_of_the_batch(logits):
    twice = [torch.cat([item, item]) for item in logits]
    assert losses.kl(*twice, 2.0).item() == pytest.approx(losses.kl(*logits, 2.0).item(), rel=1e-6)
    assert losses.ce(twice[0], torch.cat([LABELS, LABELS])).item() == pytest.approx(losses.ce(logits[0], LABELS).item(), rel=1e-6)


def _gradient(loss, student):
    student = student.clone().requires_grad_()
    loss(student).backward()
    return student.grad


def test_the_size_of_the_gradient_of_kl_converges_as_the_temperature_grows(logits):
    student, teacher = (item.double() for item in logits)
    norms = [_gradient(lambda logits, t=t: losses.kl(logits, teacher, t), student).norm().item() for t in (50.0, 100.0, 400.0, 1600.0)]
    assert norms[3] == pytest.approx(norms[2], rel=0.01)
    centred = [item - item.mean(1, keepdim=True) for item in (student, teacher)]
    assert norms[3] == pytest.approx((centred[0] - centred[1]).norm().item() / (7 * 5), rel=0.01)  # Hinton et al., equation 4


def test_the_gradient_of_kl_at_temperature_one_is_that_of_ce_to_soft_labels(logits):
    student, teacher = logits
    probabilities = torch.softmax(teacher, dim=1)
    expected = _gradient(lambda logits: torch.nn.functional.cross_entropy(logits, probabilities), student)
    torch.testing.assert_close(_gradient(lambda logits: losses.kl(logits, teacher, 1.0), student), expected)


def test_the_gradients_of_kl_and_ce_are_correct(logits):
    student, teacher = logits[0].double().requires_grad_(), logits[1].double()
    assert torch.autograd.gradcheck(lambda logits: losses.kl(logits, teacher, 3.0), student)
    assert torch.autograd.gradcheck(lambda logits: losses.ce(logits, LABELS, 0.1), student)


def test_half_precision_is_converted_before_the_softmax(logits):
    halves = [item.bfloat16() for item in logits]
    loss = losses.kl(*halves, 4.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(losses.kl(*[item.float() for item in halves], 4.0).item(), rel=1e-6)


def test_the_total_loss_is_the_weighted_sum(logits):
    loss = losses.total_loss([Loss("kl", 0.9, temperature=4.0), Loss("ce", 0.1)], logits[0], {"frozen": logits[1]}, LABELS)
    assert loss.item() == pytest.approx(0.9 * losses.kl(*logits, 4.0).item() + 0.1 * losses.ce(logits[0], LABELS).item(), rel=1e-6)


def test_a_loss_of_a_recipe_has_the_options_of_its_function():
    for kind, options in domain.LOSSES.items():
        function = {**losses.LOSSES, **features.FEATURES}[kind]
        assert inspect.signature(function).parameters.keys() - {"student", "teacher", "labels"} == options.keys()


def test_standardized_kl_is_kl_of_standardized_logits(logits):
    student, teacher = ((item - item.mean(1, keepdim=True)) / item.std(1, keepdim=True) for item in logits)
    assert losses.kl(*logits, 2.0, standardize=True).item() == pytest.approx(_kl(student, teacher, 2.0), rel=1e-5)
    transformed = [5 * logits[0] + 3, 0.1 * logits[1] - 2]
    assert losses.kl(*transformed, 2.0, standardize=True).item() == pytest.approx(_kl(student, teacher, 2.0), rel=1e-4)
    assert torch.isfinite(losses.kl(torch.zeros(2, 4), torch.ones(2, 4), 2.0, standardize=True))


def _dkd(student, teacher, labels, temperature, target_weight, rest_weight):
    """Sample by sample in float64, from equation 7 of the paper."""
    total = 0.0
    for *logits, label in zip(student.numpy().astype(np.float64), teacher.numpy().astype(np.float64), labels.numpy(), strict=True):
        probabilities = [np.exp(item / temperature) / np.exp(item / temperature).sum() for item in logits]
        binary = [np.array([item[label], 1 - item[label]]) for item in probabilities]
        other_classes = [np.delete(item, label) / (1 - item[label]) for item in probabilities]
        target, rest = (float((item[1] * np.log(item[1] / item[0])).sum()) for item in (binary, other_classes))
        total += target_weight * target + rest_weight * rest
    return temperature**2 * total / len(labels)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_dkd_is_the_sum_of_two_divergences_of_the_paper(logits, temperature):
    assert losses.dkd(*logits, LABELS, temperature, 1.0, 8.0).item() == pytest.approx(
        _dkd(*logits, LABELS, temperature, 1.0, 8.0), rel=1e-5
    )


def test_dkd_is_kl_if_its_second_weight_is_the_teachers_probability_of_the_other_classes(logits):
    for row in range(7):
        student, teacher = (item[row : row + 1].double() for item in logits)
        rest = 1 - torch.softmax(teacher / 3.0, dim=1)[0, LABELS[row]].item()
        loss = losses.dkd(student, teacher, LABELS[row : row + 1], 3.0, 1.0, rest)
        assert loss.item() == pytest.approx(losses.kl(student, teacher, 3.0).item(), rel=1e-9)


def test_dkd_uses_labelled_samples_only(logits):
    labels = LABELS.clone()
    labels[3:] = losses.UNLABELLED
    expected = losses.dkd(logits[0][:3], logits[1][:3], LABELS[:3], 4.0, 1.0, 8.0)
    assert losses.dkd(*logits, labels, 4.0, 1.0, 8.0).item() == pytest.approx(expected.item(), rel=1e-6)
    student = logits[0].clone().requires_grad_()
    losses.dkd(student, logits[1], torch.full((7,), losses.UNLABELLED), 4.0, 1.0, 8.0).backward()
    assert not student.grad.any()


def _dist(student, teacher, temperature, inter_weight, intra_weight):
    student, teacher = (np.exp(_log_softmax(logits.numpy() / temperature)) for logits in (student, teacher))
    inter = np.mean([1 - np.corrcoef(*rows)[0, 1] for rows in zip(student, teacher, strict=True)])
    intra = np.mean([1 - np.corrcoef(*columns)[0, 1] for columns in zip(student.T, teacher.T, strict=True)])
    return temperature**2 * (inter_weight * inter + intra_weight * intra)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 0.0), (0.0, 3.0)])
def test_dist_is_one_minus_the_correlation_of_rows_and_of_columns(logits, weights):
    assert losses.dist(*logits, 2.0, *weights).item() == pytest.approx(_dist(*logits, 2.0, *weights), rel=1e-4)


def test_hard_is_the_cross_entropy_of_the_classes_that_the_teacher_predicts(logits):
    expected = -_log_softmax(logits[0].numpy())[np.arange(7), logits[1].numpy().argmax(1)].mean()
    assert losses.hard(*logits).item() == pytest.approx(expected, rel=1e-6)
    assert losses.hard(logits[0], logits[1] * 7 + 2).item() == pytest.approx(expected, rel=1e-6)


def test_mse_is_the_mean_squared_difference(logits):
    assert losses.mse(*logits).item() == pytest.approx(((logits[0] - logits[1]).numpy().astype(np.float64) ** 2).mean(), rel=1e-6)


def _value(kind, student, teacher, labels=LABELS):
    return losses.total_loss([Loss(kind)], student, {"frozen": teacher}, labels)


@pytest.mark.parametrize("kind", ["dist", "dkd", "mse"])
def test_a_loss_is_zero_for_equal_logits_and_positive_for_others(logits, kind):
    assert _value(kind, logits[1], logits[1]).item() == pytest.approx(0, abs=1e-6)
    assert _value(kind, *logits).item() > 0.01


@pytest.mark.parametrize("kind", ["dist", "dkd", "hard", "mse"])
def test_no_loss_depends_on_the_size_of_the_batch(logits, kind):
    twice = [torch.cat([item, item]) for item in logits]
    assert _value(kind, *twice, torch.cat([LABELS, LABELS])).item() == pytest.approx(_value(kind, *logits).item(), rel=1e-5)


def test_impossible_classes_do_not_change_dkd(logits):
    padded = [torch.cat([item, torch.full((7, 90), -1e4)], dim=1) for item in logits]
    assert _value("dkd", *padded).item() == pytest.approx(_value("dkd", *logits).item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["dist", "dkd", "hard", "mse"])
def test_each_gradient_is_correct(logits, kind):
    student, teacher = logits[0].double().requires_grad_(), logits[1].double()
    assert torch.autograd.gradcheck(lambda logits: _value(kind, logits, teacher), student)
    assert torch.autograd.gradcheck(lambda logits: losses.kl(logits, teacher, 2.0, standardize=True), student)


def test_the_gradient_of_dkd_converges_as_the_temperature_grows(logits):
    student, teacher = (item.double() for item in logits)
    norms = [
        _gradient(lambda logits, t=t: losses.dkd(logits, teacher, LABELS, t, 1.0, 1.0), student).norm().item() for t in (400.0, 1600.0)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=0.01)


@pytest.mark.parametrize("kind", ["dist", "dkd", "hard", "mse"])
def test_half_precision_is_converted_to_float32(logits, kind):
    halves = [item.bfloat16() for item in logits]
    loss = _value(kind, *halves)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(_value(kind, *[item.float() for item in halves]).item(), rel=1e-6)
