# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.kd.soft_targets import shift, storage
from tests.stored import store


def _logits(samples, noise, seed, views=1):
    """Answers of a linear teacher to three clusters, with noise mixed in."""
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.eye(3)
    clean = centres[torch.arange(samples) % 3]
    teacher = nn.Linear(3, 3, bias=False)
    teacher.weight.data = torch.eye(3)
    with torch.no_grad():
        return np.stack([teacher(clean + noise * torch.randn(samples, 3, generator=generator)).numpy() for _ in range(views)])


@pytest.fixture
def mean_confidence(tmp_path):
    """What the teacher's answers tell once they are stored."""

    def found(outputs, slots=None):
        path = tmp_path / "a.safetensors"
        store(path, outputs.astype(np.float32), slots=slots)
        return shift.mean_confidence(storage.open_soft_targets(path))

    return found


def test_answers_that_are_kept_as_samples_tell_the_same(mean_confidence):
    outputs = 3 * np.random.default_rng(0).standard_normal((2, 50, 300))
    dense, sampled = mean_confidence(outputs, 0), mean_confidence(outputs)
    assert (sampled.samples, sampled.mean) == (dense.samples, pytest.approx(dense.mean, abs=1e-3))
    assert sampled.variance == pytest.approx(dense.variance, rel=0.02)


def test_confidence_is_the_mean_of_the_largest_share(mean_confidence):
    outputs = np.log(np.array([[[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]]]))
    found = mean_confidence(outputs)
    assert (found.samples, found.mean) == (2, pytest.approx(0.6, abs=1e-3))
    assert found.variance == pytest.approx(0.01, rel=0.01)


def test_views_of_one_sample_count_once(mean_confidence):
    assert mean_confidence(_logits(300, 0.5, 1, views=5)).samples == 300


@pytest.mark.parametrize("noise", [2.0, 3.0])
def test_noise_that_the_teacher_does_not_know_is_warned_of(noise, mean_confidence):
    home, other = mean_confidence(_logits(500, 0.3, 1)), mean_confidence(_logits(400, noise, 2))
    assert shift.has_shifted(home, other)
    told = shift.warning(home, other, None)
    assert told.startswith("the domains differ: the teacher's confidence is ")
    assert " points more often there" in told
    assert "expect it to be right about 83 to 90 % of them" in shift.warning(home, other, (0.834, 0.896))


@pytest.mark.parametrize("seed", range(5))
def test_samples_from_home_are_silent(seed, mean_confidence):
    assert not shift.has_shifted(mean_confidence(_logits(500, 0.3, 10 + seed)), mean_confidence(_logits(400, 0.3, 20 + seed)))


def test_few_samples_and_none_are_silent(mean_confidence):
    home = mean_confidence(_logits(500, 0.3, 1))
    assert not shift.has_shifted(home, mean_confidence(_logits(20, 6.0, 2)))
    assert not shift.has_shifted(home, mean_confidence(np.zeros((1, 0, 3))))


@pytest.mark.parametrize(("classes", "slots"), [(20, 0), (300, 0), (300, 64)])
@pytest.mark.parametrize("too_sure", [1.0, 1.2])
def test_the_accuracy_without_labels_lies_between_the_estimates(tmp_path, classes, slots, too_sure):
    """A teacher that knows how much noise lies over each sample, or takes all away from home for a little clearer than they are."""
    generator = np.random.default_rng(0)
    labels, found = np.arange(3000) % classes, {}
    for name, strongest, surer in (("home", 0.4, 1.0), ("other", 0.7, too_sure)):
        strength = generator.uniform(0.1, strongest, (3000, 1))
        logits = surer * (np.eye(classes)[labels] + strength * generator.standard_normal((3000, classes))) / strength**2
        store(tmp_path / name, logits.astype(np.float32)[None], slots=slots)
        found[name] = storage.open_soft_targets(tmp_path / name)
    true = {name: (shift.top1(one, 0).classes == labels).mean() for name, one in found.items()}
    low, high = shift.expected_accuracy(found["home"], labels, found["other"])
    assert low - 0.03 < true["other"] < high + 0.03
    assert high < true["home"] - 0.05
    assert shift.expected_accuracy(found["home"], labels, found["home"]) == pytest.approx((true["home"],) * 2, abs=2e-3)
    assert shift.expected_accuracy(found["home"], np.full(3000, -1), found["other"]) is None


def test_certainty_is_minus_the_entropy(tmp_path):
    shares = np.array([[[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]]])
    store(tmp_path / "a", np.log(shares).astype(np.float32))
    found = shift.top1(storage.open_soft_targets(tmp_path / "a"), 0)
    np.testing.assert_allclose(found.certainty, (shares * np.log(shares)).sum(2)[0], rtol=1e-3)
