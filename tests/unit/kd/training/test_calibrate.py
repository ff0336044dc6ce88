# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import nn

from edgekd.domain.recipe import EntryPoint
from edgekd.kd.data import Samples
from edgekd.kd.training import calibrate

ENTRY = EntryPoint("models.py", "student")


def _answers(scale, count=2000):
    """Labels drawn from softmax(logits), and the logits on another scale."""
    generator = torch.Generator().manual_seed(4)
    logits = 2 * torch.randn(count, 5, generator=generator)
    labels = torch.multinomial(torch.softmax(logits, 1), 1, generator=generator).flatten()
    return scale * logits, labels


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_the_temperature_is_the_scale_of_the_logits(scale):
    assert calibrate.fit_temperature(*_answers(scale)) == pytest.approx(scale, rel=0.1)


def test_samples_without_a_label_do_not_count_and_few_are_not_enough():
    logits, labels = _answers(3.0)
    more = torch.cat([logits, 100 * torch.randn(500, 5)]), torch.cat([labels, torch.full((500,), -1)])
    assert calibrate.fit_temperature(*more) == pytest.approx(calibrate.fit_temperature(logits, labels))
    assert calibrate.fit_temperature(logits[:20], labels[:20]) is None


class Scaled(nn.Module):
    """Its answer comes from no layer of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return 2 * self.layer(x)


class Tied(nn.Module):
    """The last layer has the weights of the first."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)),
        nn.Sequential(nn.Unflatten(1, (4, 1, 1)), nn.Conv2d(4, 3, 1), nn.Flatten()),
    ],
)
def test_the_answers_are_divided_and_nothing_else_changes(module):
    x = torch.randn(6, 4)
    before = module.eval()(x).detach()
    assert calibrate.fold_temperature(module, [x], 4.0)
    torch.testing.assert_close(module(x), before / 4)
    assert not any(item._forward_hooks for item in module.modules())


@pytest.mark.parametrize("module", [Scaled(), Tied()])
def test_a_module_without_a_last_layer_of_its_own_is_left_alone(module):
    x = torch.randn(6, 4)
    before = module.eval()(x).detach()
    assert not calibrate.fold_temperature(module, [x], 4.0)
    torch.testing.assert_close(module(x), before, rtol=0, atol=0)


def test_weights_come_back_calibrated_with_a_remark():
    logits, labels = _answers(8.0)
    module = nn.Sequential(nn.Linear(5, 5))
    weights = {"0.weight": torch.eye(5), "0.bias": torch.zeros(5)}
    calibrated, note = calibrate.calibrate(module, weights, Samples((logits,), labels), ENTRY, 1)
    torch.testing.assert_close(calibrated["0.weight"], torch.eye(5) / calibrate.fit_temperature(logits, labels))
    assert "is folded into the last layer" in note
    same, note = calibrate.calibrate(module, weights, Samples((logits,), torch.full((2000,), -1)), ENTRY, 1)
    assert same is weights
    assert "not calibrated: too few samples" in note
