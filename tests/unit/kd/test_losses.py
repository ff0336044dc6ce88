# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from edgekd.domain import recipe
from edgekd.domain.recipe import Loss
from edgekd.kd import losses


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
    assert set(losses.LOSSES) == set(recipe.LOSSES)


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
    found = losses.total([Loss("kl", 0.9, 4.0), Loss("ce", 0.1)], *logits, LABELS)
    assert found.item() == pytest.approx(0.9 * losses.kl(*logits, 4.0).item() + 0.1 * losses.ce(logits[0], LABELS).item(), rel=1e-6)


def test_kl_without_a_temperature_is_refused(logits):
    with pytest.raises(ValueError, match="temperature"):
        losses.total([Loss("kl")], *logits, LABELS)
