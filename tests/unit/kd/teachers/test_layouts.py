# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError
from edgekd.kd.teachers import layouts
from edgekd.kd.teachers.load import copy_teacher, teacher_from_module

ENTRY = EntryPoint("a.py", "net")


def rows(lengths, tokens=16, fill=0):
    """Return ids (n, 16): from 1 up, then filled up."""
    return np.array([[*range(1, length + 1), *[fill] * (tokens - length)] for length in lengths])


def test_each_teacher_runs_in_a_thread_of_its_own_and_logits_come_in_the_order_of_the_batches():
    barrier = threading.Barrier(3, timeout=30)  # passes only if three batches run at once

    def teacher(batch):
        barrier.wait()
        return batch[0] * 2

    batches = [[np.full((2, 3), number)] for number in range(6)]
    with layouts.run_in_threads([teacher] * 3, None) as submit:
        logits = [submit(lambda batch=batch: batch) for batch in batches]
        assert [item.result()[0, 0] for item in logits] == [0, 2, 4, 6, 8, 10]


def test_an_error_of_a_thread_is_raised():
    def teacher(batch):
        raise RecipeError(f"batch {batch}")

    with layouts.run_in_threads([teacher], None) as submit, pytest.raises(RecipeError, match="batch 1"):
        submit(lambda: 1).result()


def test_after_an_error_no_further_batch_is_run():
    is_running, is_over = threading.Event(), threading.Event()
    futures = []

    def teacher(batch):
        is_running.set()
        assert is_over.wait(30)
        return batch

    def fail():
        with layouts.run_in_threads([teacher], None) as submit:
            futures.extend([submit(lambda: 1), submit(lambda: 2)])
            futures[1].add_done_callback(lambda _: is_over.set())
            assert is_running.wait(30)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (futures[0].result(), futures[1].cancelled()) == (1, True)


def test_a_copy_of_a_teacher_shares_its_parameters_and_not_what_it_stores_while_it_runs():
    class Storing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.utils.weight_norm(nn.Linear(4, 3))

        def forward(self, x):
            self.hidden = x
            return self.linear(x)

    teacher = teacher_from_module(Storing(), ENTRY)
    batch = [np.ones((2, 4), np.float32)]
    expected = teacher(batch)
    other = copy_teacher(teacher)
    np.testing.assert_array_equal(other([np.zeros((2, 4), np.float32)]), np.tile(teacher.module.linear.bias.numpy(), (2, 1)))
    assert teacher.module.hidden.sum() == 8
    assert [*map(id, other.module.parameters())] == [*map(id, teacher.module.parameters())]
    np.testing.assert_array_equal(other(batch), expected)


def test_a_teacher_that_is_no_module_of_the_user_is_its_own_copy():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript; there still are such files
        script = teacher_from_module(torch.jit.trace(nn.Linear(4, 3), torch.zeros(1, 4)), ENTRY)
    assert copy_teacher(script) is script
    assert copy_teacher(np.negative) is np.negative


def test_padding_is_what_rows_repeat_most_often_at_their_end():
    ids = rows([3, 4, 16, 5, 16], fill=7)
    mask = (np.arange(16) < np.array([3, 4, 16, 5, 16])[:, None]).astype(np.float32)
    kinds = np.zeros((5, 16), np.int64)
    padding = layouts.find_padding([ids, mask, kinds])
    assert (padding.values, padding.lengths) == ((7, 0, 0), (*range(1, 16),))
    assert layouts.token_lengths([ids, mask, kinds], padding).tolist() == [3, 4, 16, 5, 16]
    batch = padding.remove([ids[[0, 3]], mask[[0, 3]], kinds[[0, 3]]])
    assert batch[0].tolist() == ids[[0, 3], :5].tolist()


@pytest.mark.parametrize(
    "arrays",
    [
        [np.zeros((9, 16), np.float32)],  # no whole numbers
        [np.zeros((9, 4, 4), np.int64)],
        [rows([3] * 9), np.zeros((9, 8), np.int64)],  # of different lengths
        [rows([16] * 8 + [3])],  # hardly any padding
        [np.zeros((0, 16), np.int64)],
    ],
)
def test_inputs_that_are_no_tokens_or_hardly_filled_up_stay_as_they_are(arrays):
    assert layouts.find_padding(arrays) is None


def test_tokens_inside_of_a_row_that_equal_the_padding_stay():
    ids = rows([3, 4, 5, 6])
    ids[0, 0:2] = 0
    padding = layouts.find_padding([ids])
    assert layouts.token_lengths([ids], padding).tolist() == [3, 4, 5, 6]
    assert layouts.token_lengths([np.zeros((1, 16), np.int64)], padding).tolist() == [0]
    assert padding.remove([np.zeros((1, 16), np.int64)])[0].shape == (1, 1)


def test_a_length_that_no_sample_fits_into_is_not_used():
    padding, notes = layouts.removable_padding(lambda batch: batch[0].sum(1, keepdims=True).astype(np.float32), [rows([5, 40], 96)])
    assert (padding.lengths, notes) == ((*range(8, 96, 4),), [])
    assert padding.remove([rows([5], 96)])[0].shape == (1, 8)
