# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgekd.errors import RecipeError
from edgekd.kd.soft_targets import storage
from edgekd.kd.teachers import stored
from edgekd.kd.teachers.stored import save_teacher_logits, teacher_from_stored_logits


def samples(count, seed=0):
    generator = np.random.default_rng(seed)
    inputs = [generator.standard_normal((count, 2, 3)).astype(np.float32), generator.integers(0, 9, (count, 4))]
    return inputs, generator.standard_normal((count, 5)).astype(np.float32)


def test_logits_are_returned_in_any_order_of_the_samples(tmp_path):
    inputs, logits = samples(300)
    save_teacher_logits(tmp_path / "a.safetensors", inputs, logits)
    teacher = teacher_from_stored_logits(tmp_path / "a.safetensors")
    order = np.random.default_rng(1).permutation(300)
    assert np.array_equal(teacher([item[order] for item in inputs]), logits[order])


def test_the_order_of_the_stored_samples_does_not_matter(tmp_path):
    inputs, logits = samples(50)
    save_teacher_logits(tmp_path / "a.safetensors", inputs, logits)
    save_teacher_logits(tmp_path / "b.safetensors", [item[::-1] for item in inputs], logits[::-1])
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_sample_that_is_not_stored_is_refused(tmp_path):
    inputs, logits = samples(20)
    save_teacher_logits(tmp_path / "a.safetensors", inputs, logits)
    inputs[0][7, 0, 0] += 1e-3
    with pytest.raises(RecipeError, match=r"a.safetensors: has no logits for a sample \(number 7 in a batch of 20\)"):
        teacher_from_stored_logits(tmp_path / "a.safetensors")(inputs)


def test_a_sample_of_the_same_bytes_but_another_type_is_a_different_one(tmp_path):
    inputs, logits = samples(5)
    save_teacher_logits(tmp_path / "a.safetensors", inputs, logits)
    with pytest.raises(RecipeError, match="has no logits for a sample"):
        teacher_from_stored_logits(tmp_path / "a.safetensors")([inputs[0].view(np.int32), inputs[1]])


def test_what_cannot_be_stored_is_refused(tmp_path):
    inputs, logits = samples(20)
    path = tmp_path / "a.safetensors"
    with pytest.raises(RecipeError, match="expected one that ends in .safetensors"):
        save_teacher_logits(tmp_path / "a.npz", inputs, logits)
    with pytest.raises(RecipeError, match=r"expected inputs \(n, ...\) and logits \(n, classes\) with the same n; found"):
        save_teacher_logits(path, inputs, logits[:-1])
    with pytest.raises(RecipeError, match="is not finite"):
        save_teacher_logits(path, inputs, np.where(logits > 1, np.nan, logits))
    duplicated = [np.concatenate([item, item[3:4]]) for item in inputs]
    save_teacher_logits(path, duplicated, np.concatenate([logits, logits[3:4]]))
    assert np.array_equal(teacher_from_stored_logits(path)(inputs), logits)
    path.unlink()
    with pytest.raises(RecipeError, match=r"a.safetensors: sample 20 occurs twice, with different logits: \S+ and \S+ for class \d"):
        save_teacher_logits(path, duplicated, np.concatenate([logits, logits[4:5]]))
    assert not path.exists()


def _another_batch(logits):
    return logits + np.float32(1e-6) * np.abs(logits).max()


def _float16(logits):
    return logits.astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("compute", [_another_batch, _float16, lambda logits: _float16(_another_batch(logits))])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_duplicates_may_differ_as_logits_of_another_batch_or_in_float16_do(tmp_path, compute, scale):
    inputs, logits = samples(20)
    logits *= np.float32(scale)
    duplicated = [np.concatenate([item, item]) for item in inputs]
    save_teacher_logits(tmp_path / "a.safetensors", duplicated, np.concatenate([logits, compute(logits)]))
    assert np.array_equal(teacher_from_stored_logits(tmp_path / "a.safetensors")(inputs), logits)


def test_a_duplicate_that_differs_by_more_than_the_tolerance_of_soft_targets_is_refused(tmp_path):
    assert stored.TOLERANCE == storage.TOLERANCE
    logits = np.array([[10.0, -3.0]] * 2, np.float32)
    inputs = [np.ones((2, 3), np.float32)]
    logits[1, 1] += 0.009  # allowed: 0.01 for the largest, and 0.0015 for the rounding
    save_teacher_logits(tmp_path / "a.safetensors", inputs, logits)
    logits[1, 1] += 0.004
    with pytest.raises(RecipeError, match=r"sample 1 occurs twice, .*: -2.987 and -3 for class 1; allowed is a difference of 0.011"):
        save_teacher_logits(tmp_path / "b.safetensors", inputs, logits)
    with pytest.raises(RecipeError, match="sample 1 occurs twice"):  # numbers of a regression of a small unit
        save_teacher_logits(tmp_path / "b.safetensors", inputs, np.float32([[2e-4, 1e-4], [1e-4, 1e-4]]))


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": np.zeros((3, 4), np.float32)},
        {"digests": np.zeros((3, 16), np.uint8), "logits": np.zeros((4, 2), np.float32)},
        {"digests": np.zeros((3, 8), np.uint8), "logits": np.zeros((3, 2), np.float32)},
        {"digests": np.zeros((3, 16), np.uint8), "logits": np.zeros((3, 2), np.float64)},
        {"digests": np.zeros((0, 16), np.uint8), "logits": np.zeros((0, 2), np.float32)},
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, tensors):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(RecipeError, match="holds no stored logits; expected a file that edgekd.save_teacher_logits wrote"):
        teacher_from_stored_logits(tmp_path / "a.safetensors")
