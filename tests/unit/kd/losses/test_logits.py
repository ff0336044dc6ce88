# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from edgekd.domain import losses as words
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
    found, wanted = _log_softmax(student.numpy() / temperature), _log_softmax(teacher.numpy() / temperature)
    return temperature**2 * (np.exp(wanted) * (wanted - found)).sum(1).mean()


def test_every_kind_of_the_recipe_has_its_function():
    assert set(losses.LOSSES) | set(features.FEATURES) == set(words.LOSSES)
    assert set(features.FEATURES) == set(words.TAPPED)


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


def test_ce_with_label_smoothing_spreads_the_share_over_all_classes(logits):
    target = np.full((7, 5), 0.1 / 5)
    target[np.arange(7), LABELS.numpy()] += 0.9
    expected = -(target * _log_softmax(logits[0].numpy())).sum(1).mean()
    assert losses.ce(logits[0], LABELS, 0.1).item() == pytest.approx(expected, rel=1e-6)


def test_ce_without_any_label_is_zero_and_pulls_nowhere(logits):
    student = logits[0].requires_grad_()
    loss = losses.ce(student, torch.full((7,), losses.UNLABELLED))
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


def test_kl_of_a_network_to_itself_is_zero(logits):
    assert losses.kl(logits[0], logits[0], 4.0).item() == pytest.approx(0, abs=1e-6)
    assert losses.kl(*logits, 4.0).item() > 0.01


def test_more_classes_that_cannot_be_do_not_change_a_loss(logits):
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


def test_the_size_of_the_gradient_of_kl_settles_as_the_temperature_grows(logits):
    student, teacher = (item.double() for item in logits)
    norms = [_gradient(lambda found, t=t: losses.kl(found, teacher, t), student).norm().item() for t in (50.0, 100.0, 400.0, 1600.0)]
    assert norms[3] == pytest.approx(norms[2], rel=0.01)
    centred = [item - item.mean(1, keepdim=True) for item in (student, teacher)]
    assert norms[3] == pytest.approx((centred[0] - centred[1]).norm().item() / (7 * 5), rel=0.01)  # Hinton et al., equation 4


def test_the_gradient_of_kl_at_temperature_one_is_that_of_ce_to_soft_labels(logits):
    student, teacher = logits
    soft = torch.softmax(teacher, dim=1)
    expected = _gradient(lambda found: torch.nn.functional.cross_entropy(found, soft), student)
    torch.testing.assert_close(_gradient(lambda found: losses.kl(found, teacher, 1.0), student), expected)


def test_the_gradients_are_right(logits):
    student, teacher = logits[0].double().requires_grad_(), logits[1].double()
    assert torch.autograd.gradcheck(lambda found: losses.kl(found, teacher, 3.0), student)
    assert torch.autograd.gradcheck(lambda found: losses.ce(found, LABELS, 0.1), student)


def test_half_precision_is_widened_before_the_softmax(logits):
    halves = [item.bfloat16() for item in logits]
    found = losses.kl(*halves, 4.0)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(losses.kl(*[item.float() for item in halves], 4.0).item(), rel=1e-6)


def test_total_is_the_weighted_sum(logits):
    found = losses.total_loss([Loss("kl", 0.9, temperature=4.0), Loss("ce", 0.1)], logits[0], {"frozen": logits[1]}, LABELS)
    assert found.item() == pytest.approx(0.9 * losses.kl(*logits, 4.0).item() + 0.1 * losses.ce(logits[0], LABELS).item(), rel=1e-6)


def test_a_loss_of_a_recipe_has_the_options_that_its_function_takes():
    for kind, options in words.LOSSES.items():
        function = {**losses.LOSSES, **features.FEATURES}[kind]
        assert inspect.signature(function).parameters.keys() - {"student", "teacher", "labels"} == options.keys()


def test_standardized_kl_is_kl_of_logits_without_mean_and_scale(logits):
    student, teacher = ((item - item.mean(1, keepdim=True)) / item.std(1, keepdim=True) for item in logits)
    assert losses.kl(*logits, 2.0, standardize=True).item() == pytest.approx(_kl(student, teacher, 2.0), rel=1e-5)
    moved = [5 * logits[0] + 3, 0.1 * logits[1] - 2]
    assert losses.kl(*moved, 2.0, standardize=True).item() == pytest.approx(_kl(student, teacher, 2.0), rel=1e-4)
    assert torch.isfinite(losses.kl(torch.zeros(2, 4), torch.ones(2, 4), 2.0, standardize=True))


def _dkd(student, teacher, labels, temperature, target_weight, rest_weight):
    """Sample by sample in float64, from the paper's equation 7."""
    summed = 0.0
    for found, wanted, label in zip(student.numpy().astype(np.float64), teacher.numpy().astype(np.float64), labels.numpy(), strict=True):
        shares = [np.exp(item / temperature) / np.exp(item / temperature).sum() for item in (found, wanted)]
        binary = [np.array([item[label], 1 - item[label]]) for item in shares]
        rest = [np.delete(item, label) / (1 - item[label]) for item in shares]
        target, among = (float((item[1] * np.log(item[1] / item[0])).sum()) for item in (binary, rest))
        summed += target_weight * target + rest_weight * among
    return temperature**2 * summed / len(labels)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_dkd_is_the_papers_sum_of_two_divergences(logits, temperature):
    assert losses.dkd(*logits, LABELS, temperature, 1.0, 8.0).item() == pytest.approx(
        _dkd(*logits, LABELS, temperature, 1.0, 8.0), rel=1e-5
    )


