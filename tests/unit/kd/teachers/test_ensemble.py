# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from edgekd.kd.teachers.ensemble import ensemble_logits

LABELS = torch.tensor([0, 1, 2, -1])


def drawn(seed):
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))


def test_weights_give_the_mean_of_logits():
    found = ensemble_logits([drawn(0), drawn(1)], (3.0, 1.0), LABELS, "weights")
    assert torch.allclose(found, 0.75 * drawn(0) + 0.25 * drawn(1))


def test_the_scale_of_the_weights_does_not_matter():
    answers = [drawn(0), drawn(1), drawn(2)]
    assert torch.allclose(
        ensemble_logits(answers, (3.0, 1.0, 2.0), LABELS, "confidence"), ensemble_logits(answers, (6.0, 2.0, 4.0), LABELS, "confidence")
    )


def test_confidence_is_that_of_the_paper():
    answers, weights = [drawn(0), drawn(1), drawn(2)], []
    entropy = torch.stack([torch.nn.functional.cross_entropy(item[:3], LABELS[:3], reduction="none") for item in answers])
    weights = (1 - entropy.exp() / entropy.exp().sum(0)) / 2
    expected = (weights[:, :, None] * torch.stack([item[:3] for item in answers])).sum(0)
    assert torch.allclose(ensemble_logits(answers, (1.0, 1.0, 1.0), LABELS, "confidence")[:3], expected, atol=1e-6)


def test_the_teacher_that_is_right_counts_for_more():
    right, wrong = torch.tensor([[5.0, 0.0, 0.0]]), torch.tensor([[0.0, 5.0, 0.0]])
    found = ensemble_logits([wrong, right], (1.0, 1.0), torch.tensor([0]), "confidence")
    assert found.argmax().item() == 0
    assert ensemble_logits([wrong, right], (1.0, 1.0), torch.tensor([0]), "weights")[0, 0] == pytest.approx(2.5)


def test_without_a_label_the_surer_teacher_counts_for_more():
    sure, unsure = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.1, 0.0]])
    assert ensemble_logits([sure, unsure], (1.0, 1.0), torch.tensor([-1]), "confidence")[0, 0] > 4.5


def test_a_teacher_that_is_surely_wrong_gives_no_nan():
    answers = [torch.tensor([[1000.0, 0.0]]), torch.tensor([[1000.0, 0.0]])]
    assert torch.isfinite(ensemble_logits(answers, (1.0, 1.0), torch.tensor([1]), "confidence")).all()
