# SPDX-License-Identifier: Apache-2.0
"""Small valid splits, and functions that read them; the tests of valid and of invalid splits start from these."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from edgekd.domain.recipe import EntryPoint, TensorSpec
from edgekd.errors import RecipeError
from edgekd.stages.inspect import reading, splits

ENTRY = EntryPoint("data.py", "splits")
ONE_INPUT = (TensorSpec("x", (1, 4)),)
TWO_INPUTS = (*ONE_INPUT, TensorSpec("mask", (1, 2, 3), "int64"))


class Items(Dataset):
    """A data set of any items."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def tensors(start, stop, classes=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(100, 4, generator=generator)[start:stop], (torch.arange(100) % classes)[start:stop]


def dataset(start, stop):
    return TensorDataset(*tensors(start, stop))


def datasets(**changes):
    """Return valid splits, with changes by name."""
    train, validation, evaluation = dataset(0, 30), dataset(30, 40), dataset(40, 60)
    return {"train": train, "validation": validation, "calibration": Subset(train, range(8)), "evaluation": evaluation, **changes}


def settings(out, specs=ONE_INPUT, *, class_ids=True):
    return reading.ReadSettings(ENTRY, specs, class_ids, out, lambda share, text: None)


def read(out, returned, specs=ONE_INPUT, *, class_ids=True):
    return splits.read_splits(splits.check_datasets(returned, ENTRY), settings(out, specs, class_ids=class_ids))


def problems_of(call, *arguments, **options):
    with pytest.raises(RecipeError) as caught:
        call(*arguments, **options)
    return list(caught.value.problems)
