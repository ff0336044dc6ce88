# SPDX-License-Identifier: Apache-2.0
"""Settings of the process that the user's code changes are restored and reported; nothing else is touched."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest
import torch

from edgekd.usercode import settings

CHANGES = {
    "the recursion limit": lambda: sys.setrecursionlimit(sys.getrecursionlimit() + 7),
    "the warnings filters": lambda: warnings.simplefilter("error"),
    "numpy's error handling": lambda: np.seterr(all="raise"),
    "torch's gradient mode": lambda: torch.set_grad_enabled(False),
    "torch's default dtype": lambda: torch.set_default_dtype(torch.float64),
    "torch's default device": lambda: torch.set_default_device("meta"),
    "torch's number of threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "torch's deterministic algorithms": lambda: torch.use_deterministic_algorithms(not torch.are_deterministic_algorithms_enabled()),
}


@pytest.fixture(autouse=True)
def _nothing_undone(monkeypatch):
    monkeypatch.setattr(settings, "undone", {})


def test_all_settings_are_tried():
    assert tuple(CHANGES) == settings.NAMES


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_is_restored(name):
    before = settings._read()
    with settings.restored("data.py:splits"):
        CHANGES[name]()
        assert settings._read() != before
    assert settings._read() == before
    assert torch.zeros(1).device.type == "cpu"
    assert settings.undone == ({} if name == settings.WARNINGS else {"data.py:splits": {name}})


def test_a_setting_is_restored_after_an_exception():
    def change_and_raise():
        with settings.restored("data.py:splits"):
            torch.set_default_dtype(torch.float64)
            raise KeyError

    before = settings._read()
    with pytest.raises(KeyError):
        change_and_raise()
    assert settings._read() == before


def test_code_that_changes_nothing_is_not_reported():
    with settings.restored("data.py:splits"):
        torch.zeros(1)
    assert settings.undone == {}
