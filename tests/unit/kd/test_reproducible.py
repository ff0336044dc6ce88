# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils import deterministic as torch_deterministic

from edgekd.kd.reproducible import derive_seed, deterministic, load_verified, save_verified, seed_all


def draws():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]  # noqa: NPY002  (as user code does)


def test_a_seed_restarts_every_generator():
    seed_all(7)
    first = draws()
    assert draws() != first
    seed_all(7)
    assert draws() == first


def test_all_global_state_is_restored_even_after_an_error():
    seed_all(1)
    expected = draws()
    threads, filling = torch.get_num_threads(), torch_deterministic.fill_uninitialized_memory
    seed_all(1)

    def disturb():
        with deterministic(threads + 1):
            assert torch.get_num_threads() == threads + 1
            assert torch.are_deterministic_algorithms_enabled()
            seed_all(99)
            draws()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        disturb()
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch_deterministic.fill_uninitialized_memory == filling
    assert draws() == expected


def test_seeds_differ_by_purpose_and_fit_every_generator():
    seeds = {derive_seed(seed, purpose, epoch) for seed in range(5) for purpose in ("shuffle", "augment") for epoch in range(50)}
    assert len(seeds) == 500
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_partial_work_is_loaded_only_if_it_is_undamaged(tmp_path):
    path = tmp_path / "part"
    assert load_verified(path) is None
    save_verified(path, b"some work")
    assert load_verified(path) == b"some work"
    content = path.read_bytes()
    for damaged in (b"", content[:10], content[:-1], content[:-1] + b"x", b"y" + content[1:]):
        path.write_bytes(damaged)
        assert load_verified(path) is None
