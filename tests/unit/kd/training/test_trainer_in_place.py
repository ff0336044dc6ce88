# SPDX-License-Identifier: Apache-2.0
"""Networks that change their inputs in place, trained beside others that read the same samples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgekd.domain.losses import Loss, Tap
from edgekd.kd import losses
from edgekd.kd.losses.taps import Network
from edgekd.kd.training import trainer
from tests.unit.kd.training.test_trainer import CLASSES, ENTRY, job, no_progress, samples


class InPlace(nn.Module):
    """Normalizes its input in place, or a copy of it."""

    def __init__(self, *, inplace):
        super().__init__()
        self.inplace, self.first, self.head = inplace, nn.Conv2d(1, 4, 3), nn.Linear(4, CLASSES)

    def forward(self, x):
        x = (x if self.inplace else x.clone()).sub_(0.5).mul_(4)
        return self.head(torch.relu(self.first(x)).mean((2, 3)))


@pytest.mark.parametrize("auxiliary", [("ema",), ("last_epoch",), ()])
def test_no_network_changes_the_inputs_of_another(tmp_path, auxiliary):
    def objective(logits, teacher_logits, labels, _):
        others = [losses.mse(logits, tensor) for name, tensor in teacher_logits.items() if tensor is not None and name != "frozen"]
        return losses.ce(logits, labels) + sum(others)

    def teacher(inplace):
        torch.manual_seed(7)
        return Network("teacher", InPlace(inplace=inplace), ENTRY)

    data, results = samples(70, 1), []
    before = data.inputs[0].clone()
    for inplace in (True, False):
        changes = {
            "build": lambda inplace=inplace: InPlace(inplace=inplace),
            "teacher": lambda inplace=inplace: teacher(inplace),
            "tapped": [Loss("hint", taps=(Tap("first", "first"),))],
            "auxiliary": auxiliary,
            "objective": objective,
            "train": data,
            "augment": None,
        }
        (tmp_path / str(inplace)).mkdir()
        results.append(trainer.fit(job(epochs=2, **changes), tmp_path / str(inplace), no_progress))
    (weights, curve), (expected_weights, expected_curve) = results
    assert curve == expected_curve
    assert all(torch.equal(value, expected_weights[name]) for name, value in weights.items())
    assert torch.equal(data.inputs[0], before)
