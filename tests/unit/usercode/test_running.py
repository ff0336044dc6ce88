# SPDX-License-Identifier: Apache-2.0
"""The entry point that runs, in memory that another process reads."""

from __future__ import annotations

import mmap
import sys

import pytest

from edgekd import usercode


@pytest.fixture
def shared(monkeypatch):
    monkeypatch.setattr(sys.modules["edgekd.usercode.running"], "_shared", None)
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    usercode.note_running(memory)
    return memory


def test_the_innermost_entry_point_is_noted_while_it_runs(shared):
    assert usercode.read_running(shared) is None
    with usercode.running("data.py:splits"):
        with usercode.running("models.py:student"):
            assert usercode.read_running(shared) == "models.py:student"
        assert usercode.read_running(shared) == "data.py:splits"
    assert usercode.read_running(shared) is None


def test_a_long_name_is_cut(shared):
    with usercode.running("x" * 10_000):
        assert usercode.read_running(shared) == "x" * (mmap.PAGESIZE - 1)


def test_an_exception_ends_it(shared):
    with pytest.raises(KeyError), usercode.running("data.py:splits"):
        raise KeyError
    assert usercode.read_running(shared) is None
