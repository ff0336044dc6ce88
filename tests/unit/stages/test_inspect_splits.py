# SPDX-License-Identifier: Apache-2.0
"""Splits as arrays: what is kept of right ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Subset, TensorDataset

from edgekd.stages.inspect import arrays, splits
from tests.unit.stages.toy_splits import ENTRY, ONE, TWO, Items, good, part, problems, read, reader, tensors


def test_arrays_of_the_right_splits(tmp_path):
    kept = read(tmp_path, good())
    assert splits.overlaps(kept, 0, ENTRY) == {name: {} for name in splits.SPLITS}
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == sorted([*(f"{name}.inputs.0.npy" for name in splits.SPLITS), *(f"{name}.labels.npy" for name in splits.LABELLED)])
    inputs, labels = tensors(40, 60)
    assert np.array_equal(np.load(tmp_path / "evaluation.inputs.0.npy"), inputs.numpy())
    found = np.load(tmp_path / "evaluation.labels.npy")
    assert found.dtype == np.int64
    assert np.array_equal(found, labels.numpy())
    assert np.load(tmp_path / "unlabelled.inputs.0.npy").shape == (0, 4)
    assert splits.class_counts(kept["train"].labels) == {"0": 10, "1": 10, "2": 10}
    assert splits.class_counts(kept["calibration"].labels) is None


def test_the_bytes_are_those_that_numpy_writes(tmp_path):
    read(tmp_path, good())
    for path in sorted(tmp_path.iterdir()):
        before = path.read_bytes()
        np.save(path, np.load(path), allow_pickle=False)
        assert path.read_bytes() == before


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_every_way_to_hold_the_same_samples_gives_the_same_bytes(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(arrays, "_CHUNK_ROWS", rows)
    x, y = tensors(0, 30)
    ways = [
        TensorDataset(x, y),
        Subset(TensorDataset(*tensors(0, 60)), list(range(30))),
        Items([(x[i], y[i]) for i in range(30)]),
        Items([(x[i].numpy(), int(y[i])) for i in range(30)]),
        Items([[x[i].clone().requires_grad_(), np.int32(y[i])] for i in range(30)]),
        Items([((x[i],), torch.tensor(int(y[i]), dtype=torch.uint8)) for i in range(30)]),
        [(x[i].numpy().astype(">f4"), y[i]) for i in range(30)],
    ]
    told = set()
    for number, mode in enumerate(ways):
        out = tmp_path / str(number)
        out.mkdir()
        read(out, good(train=mode))
        told.add((out / "train.inputs.0.npy").read_bytes() + (out / "train.labels.npy").read_bytes())
    assert len(told) == 1


def test_inputs_alone_may_come_with_or_without_a_label(tmp_path):
    x, _ = tensors(0, 30)
    new = torch.randn(5, 4)
    for number, unlabelled in enumerate(
        [new, new.numpy(), Items(list(new)), TensorDataset(new), Items([(row, "no label") for row in new])]
    ):
        out = tmp_path / str(number)
        out.mkdir()
        kept = read(out, good(calibration=x[:3], unlabelled=unlabelled))
        splits.overlaps(kept, 0, ENTRY)
        assert np.array_equal(np.load(out / "unlabelled.inputs.0.npy"), new.numpy())


def test_several_inputs_as_a_tuple_or_flat(tmp_path):
    mask = torch.arange(600).reshape(100, 2, 3)

    def part(start, stop):
        return TensorDataset(tensors(start, stop)[0], mask[start:stop], tensors(start, stop)[1])

    flat = {"train": part(0, 30), "validation": part(30, 40), "evaluation": part(40, 60), "calibration": Subset(part(0, 30), range(8))}
    nested = {name: Items([((x, m), y) for x, m, y in data]) for name, data in flat.items()}
    nested["calibration"] = Items([(x, m) for x, m, _ in flat["calibration"]])
    for name, found in (("flat", flat), ("nested", nested)):
        (tmp_path / name).mkdir()
        read(tmp_path / name, found, TWO)
    files = sorted(path.name for path in (tmp_path / "flat").iterdir())
    assert len(files) == 13
    assert all((tmp_path / "flat" / name).read_bytes() == (tmp_path / "nested" / name).read_bytes() for name in files)
    assert np.load(tmp_path / "flat" / "evaluation.inputs.1.npy").shape == (20, 2, 3)


def test_labels_that_are_no_classes_are_kept_for_a_metric_of_the_user(tmp_path):
    x, _ = tensors(0, 30)
    train = Items([(row, row[:2] / 3) for row in x])
    kept = read(tmp_path, good(train=train), classes=False)
    assert np.load(tmp_path / "train.labels.npy").shape == (30, 2)
    assert np.load(tmp_path / "train.labels.npy").dtype == np.float32
    assert splits.class_counts(kept["train"].labels) is None


def test_truth_values_are_kept_as_numbers_for_a_metric_of_the_user(tmp_path):
    read(tmp_path, good(train=Items([(x, y > 0) for x, y in part(0, 30)])), classes=False)
    found = np.load(tmp_path / "train.labels.npy")
    assert found.dtype == np.int64
    assert found.tolist() == [0, 1, 1] * 10


def test_the_seventy_thousand_samples_of_the_demo_take_no_python_loop(tmp_path):
    calls = []

    class Counted(TensorDataset):
        def __getitem__(self, index):
            calls.append(index)
            return super().__getitem__(index)

    read(tmp_path, good(validation=Counted(*tensors(30, 40))))
    assert len(calls) == 10 + 4  # each sample, and four a second time; the other splits are read whole


def test_groups_are_kept_as_numbers(tmp_path):
    data = part(40, 60)
    into = reader(tmp_path)
    assert splits.groups(data, 20, into) == 20
    assert np.array_equal(np.load(tmp_path / "evaluation.groups.npy"), np.arange(20))
    data.groups = ["ann", "bob"] * 10
    assert splits.groups(data, 20, into) == 2
    assert np.load(tmp_path / "evaluation.groups.npy").tolist() == [0, 1] * 10
    data.groups = torch.tensor([7, 3] * 10)
    assert splits.groups(data, 20, into) == 2
    assert np.load(tmp_path / "evaluation.groups.npy").tolist() == [1, 0] * 10


@pytest.mark.parametrize(
    ("groups", "message"),
    [([1, 2], "has 2 items"), (3, "is int"), ([0.5] * 20, "holds float64 of shape [20]"), ([[1, 2]] * 20, "holds int64 of shape [20, 2]")],
)
def test_groups_that_are_wrong(groups, message, tmp_path):
    data = part(40, 60)
    data.groups = groups
    (found,) = problems(splits.groups, data, 20, reader(tmp_path))
    assert f"evaluation: its attribute 'groups' {message}" in found


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=2), min_size=1, max_size=40))
def test_digests_are_equal_where_bytes_are(tmp_path_factory, rows):
    found = np.array(rows, dtype=np.float32)
    with arrays.Sink(tmp_path_factory.mktemp("sink"), "train", [{"shape": [1, 2], "dtype": "float32"}], len(found)) as sink:
        sink.add([found])
    kept = [row.tobytes() for row in found]
    assert len(set(sink.digests)) == len(set(kept))
    assert [sink.digests.index(digest) for digest in sink.digests] == [kept.index(row) for row in kept]


def test_progress_goes_up(tmp_path):
    told = []
    reader = splits.Reader(ENTRY, ONE, True, tmp_path, lambda share, text: told.append((share, text)))  # noqa: FBT003  (a field)
    splits.read(splits.named(good(train=Items([*part(0, 30)])), ENTRY), reader)
    assert [share for share, _ in told] == sorted(share for share, _ in told)
    assert 0 <= told[0][0] < told[-1][0] < 1
    assert told[0][1] == "train: 0 of 30 samples"
