# SPDX-License-Identifier: Apache-2.0
"""A tiny valid recipe with data and networks, as a user writes them; tests of invalid ones change a line."""

from __future__ import annotations

RECIPE = """\
schema = 1
name = "toy"
[data]
splits = "data.py:splits"
[teacher]
model = "models.py:teacher"
[teacher.train]
epochs = 1
[student]
model = "models.py:student"
inputs = [{ name = "x", shape = [1, 4], dtype = "float32" }]
[distill]
epochs = 1
"""
DATA = """\
import torch
from torch.utils.data import Subset, TensorDataset
def splits():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 4, generator=generator), torch.arange(60) % 3
    train = TensorDataset(x[:30], y[:30])
    splits = {"train": train, "validation": TensorDataset(x[30:40], y[30:40]),
              "calibration": Subset(train, range(8)), "evaluation": TensorDataset(x[40:], y[40:])}
    return splits
"""
MODELS = """\
import torch
from torch import nn
def teacher():
    return nn.Linear(4, 3)
def student():
    return nn.Linear(4, 3)
"""
