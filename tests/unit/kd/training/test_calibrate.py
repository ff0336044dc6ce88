# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

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


class Residual(nn.Module):
    """A branch is added in place to the output of the layer that the hook takes for the last."""

    def __init__(self):
        super().__init__()
        self.last, self.branch = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        logits = self.last(x)
        logits += self.branch(x)
        return logits


class ReadTwice(nn.Module):
    """The logits of the last layer are also read by a gate, whose output moves them; zero for the first batch."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        logits = self.last(x)
        return logits + torch.relu(logits - 4)


class Cosine(nn.Linear):
    """Its weights are normalized when they are used."""

    def forward(self, x):
        return nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(self.weight), self.bias)


class Clamped(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last(x).clamp(-1, 1)


class UsedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(torch.relu(self.layer(x)))


class WeightReadElsewhere(nn.Module):
    """The weight of the last layer scales the inputs."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last(x / self.last.weight.norm())


class NormalizedInPlace(nn.Module):
    """The output of the last layer becomes log-probabilities in place."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        logits = self.last(x)
        return logits.sub_(logits.logsumexp(1, keepdim=True))


class DrawnWhenBuilt(nn.Module):
    """A buffer outside of the state dict differs in each module that is built."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 3)
        self.register_buffer("noise", torch.randn(4), persistent=False)

    def forward(self, x):
        return self.last(x * self.noise)


class ScaledCosine(Cosine):
    """Its scale is a parameter of the last layer's own."""

    def __init__(self):
        super().__init__(4, 3, bias=False)
        self.scale = nn.Parameter(torch.tensor(16.0))

    def forward(self, x):
        return self.scale * nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(self.weight))


def test_weights_that_a_fresh_module_would_use_otherwise_are_not_calibrated():
    torch.manual_seed(0)
    weights, inputs = DrawnWhenBuilt().state_dict(), 30 * torch.randn(300, 4)
    calibrated, notes = calibrate.calibrate(DrawnWhenBuilt, weights, Samples((inputs,), torch.arange(300) % 3), ENTRY, 1)
    assert calibrated is weights
    assert "is not folded: dividing the last layer changes" in notes[-1]
    assert "the logits are not calibrated" in notes[-1]


def _calibrate(make, scale=30.0):
    """Calibrate a module on samples whose labels it predicts with far too much (or too little) confidence."""
    module = make()
    torch.manual_seed(0)
    inputs = scale * torch.randn(300, 4)
    with torch.no_grad():
        logits = module.eval()(inputs)
    labels = torch.where(torch.rand(300) < 0.7, logits.argmax(1), torch.randint(3, (300,)))
    weights = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    calibrated, notes = calibrate.calibrate(make, weights, Samples((inputs,), labels), ENTRY, 1)
    module.load_state_dict(calibrated)
    with torch.no_grad():
        return logits, module.eval()(inputs), notes


@pytest.mark.parametrize(
    "make",
    [
        Residual,
        ReadTwice,
        Clamped,
        Scaled,
        Tied,
        UsedTwice,
        WeightReadElsewhere,
        NormalizedInPlace,
        lambda: nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1)),
        lambda: nn.Sequential(Cosine(4, 3)),
        lambda: parametrizations.spectral_norm(nn.Linear(4, 3)),
        lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    ],
)
def test_predictions_never_change_where_the_last_layer_cannot_be_divided(make):
    torch.manual_seed(1)
    before, after, notes = _calibrate(make)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert any("not calibrated" in note for note in notes)


@pytest.mark.parametrize(
    "make",
    [
        lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
        lambda: nn.utils.weight_norm(nn.Linear(4, 3)),
        lambda: nn.Linear(4, 3),
        ScaledCosine,
    ],
)
def test_weight_and_bias_are_both_divided(make):
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the older weight norm
        before, after, notes = _calibrate(make)
    temperature = float((before / after).median())
    assert temperature > 2
    torch.testing.assert_close(after, before / temperature, rtol=1e-4, atol=1e-4)
    assert any("is folded into the last layer" in note for note in notes)


def test_a_temperature_at_the_end_of_its_range_is_noted():
    logits, labels = _answers(8.0)
    weights = {"0.weight": torch.eye(5), "0.bias": torch.zeros(5)}
    shuffled = labels[torch.randperm(len(labels))]
    notes = calibrate.calibrate(lambda: nn.Sequential(nn.Linear(5, 5)), weights, Samples((logits,), shuffled), ENTRY, 1)[1]
    assert "is at the end of its range [0.02, 50]: the logits do not predict the labels" in notes[0]


def test_weights_come_back_calibrated_with_a_remark():
    logits, labels = _answers(8.0)
    weights = {"0.weight": torch.eye(5), "0.bias": torch.zeros(5)}
    calibrated, (note,) = calibrate.calibrate(lambda: nn.Sequential(nn.Linear(5, 5)), weights, Samples((logits,), labels), ENTRY, 1)
    torch.testing.assert_close(calibrated["0.weight"], torch.eye(5) / calibrate.fit_temperature(logits, labels))
    assert "is folded into the last layer" in note
    same, (note,) = calibrate.calibrate(
        lambda: nn.Sequential(nn.Linear(5, 5)), weights, Samples((logits,), torch.full((2000,), -1)), ENTRY, 1
    )
    assert same is weights
    assert "not calibrated: too few samples" in note
