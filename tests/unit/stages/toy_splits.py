# SPDX-License-Identifier: Apache-2.0
"""Small splits that are right, and ways to read and refuse them; the tests of right and of wrong splits start from these."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError
from edgekd.stages.inspect import splits

ENTRY = EntryPoint("data.py", "splits")
ONE = [{"name": "x", "shape": [1, 4], "dtype": "float32"}]
TWO = [*ONE, {"name": "mask", "shape": [1, 2, 3], "dtype": "int64"}]


class Items(Dataset):
    """A data set of any items."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def tensors(start, stop, classes=3):
    made = torch.Generator().manual_seed(0)
    return torch.randn(100, 4, generator=made)[start:stop], (torch.arange(100) % classes)[start:stop]


def part(start, stop):
    return TensorDataset(*tensors(start, stop))


def good(**changes):
    train = part(0, 30)
    found = {"train": train, "validation": part(30, 40), "calibration": Subset(train, range(8)), "evaluation": part(40, 60)}
    return {**found, **changes}


def reader(out, specs=ONE, *, classes=True):
    return splits.Reader(ENTRY, specs, classes, out, lambda share, text: None)


def read(out, found, specs=ONE, *, classes=True):
    return splits.read(splits.named(found, ENTRY), reader(out, specs, classes=classes))


def problems(call, *arguments, **options):
    with pytest.raises(RecipeError) as caught:
        call(*arguments, **options)
    return list(caught.value.problems)
