# SPDX-License-Identifier: Apache-2.0
"""Depthwise separable CNNs for keywords (Zhang et al., arXiv 1711.07128): a teacher of 31,000 parameters, a student of 3,100."""

from __future__ import annotations

from torch import nn

WORDS = 12


def teacher() -> nn.Module:
    """Return the teacher."""
    return ds_cnn(channels=76, blocks=4)


def student() -> nn.Module:
    """Return the student, which ships."""
    return ds_cnn(channels=24, blocks=2)


def ds_cnn(channels: int, blocks: int) -> nn.Module:
    """Return a convolution over time and coefficients, then separable ones, and a classifier. Shapes: (n, 1, 63, 13) -> (n, 12)."""
    first = [nn.Conv2d(1, channels, (10, 4), 2, (4, 1), bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    separable = [layer for _ in range(blocks) for layer in _separable(channels)]
    return nn.Sequential(*first, *separable, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, WORDS))


def _separable(channels: int) -> list[nn.Module]:
    depthwise = [nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return [*depthwise, nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
