# SPDX-License-Identifier: Apache-2.0
"""Two small networks for images of 8x8 pixels."""

from __future__ import annotations

from torch import nn


def teacher() -> nn.Module:
    """Return the teacher: 29,000 parameters."""
    return nn.Sequential(
        *_block(1, 32),
        *_block(32, 64),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )


def student() -> nn.Module:
    """Return the student, which ships: 1,900 parameters."""
    return nn.Sequential(
        *_block(1, 8),
        nn.MaxPool2d(2),
        *_block(8, 16),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 2 * 2, 10),
    )


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
