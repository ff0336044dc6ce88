# SPDX-License-Identifier: Apache-2.0
"""Valid splits, and the arrays that are stored."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch.utils.data import Subset, TensorDataset

from edgekd.domain.recipe import TensorSpec
from edgekd.stages.inspect import arrays, reading, splits
from tests.unit.stages.toy_splits import ENTRY, ONE_INPUT, TWO_INPUTS, Items, dataset, datasets, problems_of, read, settings, tensors


def test_arrays_of_valid_splits(tmp_path):
    stored = read(tmp_path, datasets())
    assert splits.count_overlaps(stored, 0, ENTRY) == {name: {} for name in splits.SPLITS}
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == sorted([*(f"{name}.inputs.0.npy" for name in splits.SPLITS), *(f"{name}.labels.npy" for name in reading.LABELLED)])
    inputs, labels = tensors(40, 60)
    assert np.array_equal(np.load(tmp_path / "evaluation.inputs.0.npy"), inputs.numpy())
    stored_labels = np.load(tmp_path / "evaluation.labels.npy")
    assert stored_labels.dtype == np.int64
    assert np.array_equal(stored_labels, labels.numpy())
    assert np.load(tmp_path / "unlabelled.inputs.0.npy").shape == (0, 4)
    assert splits.class_counts(stored["train"].labels) == {"0": 10, "1": 10, "2": 10}
    assert splits.class_counts(stored["calibration"].labels) is None


def test_the_files_equal_those_that_numpy_writes(tmp_path):
    read(tmp_path, datasets())
    for path in sorted(tmp_path.iterdir()):
        before = path.read_bytes()
        np.save(path, np.load(path), allow_pickle=False)
        assert path.read_bytes() == before


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_every_kind_of_data_set_of_the_same_samples_gives_the_same_bytes(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(arrays, "_CHUNK_ROWS", rows)
    x, y = tensors(0, 30)
    kinds = [
        TensorDataset(x, y),
        Subset(TensorDataset(*tensors(0, 60)), list(range(30))),
        Items([(x[i], y[i]) for i in range(30)]),
        Items([(x[i].numpy(), int(y[i])) for i in range(30)]),
        Items([[x[i].clone().requires_grad_(), np.int32(y[i])] for i in range(30)]),
        Items([((x[i],), torch.tensor(int(y[i]), dtype=torch.uint8)) for i in range(30)]),
        [(x[i].numpy().astype(">f4"), y[i]) for i in range(30)],
    ]
    contents = set()
    for number, data in enumerate(kinds):
        out = tmp_path / str(number)
        out.mkdir()
        read(out, datasets(train=data))
        contents.add((out / "train.inputs.0.npy").read_bytes() + (out / "train.labels.npy").read_bytes())
    assert len(contents) == 1


def test_unlabelled_samples_may_have_a_label_or_none(tmp_path):
    x, _ = tensors(0, 30)
    new = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))  # the splits above are drawn with seed 0
    for number, unlabelled in enumerate(
        [new, new.numpy(), Items(list(new)), TensorDataset(new), Items([(row, "no label") for row in new])]
    ):
        out = tmp_path / str(number)
        out.mkdir()
        stored = read(out, datasets(calibration=x[:3], unlabelled=unlabelled))
        splits.count_overlaps(stored, 0, ENTRY)
        assert np.array_equal(np.load(out / "unlabelled.inputs.0.npy"), new.numpy())


def test_several_inputs_as_a_tuple_or_flat(tmp_path):
    mask = torch.arange(600).reshape(100, 2, 3)

    def masked(start, stop):
        return TensorDataset(tensors(start, stop)[0], mask[start:stop], tensors(start, stop)[1])

    flat = {"train": masked(0, 30), "validation": masked(30, 40), "evaluation": masked(40, 60)}
    flat["calibration"] = Subset(masked(0, 30), range(8))
    nested = {name: Items([((x, m), y) for x, m, y in data]) for name, data in flat.items()}
    nested["calibration"] = Items([(x, m) for x, m, _ in flat["calibration"]])
    for name, returned in (("flat", flat), ("nested", nested)):
        (tmp_path / name).mkdir()
        read(tmp_path / name, returned, TWO_INPUTS)
    files = sorted(path.name for path in (tmp_path / "flat").iterdir())
    assert len(files) == 13
    assert all((tmp_path / "flat" / name).read_bytes() == (tmp_path / "nested" / name).read_bytes() for name in files)
    assert np.load(tmp_path / "flat" / "evaluation.inputs.1.npy").shape == (20, 2, 3)


def test_labels_that_are_not_class_ids_are_stored_for_a_user_metric(tmp_path):
    x, _ = tensors(0, 30)
    train = Items([(row, row[:2] / 3) for row in x])
    stored = read(tmp_path, datasets(train=train), class_ids=False)
    assert np.load(tmp_path / "train.labels.npy").shape == (30, 2)
    assert np.load(tmp_path / "train.labels.npy").dtype == np.float32
    assert splits.class_counts(stored["train"].labels) is None


def test_truth_values_are_stored_as_numbers_for_a_user_metric(tmp_path):
    read(tmp_path, datasets(train=Items([(x, y > 0) for x, y in dataset(0, 30)])), class_ids=False)
    labels = np.load(tmp_path / "train.labels.npy")
    assert labels.dtype == np.int64
    assert labels.tolist() == [0, 1, 1] * 10


def test_tensor_data_sets_are_read_without_a_python_loop(tmp_path):
    calls = []

    class CountingDataset(TensorDataset):
        def __getitem__(self, index):
            calls.append(index)
            return super().__getitem__(index)

    read(tmp_path, datasets(validation=CountingDataset(*tensors(30, 40))))
    assert len(calls) == 10 + 12  # each sample, all a second time, first and last a third time; the other splits are read as whole tensors


def test_groups_are_stored_as_numbers(tmp_path):
    data = dataset(40, 60)
    read_settings = settings(tmp_path)
    assert splits.write_groups(data, 20, read_settings) == 20
    assert np.array_equal(np.load(tmp_path / "evaluation.groups.npy"), np.arange(20))
    data.groups = ["ann", "bob"] * 10
    assert splits.write_groups(data, 20, read_settings) == 2
    assert np.load(tmp_path / "evaluation.groups.npy").tolist() == [0, 1] * 10
    data.groups = torch.tensor([7, 3] * 10)
    assert splits.write_groups(data, 20, read_settings) == 2
    assert np.load(tmp_path / "evaluation.groups.npy").tolist() == [1, 0] * 10
    data.groups = np.array(["bob", "a", "ann", "a"] * 5, dtype=object)  # as a column of pandas is
    assert splits.write_groups(data, 20, read_settings) == 3
    data.groups = [-1, -7] * 10
    assert splits.write_groups(data, 20, read_settings) == 2
    assert np.load(tmp_path / "evaluation.groups.npy").tolist() == [1, 0] * 10


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([1, 2], "has 2 items"),
        (3, "is int"),
        (torch.tensor(3), "is Tensor"),
        ([None] * 20, "holds object of shape [20]"),
        ([0.5] * 20, "holds float64 of shape [20]"),
        ([[1, 2]] * 20, "holds int64 of shape [20, 2]"),
    ],
)
def test_invalid_groups(groups, message, tmp_path):
    data = dataset(40, 60)
    data.groups = groups
    (problem,) = problems_of(splits.write_groups, data, 20, settings(tmp_path))
    assert f"evaluation: its attribute 'groups' {message}" in problem


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
    st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=2), min_size=1, max_size=40)
)
def test_digests_are_equal_where_bytes_are(tmp_path_factory, rows):
    samples = np.array(rows, dtype=np.float32)
    with arrays.InputWriter(tmp_path_factory.mktemp("inputs"), "train", [TensorSpec("x", (1, 2))], len(samples)) as writer:
        writer.add([samples])
    contents = [row.tobytes() for row in samples]
    assert len(set(writer.digests)) == len(set(contents))
    assert [writer.digests.index(digest) for digest in writer.digests] == [contents.index(row) for row in contents]


def test_progress_increases(tmp_path):
    calls = []
    read_settings = reading.ReadSettings(ENTRY, ONE_INPUT, True, tmp_path, lambda *call: calls.append(call))  # noqa: FBT003  (a field)
    splits.read_splits(splits.check_datasets(datasets(train=Items([*dataset(0, 30)])), ENTRY), read_settings)
    shares = [share for share, _ in calls]
    assert shares == sorted(shares)
    assert 0 <= shares[0] < shares[-1] < 1
    assert calls[0][1] == "train: 0 of 30 samples"


class Buffer(Items):
    """Returns each sample in the same array."""

    def __init__(self, items):
        super().__init__(items)
        self.buffer = torch.empty(4)

    def __getitem__(self, index):
        self.buffer[:] = self.items[index][0]
        return self.buffer, self.items[index][1]


def test_a_data_set_may_return_each_sample_in_the_same_array(tmp_path):
    x, y = tensors(0, 30)
    read(tmp_path, datasets(train=Buffer(list(zip(x, y, strict=True)))))
    assert np.array_equal(np.load(tmp_path / "train.inputs.0.npy"), x.numpy())


def test_splits_that_are_the_same_when_they_are_made_again_pass(tmp_path):
    x, y = tensors(0, 30)
    as_items = datasets(train=Items(list(zip(x, y, strict=True))))
    splits.check_repeatable(as_items, read(tmp_path, as_items), settings(tmp_path))
    splits.check_repeatable(datasets(), read(tmp_path, datasets()), settings(tmp_path))
