# SPDX-License-Identifier: Apache-2.0
"""Teacher and student: a residual network of 363,000 parameters, and a plain one of 40,000 whose ops all have int8 kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES = 10


def teacher() -> nn.Module:
    """Return the large network."""
    return nn.Sequential(conv(1, 32), nn.MaxPool2d(2), Residual(32, 64), Residual(64, 64), Residual(64, 128, stride=2), *head(128))


def student() -> nn.Module:
    """Return the small network that ships."""
    return nn.Sequential(conv(1, 16, stride=2), conv(16, 32), nn.MaxPool2d(2), conv(32, 48), nn.MaxPool2d(2), conv(48, 48), *head(48))


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    """Return a 3x3 convolution; its batch norm folds into it on export."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def head(channels: int) -> tuple[nn.Module, ...]:
    """Return the classifier."""
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)


class Residual(nn.Module):
    """Two convolutions around a short cut (He et al. 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = conv(inputs, outputs, stride)
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        same = inputs == outputs and stride == 1
        self.short = nn.Identity() if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, images: Tensor) -> Tensor:
        """Shapes: images (n, inputs, h, w); result (n, outputs, h / stride, w / stride)."""
        return torch.relu(self.second(self.first(images)) + self.short(images))
