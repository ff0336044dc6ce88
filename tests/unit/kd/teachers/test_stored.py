# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgekd.errors import RecipeError
from edgekd.kd.teachers import stored


def samples(count, seed=0):
    generator = np.random.default_rng(seed)
    inputs = [generator.standard_normal((count, 2, 3)).astype(np.float32), generator.integers(0, 9, (count, 4))]
    return inputs, generator.standard_normal((count, 5)).astype(np.float32)


def test_answers_come_back_in_any_order(tmp_path):
    inputs, outputs = samples(300)
    stored.save_teacher_logits(tmp_path / "a.safetensors", inputs, outputs)
    answer = stored.teacher_from_stored_logits(tmp_path / "a.safetensors")
    order = np.random.default_rng(1).permutation(300)
    assert np.array_equal(answer([item[order] for item in inputs]), outputs[order])


def test_the_order_in_which_they_are_stored_does_not_matter(tmp_path):
    inputs, outputs = samples(50)
    stored.save_teacher_logits(tmp_path / "a.safetensors", inputs, outputs)
    stored.save_teacher_logits(tmp_path / "b.safetensors", [item[::-1] for item in inputs], outputs[::-1])
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_another_sample_is_refused(tmp_path):
    inputs, outputs = samples(20)
    stored.save_teacher_logits(tmp_path / "a.safetensors", inputs, outputs)
    inputs[0][7, 0, 0] += 1e-3
    with pytest.raises(RecipeError, match=r"a.safetensors: has no answer to a sample \(number 7 of a batch of 20\)"):
        stored.teacher_from_stored_logits(tmp_path / "a.safetensors")(inputs)


def test_a_sample_of_the_same_bytes_in_another_type_is_another(tmp_path):
    inputs, outputs = samples(5)
    stored.save_teacher_logits(tmp_path / "a.safetensors", inputs, outputs)
    with pytest.raises(RecipeError, match="has no answer to a sample"):
        stored.teacher_from_stored_logits(tmp_path / "a.safetensors")([inputs[0].view(np.int32), inputs[1]])


def test_what_cannot_be_stored_is_refused(tmp_path):
    inputs, outputs = samples(20)
    path = tmp_path / "a.safetensors"
    with pytest.raises(RecipeError, match="end in .safetensors"):
        stored.save_teacher_logits(tmp_path / "a.npz", inputs, outputs)
    with pytest.raises(RecipeError, match=r"expected inputs \(n, ...\) and outputs \(n, classes\) with one n; found"):
        stored.save_teacher_logits(path, inputs, outputs[:-1])
    with pytest.raises(RecipeError, match="is not finite"):
        stored.save_teacher_logits(path, inputs, np.where(outputs > 1, np.nan, outputs))
    twice = [np.concatenate([item, item[3:4]]) for item in inputs]
    stored.save_teacher_logits(path, twice, np.concatenate([outputs, outputs[3:4]]))
    assert np.array_equal(stored.teacher_from_stored_logits(path)(inputs), outputs)
    path.unlink()
    with pytest.raises(RecipeError, match="is there twice, with two answers"):
        stored.save_teacher_logits(path, twice, np.concatenate([outputs, outputs[4:5]]))
    assert not path.exists()


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": np.zeros((3, 4), np.float32)},
        {"digests": np.zeros((3, 16), np.uint8), "outputs": np.zeros((4, 2), np.float32)},
        {"digests": np.zeros((3, 8), np.uint8), "outputs": np.zeros((3, 2), np.float32)},
        {"digests": np.zeros((3, 16), np.uint8), "outputs": np.zeros((3, 2), np.float64)},
        {"digests": np.zeros((0, 16), np.uint8), "outputs": np.zeros((0, 2), np.float32)},
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, tensors):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(RecipeError, match="holds no stored answers; expected a file that edgekd.save_teacher_logits wrote"):
        stored.teacher_from_stored_logits(tmp_path / "a.safetensors")
