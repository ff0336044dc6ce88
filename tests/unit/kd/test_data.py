# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from edgekd.domain.artifact import Artifact
from edgekd.errors import RecipeError
from edgekd.kd import data
from tests.stored import store


def stored(folder, **arrays):
    found = {}
    for name, array in arrays.items():
        split, _, what = name.partition("__")
        path = folder / (f"{name}.safetensors" if what == "outputs" else f"{name}.npy")
        if what == "outputs":
            store(path, array, split, inputs=sum(other.startswith(f"{split}__inputs") for other in arrays))
        else:
            np.save(path, array)
        found[name.replace("__", ".")] = Artifact(path, "", path.stat().st_size)
    return found


def test_a_split_is_read_with_what_there_is_of_it(tmp_path):
    artifacts = stored(
        tmp_path,
        train__inputs__0=np.ones((4, 2), np.float32),
        train__inputs__1=np.arange(4)[:, None],
        train__labels=np.array([3, 1, 0, 2]),
        train__outputs=np.zeros((1, 4, 5), np.float32),
        unlabelled__inputs__0=np.zeros((0, 2), np.float32),
        unlabelled__inputs__1=np.zeros((0, 1), np.int64),
    )
    train = data.load_split(artifacts, "train")
    batch = train.pick(torch.tensor([2, 0]))
    assert [tuple(item.shape) for item in train.inputs] == [(4, 2), (4, 1)]
    assert batch.inputs[1].flatten().tolist() == [2, 0]
    assert batch.labels.tolist() == [0, 3]
    assert tuple(batch.outputs.shape) == (2, 5)
    unlabelled = data.load_split(artifacts, "unlabelled")
    assert len(unlabelled) == 0
    assert unlabelled.outputs is None


def test_labels_that_are_no_classes_count_as_none(tmp_path):
    artifacts = stored(tmp_path, train__inputs__0=np.ones((3, 2), np.float32), train__labels=np.array([0.5, 1.5, 2.0]))
    assert data.load_split(artifacts, "train").labels.tolist() == [-1, -1, -1]


def test_an_array_that_does_not_fit_is_mapped_and_gives_the_same_batch(tmp_path, monkeypatch):
    artifacts = stored(tmp_path, train__inputs__0=np.arange(12, dtype=np.float32).reshape(6, 2))
    rows = torch.tensor([5, 0, 3])
    whole = data.load_split(artifacts, "train").pick(rows)
    monkeypatch.setattr(data.os, "sysconf", lambda _: 1)
    mapped = data.load_arrays(artifacts, "train")[0]
    assert isinstance(mapped, np.memmap)
    assert torch.equal(data.load_split(artifacts, "train").pick(rows).inputs[0], whole.inputs[0])


def test_a_view_has_its_own_inputs_and_the_teachers_answers_to_them(tmp_path):
    outputs = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    artifacts = stored(tmp_path, train__inputs__0=np.ones((3, 2), np.float32), train__labels=np.array([0, 1, 0]), train__outputs=outputs)

    def noisy(inputs, generator):
        return tuple(item + torch.rand(item.shape, generator=generator) for item in inputs)

    found = [data.load_split(artifacts, "train", augment=noisy, number=number) for number in (0, 1)]
    assert not torch.equal(found[0].inputs[0], found[1].inputs[0])
    assert torch.equal(found[1].inputs[0], data.load_split(artifacts, "train", augment=noisy, number=1).inputs[0])
    assert [item.outputs.tolist() for item in found] == outputs.tolist()
    assert data.load_split(artifacts, "train").inputs[0].unique().tolist() == [1]  # what is stored is not touched


def test_splits_are_joined_in_order():
    first = data.Samples((torch.zeros(2, 1),), torch.tensor([1, 0]), torch.zeros(2, 3))
    second = data.Samples((torch.ones(1, 1),), torch.tensor([-1]), torch.ones(1, 3))
    found = data.concatenate(first, second)
    assert found.labels.tolist() == [1, 0, -1]
    assert found.inputs[0].flatten().tolist() == [0, 0, 1]
    assert found.outputs[:, 0].tolist() == [0, 0, 1]


def test_answers_of_many_classes_stay_in_their_file_and_are_read_row_by_row(tmp_path):
    logits = {
        split: 3 * np.random.default_rng(seed).standard_normal((2, 20, 300)).astype(np.float32)
        for seed, split in enumerate(("train", "unlabelled"))
    }
    arrays = {
        f"{split}__{what}": item
        for split in logits
        for what, item in (("inputs__0", np.ones((20, 2), np.float32)), ("outputs", logits[split]))
    }
    artifacts = stored(tmp_path, **arrays)
    train, more = (data.load_split(artifacts, split, number=1) for split in logits)
    both = data.concatenate(train, more)
    assert isinstance(both.outputs, data.SampledSoftTargets)
    assert both.outputs.shape == (40, 300)
    rows = torch.tensor([25, 3, 39])
    found = both.pick(rows).outputs
    wanted = torch.from_numpy(np.concatenate([logits["train"][1], logits["unlabelled"][1]]))[rows]
    assert torch.equal(found.argmax(1), wanted.argmax(1))
    top = wanted.topk(10).indices
    shares = [item.log_softmax(1).gather(1, top) for item in (found, wanted)]
    torch.testing.assert_close(shares[0], shares[1], rtol=2e-3, atol=2e-3)
    assert torch.equal(found[1], train.outputs[rows[1:2]][0])


def test_answers_to_other_samples_are_refused(tmp_path):
    artifacts = stored(tmp_path, train__inputs__0=np.ones((3, 2), np.float32), train__outputs=np.zeros((1, 3, 2), np.float32))
    artifacts["train.inputs.0"] = Artifact(artifacts["train.inputs.0"].path, "another", 0)
    with pytest.raises(RecipeError, match="train__outputs.safetensors: holds other answers: data "):
        data.load_split(artifacts, "train")


def test_several_teachers_of_many_classes_need_dense_answers(tmp_path):
    outputs = np.zeros((1, 3, 300), np.float32)
    artifacts = stored(tmp_path, train__inputs__0=np.ones((3, 2), np.float32), train__outputs=outputs)
    artifacts["train.outputs.teacher.0"] = artifacts["train.outputs"]
    with pytest.raises(RecipeError, match=r'several teachers of 300 classes, .* expected distill.soft_target_storage = "dense"'):
        data.load_split(artifacts, "train", ensemble=data.Ensemble((1.0, 1.0), "fixed"))
