# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.kd.soft_targets import shift, storage
from tests.stored import store


def _logits(samples, noise, seed, views=1):
    """Return the logits of a linear teacher for three clusters, with noise added to the inputs."""
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.eye(3)
    clean = centres[torch.arange(samples) % 3]
    teacher = nn.Linear(3, 3, bias=False)
    teacher.weight.data = torch.eye(3)
    with torch.no_grad():
        return np.stack([teacher(clean + noise * torch.randn(samples, 3, generator=generator)).numpy() for _ in range(views)])


@pytest.fixture
def mean_confidence(tmp_path):
    """Return the confidence of stored logits."""

    def of_logits(logits, slots=None):
        path = tmp_path / "a.safetensors"
        store(path, logits.astype(np.float32), slots=slots)
        return shift.mean_confidence(storage.open_soft_targets(path))

    return of_logits


def test_sampled_soft_targets_give_the_same_confidence(mean_confidence):
    logits = 3 * np.random.default_rng(0).standard_normal((2, 50, 300))
    dense, sampled = mean_confidence(logits, 0), mean_confidence(logits)
    assert (sampled.samples, sampled.mean) == (dense.samples, pytest.approx(dense.mean, abs=1e-3))
    assert sampled.variance == pytest.approx(dense.variance, rel=0.02)


def test_confidence_is_the_mean_of_the_largest_probability(mean_confidence):
    confidence = mean_confidence(np.log(np.array([[[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]]])))
    assert (confidence.samples, confidence.mean) == (2, pytest.approx(0.6, abs=1e-3))
    assert confidence.variance == pytest.approx(0.01, rel=0.01)


def test_views_of_one_sample_count_once(mean_confidence):
    assert mean_confidence(_logits(300, 0.5, 1, views=5)).samples == 300


@pytest.mark.parametrize("noise", [2.0, 3.0])
def test_noise_that_the_teacher_was_not_trained_on_gives_a_warning(noise, mean_confidence):
    in_domain, unlabelled = mean_confidence(_logits(500, 0.3, 1)), mean_confidence(_logits(400, noise, 2))
    assert shift.has_shifted(in_domain, unlabelled)
    warning = shift.warning(in_domain, unlabelled, None)
    assert warning.startswith("the domains differ: the teacher's confidence is ")
    assert " points more often there" in warning
    assert "expect it to be right about 83 to 90 % of them" in shift.warning(in_domain, unlabelled, (0.834, 0.896))


@pytest.mark.parametrize("seed", range(5))
def test_in_domain_samples_give_no_warning(seed, mean_confidence):
    assert not shift.has_shifted(mean_confidence(_logits(500, 0.3, 10 + seed)), mean_confidence(_logits(400, 0.3, 20 + seed)))


def test_few_samples_or_none_give_no_warning(mean_confidence):
    in_domain = mean_confidence(_logits(500, 0.3, 1))
    assert not shift.has_shifted(in_domain, mean_confidence(_logits(20, 6.0, 2)))
    assert not shift.has_shifted(in_domain, mean_confidence(np.zeros((1, 0, 3))))


@pytest.mark.parametrize(("classes", "slots"), [(20, 0), (300, 0), (300, 64)])
@pytest.mark.parametrize("overconfidence", [1.0, 1.2])
def test_the_accuracy_without_labels_is_between_the_estimates(tmp_path, classes, slots, overconfidence):
    """The teacher knows how noisy each sample is, or takes all out-of-domain samples for a little less noisy than they are."""
    generator = np.random.default_rng(0)
    labels, soft_targets = np.arange(3000) % classes, {}
    for name, max_noise, scale in (("in_domain", 0.4, 1.0), ("unlabelled", 0.7, overconfidence)):
        noise = generator.uniform(0.1, max_noise, (3000, 1))
        logits = scale * (np.eye(classes)[labels] + noise * generator.standard_normal((3000, classes))) / noise**2
        store(tmp_path / name, logits.astype(np.float32)[None], slots=slots)
        soft_targets[name] = storage.open_soft_targets(tmp_path / name)
    accuracy = {name: (shift.top1(item, 0).classes == labels).mean() for name, item in soft_targets.items()}
    in_domain, unlabelled = soft_targets["in_domain"], soft_targets["unlabelled"]
    low, high = shift.expected_accuracy(in_domain, labels, unlabelled)
    assert low - 0.03 < accuracy["unlabelled"] < high + 0.03
    assert high < accuracy["in_domain"] - 0.05
    assert shift.expected_accuracy(in_domain, labels, in_domain) == pytest.approx((accuracy["in_domain"],) * 2, abs=2e-3)
    assert shift.expected_accuracy(in_domain, np.full(3000, -1), unlabelled) is None


def test_certainty_is_minus_the_entropy(tmp_path):
    probabilities = np.array([[[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]]])
    store(tmp_path / "a", np.log(probabilities).astype(np.float32))
    top1 = shift.top1(storage.open_soft_targets(tmp_path / "a"), 0)
    np.testing.assert_allclose(top1.certainty, (probabilities * np.log(probabilities)).sum(2)[0], rtol=1e-3)
