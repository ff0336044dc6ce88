# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from edgekd.kd.teachers.ensemble import ensemble_logits

LABELS = torch.tensor([0, 1, 2, -1])


def random_logits(seed):
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))


def test_fixed_weights_give_the_weighted_mean_of_logits():
    mean = ensemble_logits([random_logits(0), random_logits(1)], (3.0, 1.0), LABELS, "fixed")
    assert torch.allclose(mean, 0.75 * random_logits(0) + 0.25 * random_logits(1))


def test_the_scale_of_the_weights_does_not_matter():
    logits = [random_logits(0), random_logits(1), random_logits(2)]
    assert torch.allclose(
        ensemble_logits(logits, (3.0, 1.0, 2.0), LABELS, "confidence"), ensemble_logits(logits, (6.0, 2.0, 4.0), LABELS, "confidence")
    )


def test_confidence_weights_are_those_of_the_paper():
    logits = [random_logits(0), random_logits(1), random_logits(2)]
    entropy = torch.stack([torch.nn.functional.cross_entropy(item[:3], LABELS[:3], reduction="none") for item in logits])
    weights = (1 - entropy.exp() / entropy.exp().sum(0)) / 2
    expected = (weights[:, :, None] * torch.stack([item[:3] for item in logits])).sum(0)
    assert torch.allclose(ensemble_logits(logits, (1.0, 1.0, 1.0), LABELS, "confidence")[:3], expected, atol=1e-6)


def test_the_teacher_that_predicts_the_label_gets_more_weight():
    right, wrong = torch.tensor([[5.0, 0.0, 0.0]]), torch.tensor([[0.0, 5.0, 0.0]])
    mean = ensemble_logits([wrong, right], (1.0, 1.0), torch.tensor([0]), "confidence")
    assert mean.argmax().item() == 0
    assert ensemble_logits([wrong, right], (1.0, 1.0), torch.tensor([0]), "fixed")[0, 0] == pytest.approx(2.5)


def test_without_a_label_the_more_confident_teacher_gets_more_weight():
    confident, uncertain = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.1, 0.0]])
    assert ensemble_logits([confident, uncertain], (1.0, 1.0), torch.tensor([-1]), "confidence")[0, 0] > 4.5


def test_confident_and_wrong_teachers_give_no_nan():
    logits = [torch.tensor([[1000.0, 0.0]]), torch.tensor([[1000.0, 0.0]])]
    assert torch.isfinite(ensemble_logits(logits, (1.0, 1.0), torch.tensor([1]), "confidence")).all()