def test_dkd_whose_second_weight_is_what_the_teacher_leaves_is_kl(logits):
    for row in range(7):
        student, teacher = (item[row : row + 1].double() for item in logits)
        left = 1 - torch.softmax(teacher / 3.0, dim=1)[0, LABELS[row]].item()
        found = losses.dkd(student, teacher, LABELS[row : row + 1], 3.0, 1.0, left)
        assert found.item() == pytest.approx(losses.kl(student, teacher, 3.0).item(), rel=1e-9)


def test_dkd_reads_labelled_samples_only(logits):
    labels = LABELS.clone()
    labels[3:] = losses.UNLABELLED
    expected = losses.dkd(logits[0][:3], logits[1][:3], LABELS[:3], 4.0, 1.0, 8.0)
    assert losses.dkd(*logits, labels, 4.0, 1.0, 8.0).item() == pytest.approx(expected.item(), rel=1e-6)
    student = logits[0].clone().requires_grad_()
    losses.dkd(student, logits[1], torch.full((7,), losses.UNLABELLED), 4.0, 1.0, 8.0).backward()
    assert not student.grad.any()


def _dist(student, teacher, temperature, inter_weight, intra_weight):
    found, wanted = (np.exp(_log_softmax(item.numpy() / temperature)) for item in (student, teacher))
    inter = np.mean([1 - np.corrcoef(*rows)[0, 1] for rows in zip(found, wanted, strict=True)])
    intra = np.mean([1 - np.corrcoef(*rows)[0, 1] for rows in zip(found.T, wanted.T, strict=True)])
    return temperature**2 * (inter_weight * inter + intra_weight * intra)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 0.0), (0.0, 3.0)])
def test_dist_is_one_less_the_correlation_of_rows_and_of_columns(logits, weights):
    assert losses.dist(*logits, 2.0, *weights).item() == pytest.approx(_dist(*logits, 2.0, *weights), rel=1e-4)


def test_hard_is_the_cross_entropy_of_the_teachers_own_answers(logits):
    expected = -_log_softmax(logits[0].numpy())[np.arange(7), logits[1].numpy().argmax(1)].mean()
    assert losses.hard(*logits).item() == pytest.approx(expected, rel=1e-6)
    assert losses.hard(logits[0], logits[1] * 7 + 2).item() == pytest.approx(expected, rel=1e-6)


def test_mse_is_the_mean_squared_difference(logits):
    assert losses.mse(*logits).item() == pytest.approx(((logits[0] - logits[1]).numpy().astype(np.float64) ** 2).mean(), rel=1e-6)


def _value(kind, student, teacher, labels=LABELS):
    return losses.total_loss([Loss(kind)], student, {"frozen": teacher}, labels)


@pytest.mark.parametrize("kind", ["dist", "dkd", "mse"])
def test_matching_the_teacher_is_zero_and_less_is_more(logits, kind):
    assert _value(kind, logits[1], logits[1]).item() == pytest.approx(0, abs=1e-6)
    assert _value(kind, *logits).item() > 0.01


@pytest.mark.parametrize("kind", ["dist", "dkd", "hard", "mse"])
def test_no_loss_depends_on_the_size_of_the_batch(logits, kind):
    twice = [torch.cat([item, item]) for item in logits]
    assert _value(kind, *twice, torch.cat([LABELS, LABELS])).item() == pytest.approx(_value(kind, *logits).item(), rel=1e-5)


def test_classes_that_cannot_be_do_not_change_dkd(logits):
    padded = [torch.cat([item, torch.full((7, 90), -1e4)], dim=1) for item in logits]
    assert _value("dkd", *padded).item() == pytest.approx(_value("dkd", *logits).item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["dist", "dkd", "hard", "mse"])
def test_each_gradient_is_right(logits, kind):
    student, teacher = logits[0].double().requires_grad_(), logits[1].double()
    assert torch.autograd.gradcheck(lambda found: _value(kind, found, teacher), student)
    assert torch.autograd.gradcheck(lambda found: losses.kl(found, teacher, 2.0, standardize=True), student)


def test_the_gradient_of_dkd_settles_as_the_temperature_grows(logits):
    student, teacher = (item.double() for item in logits)
    norms = [_gradient(lambda found, t=t: losses.dkd(found, teacher, LABELS, t, 1.0, 1.0), student).norm().item() for t in (400.0, 1600.0)]
    assert norms[1] == pytest.approx(norms[0], rel=0.01)


@pytest.mark.parametrize("kind", ["dist", "dkd", "hard", "mse"])
def test_half_precision_is_widened(logits, kind):
    halves = [item.bfloat16() for item in logits]
    found = _value(kind, *halves)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(_value(kind, *[item.float() for item in halves]).item(), rel=1e-6)
