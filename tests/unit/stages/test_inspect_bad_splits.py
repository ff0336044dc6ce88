# SPDX-License-Identifier: Apache-2.0
"""Invalid splits, and the message about each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from edgekd.errors import RecipeError
from edgekd.stages.inspect import splits
from tests.unit.stages.toy_splits import ENTRY, TWO_INPUTS, Items, dataset, datasets, problems_of, read, settings, tensors

X, Y = tensors(0, 30)


class Unstable(Items):
    def __getitem__(self, index):
        x, y = self.items[index]
        return x + torch.rand(4), y


class UnstableLabel(Items):
    def __getitem__(self, index):
        self.reads = getattr(self, "reads", 0) + 1
        return self.items[index][0], self.reads


class Raises(Items):
    def __getitem__(self, index):
        if index == 5:
            raise OSError("disk gone")
        return super().__getitem__(index)


class NoLength(Items):
    def __len__(self):
        raise NotImplementedError("no length")


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


PAIRS = [(X[i], int(Y[i])) for i in range(30)]
BAD_TRAIN = {
    "input of another shape": (
        TensorDataset(X[:, :3], Y),
        ["30 of 30 samples (0, 1, 2, ...): input 'x' has shape [3]; expected [4], the shape in student.inputs without the batch axis"],
    ),
    "input with the batch axis": (
        Items([(x[None], y) for x, y in PAIRS]),
        ["sample 0: input 'x' has shape [1, 4]; expected [4], the shape in student.inputs without the batch axis"],
    ),
    "input of another type": (
        TensorDataset(X.double(), Y),
        [
            (
                "30 of 30 samples (0, 1, 2, ...): input 'x' is float64; expected float32, as in student.inputs; "
                "convert it with .to(torch.float32) or .astype('float32')"
            )
        ],
    ),
    "input in bfloat16": (
        TensorDataset(X.bfloat16(), Y),
        ["30 of 30 samples (0, 1, 2, ...): input 'x' is a bfloat16 tensor; expected a plain one"],
    ),
    "input that is sparse": (Items([(X[0].to_sparse(), 0)]), ["sample 0: input 'x' is a sparse_coo tensor; expected a plain one"]),
    "input that is a list": (
        Items([([1.0, 2.0, 3.0, 4.0], 0)]),
        ["sample 0: has 4 inputs; expected a pair (input, label), as in student.inputs"],
    ),
    "input that is text": (Items([("word", 0)]), ["sample 0: input 'x' is str; expected a tensor or an array"]),
    "input that is None": (Items([(None, 0)]), ["sample 0: input 'x' is NoneType; expected a tensor or an array"]),
    "input of objects": (Items([(np.array(["a"] * 4), 0)]), ["sample 0: input 'x' is an array of str32; expected a tensor or an array"]),
    "some inputs of another shape": (
        Items([(x if i % 10 else x[:2], y) for i, (x, y) in enumerate(PAIRS, 1)]),
        ["3 of 30 samples (9, 19, 29): input 'x' has shape [2]; expected [4], the shape in student.inputs without the batch axis"],
    ),
    "one input that is nan": (
        Items([(x if i != 7 else x * float("nan"), y) for i, (x, y) in enumerate(PAIRS)]),
        ["sample 7 has an input that is not finite (NaN or infinite); expected finite numbers"],
    ),
    "inputs that are infinite": (
        TensorDataset(X / (torch.arange(30) % 3)[:, None], Y),
        ["10 of 30 samples (0, 3, 6, ...) have an input that is not finite (NaN or infinite); expected finite numbers"],
    ),
    "items without label": (TensorDataset(X), ["30 of 30 samples (0, 1, 2, ...): is a tuple of 1; expected a pair (input, label)"]),
    "items that are not pairs": (Items(list(X)), ["sample 0: is Tensor; expected a pair (input, label)"]),
    "items that are dictionaries": (Items([{"x": x, "y": y} for x, y in PAIRS]), ["sample 0: is dict; expected a pair (input, label)"]),
    "items with something more": (Items([(x, y, 0) for x, y in PAIRS]), ["sample 0: is a tuple of 3; expected a pair (input, label)"]),
    "label nan": (
        TensorDataset(X, torch.full((30,), float("nan"))),
        ["label 0 is not finite (NaN or infinite), and 29 more; expected a class id"],
    ),
    "label whole floats": (
        TensorDataset(X, Y.float()),
        ["labels are float32; expected one whole number per sample, its class id; convert them with .long() or .astype('int64')"],
    ),
    "label floats": (TensorDataset(X, Y + 0.5), ["labels are float32; expected one whole number per sample, its class id"]),
    "label truth values": (
        Items([(x, y > 0) for x, y in PAIRS]),
        ["labels are bool; expected one whole number per sample, its class id; convert them with .long() or .astype('int64')"],
    ),
    "label one-hot": (
        TensorDataset(X, torch.eye(3, dtype=torch.int64)[Y]),
        ["labels are int64 of shape [3]; expected one whole number per sample, its class id; for one-hot labels return .argmax(-1)"],
    ),
    "label with an axis": (
        TensorDataset(X, Y[:, None]),
        ["labels are int64 of shape [1]; expected one whole number per sample, its class id; remove the axis with .squeeze(-1)"],
    ),
    "one sample with a label of one axis": (
        Items([(X[0], torch.tensor([1, 2]))]),
        ["labels are int64 of shape [2]; expected one whole number per sample, its class id; for one-hot labels return .argmax(-1)"],
    ),
    "label of several shapes": (
        Items([(x, torch.zeros(1 + i % 2).long()) for i, (x, _) in enumerate(PAIRS)]),
        ["labels have different shapes ([1], [2]); expected the same for each sample"],
    ),
    "label negative": (
        TensorDataset(X, Y - 1),
        [
            (
                "label 0 is -1, and 9 more are negative; expected class ids from 0 upwards "
                "(samples without a class, -1 or -100, belong in the split 'unlabelled')"
            )
        ],
    ),
    "label beyond int64": (
        Items([(x, 2**63 if i == 3 else y) for i, (x, y) in enumerate(PAIRS)]),
        ["sample 3: its label is 9223372036854775808; expected at most 9223372036854775807, the largest int64"],
    ),
    "label beyond 64 bits": (
        Items([(x, 2**80) for x, _ in PAIRS]),
        ["sample 0: its label is 1.208926e+24; expected at most 9223372036854775807, the largest int64"],
    ),
    "label uint64": (
        Items([(x, np.array(2**64 - 1, dtype=np.uint64)) for x, _ in PAIRS]),
        ["sample 0: its label is 18446744073709551615; expected at most 9223372036854775807, the largest int64"],
    ),
    "label complex": (
        TensorDataset(X, Y.to(torch.complex64)),
        ["30 of 30 samples (0, 1, 2, ...): its label is a complex64 tensor; expected real numbers"],
    ),
    "input without data": (
        TensorDataset(X.to("meta"), Y.to("meta")),
        ["30 of 30 samples (0, 1, 2, ...): input 'x' is a float32 tensor on meta; expected one that numpy can read"],
    ),
    "input of eight bits": (
        TensorDataset(X.to(torch.float8_e4m3fn), Y),
        ["30 of 30 samples (0, 1, 2, ...): input 'x' is a float8_e4m3fn tensor on cpu; expected one that numpy can read"],
    ),
    "label text": (Items([(x, "cat") for x, _ in PAIRS]), ["sample 0: its label is str; expected a number, a tensor or an array"]),
    "label None": (Items([(x, None) for x, _ in PAIRS]), ["sample 0: its label is NoneType; expected a number, a tensor or an array"]),
    "samples differ when they are read twice": (
        Unstable(PAIRS),
        [
            "sample 0 differs when it is read twice; return each sample unchanged: augmentation belongs in teacher.train.augment or distill.augment"
        ],
    ),
    "labels differ when they are read twice": (
        UnstableLabel(PAIRS),
        [
            "sample 0 differs when it is read twice; return each sample unchanged: augmentation belongs in teacher.train.augment or distill.augment"
        ],
    ),
    "several things wrong": (
        Items([(x if i != 4 else x[:2], y if i != 6 else "cat") for i, (x, y) in enumerate(PAIRS)]),
        [
            "sample 4: input 'x' has shape [2]; expected [4], the shape in student.inputs without the batch axis",
            "sample 6: its label is str; expected a number, a tensor or an array",
        ],
    ),
}


@pytest.mark.parametrize("name", BAD_TRAIN)
def test_invalid_training_split(name, tmp_path):
    data, expected = BAD_TRAIN[name]
    assert problems_of(read, tmp_path, datasets(train=data)) == [f"data.py:splits: train: {text}" for text in expected]


def test_the_problems_of_all_splits_are_reported_together(tmp_path):
    problems = problems_of(read, tmp_path, datasets(train=TensorDataset(X, Y.float()), evaluation=TensorDataset(*tensors(40, 60)[:1])))
    assert [text.split(": ")[1] for text in problems] == ["train", "evaluation"]


def test_a_sample_that_raises_is_reported_with_its_number(tmp_path):
    (problem,) = problems_of(read, tmp_path, datasets(train=Raises(PAIRS)))
    assert problem.endswith(": reading sample 5 of train raised OSError: disk gone")
    (problem,) = problems_of(read, tmp_path, datasets(train=Subset(dataset(0, 30), [0, 99])))
    assert "reading train raised IndexError" in problem


NOT_MAPPINGS = {"nothing": None, "a list": [dataset(0, 3)], "a tuple": (1, 2), "a data set": dataset(0, 3)}


@pytest.mark.parametrize("name", NOT_MAPPINGS)
def test_splits_that_are_not_a_mapping(name):
    (problem,) = problems_of(splits.check_datasets, NOT_MAPPINGS[name], ENTRY)
    assert problem.startswith("data.py:splits: returned ")
    assert problem.endswith("; expected a mapping with the splits train, validation, calibration, evaluation")


NOT_MAP_STYLE = {
    "a stream": Stream(),
    "a loader of a stream": DataLoader(Stream()),
    "an iterator": iter(()),
    "a number": 3,
    "text": "train",
    "a dictionary": {0: 1},
    "nothing": None,
}


@pytest.mark.parametrize("name", NOT_MAP_STYLE)
def test_a_split_that_is_not_map_style(name):
    (problem,) = problems_of(splits.check_datasets, datasets(validation=NOT_MAP_STYLE[name]), ENTRY)
    assert problem.startswith("data.py:splits: split 'validation' is ")
    assert problem.endswith("; expected a map-style torch data set, with __len__ and __getitem__")


def test_missing_unknown_and_empty_splits_are_reported_together():
    returned = datasets(validaton=dataset(30, 40), evaluation=Items([]))
    del returned["validation"]
    assert problems_of(splits.check_datasets, returned, ENTRY) == [
        "data.py:splits: lacks the split 'validation'; expected train, validation, calibration, evaluation, and unlabelled if there is one",
        (
            "data.py:splits: 'validaton' is not a split; expected one of calibration, evaluation, train, unlabelled, validation "
            "(did you mean 'validation'?)"
        ),
        "data.py:splits: split 'evaluation' is empty; expected at least one sample",
    ]
    (problem,) = problems_of(splits.check_datasets, datasets(train=NoLength([])), ENTRY)
    assert problem.endswith("the length of split 'train' raised NotImplementedError: no length")


OVERLAPS = {
    "train and evaluation": (
        {"evaluation": dataset(28, 48), "validation": dataset(50, 60)},
        [
            "splits train and evaluation overlap: 2 of 20 samples of evaluation are also in train (evaluation[0] is train[28], evaluation[1] is train[29]);"
        ],
    ),
    "train and validation": ({"validation": dataset(27, 37)}, ["splits train and validation overlap: 3 of 10 samples of validation"]),
    "validation and evaluation": (
        {"validation": dataset(30, 41)},
        ["splits validation and evaluation overlap: 1 of 20 samples of evaluation"],
    ),
    "one data set for two": (
        {"validation": dataset(40, 60)},
        ["splits validation and evaluation overlap: 20 of 20 samples of evaluation"],
    ),
    "unlabelled and evaluation": ({"unlabelled": dataset(59, 70)}, ["splits unlabelled and evaluation overlap: 1 of 20"]),
    "calibration and validation": (
        {"calibration": dataset(29, 32)},
        [
            "splits calibration and validation overlap: 2 of 10 samples of validation are also in calibration",
            "calibration: 2 of 3 samples are not in train (1, 2); expected unchanged samples of the training split",
        ],
    ),
    "calibration from nowhere": ({"calibration": dataset(70, 75)}, ["calibration: 5 of 5 samples are not in train (0, 1, 2, ...);"]),
    "calibration scaled": ({"calibration": TensorDataset(X[:4] / 2)}, ["calibration: 4 of 4 samples are not in train"]),
}


@pytest.mark.parametrize("name", OVERLAPS)
def test_splits_that_overlap(name, tmp_path):
    changes, expected = OVERLAPS[name]
    problems = problems_of(splits.count_overlaps, read(tmp_path, datasets(**changes)), 0, ENTRY)
    assert len(problems) == len(expected)
    assert all(text.startswith(f"data.py:splits: {start}") for text, start in zip(problems, expected, strict=True))


def test_overlap_is_allowed_up_to_max_overlap(tmp_path):
    stored = read(tmp_path, datasets(evaluation=dataset(28, 48), validation=dataset(50, 60)))
    assert splits.count_overlaps(stored, 2, ENTRY)["evaluation"] == {"train": 2}
    assert "expected at most data.max_overlap = 1" in problems_of(splits.count_overlaps, stored, 1, ENTRY)[0]


def test_samples_with_several_inputs_overlap_only_if_all_inputs_are_equal(tmp_path):
    x, y = tensors(0, 60)
    x = x[torch.arange(60) % 30]  # evaluation repeats the first inputs of train
    mask = torch.arange(360).reshape(60, 2, 3)

    def masked(start, stop, second):
        return TensorDataset(x[start:stop], second[start:stop], y[start:stop])

    returned = {
        name: masked(*rows, mask)
        for name, rows in {"train": (0, 30), "calibration": (0, 3), "validation": (30, 40), "evaluation": (40, 60)}.items()
    }
    splits.count_overlaps(read(tmp_path, returned, TWO_INPUTS), 0, ENTRY)
    returned["evaluation"] = masked(40, 60, mask[torch.arange(60) % 30])
    assert (
        "splits train and evaluation overlap: 20 of 20"
        in problems_of(splits.count_overlaps, read(tmp_path, returned, TWO_INPUTS), 0, ENTRY)[0]
    )


def _shuffled(seed):
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    return X[order], Y[order]


AGAIN = {  # splits of a second call, and the message
    "another order": (TensorDataset(*_shuffled(1)), r"sample \d is another one when splits\(\) is called again; return the same splits"),
    "another order of items": (Items(list(zip(*_shuffled(1), strict=True))), r"sample \d+ is another one"),
    "other labels": (TensorDataset(X, (Y + 1) % 3), "sample 0 is another one"),
    "one late sample": (TensorDataset(torch.cat([X[:29], X[:1]]), Y), "sample 29 is another one"),
    "one late label": (Items([*PAIRS[:20], (PAIRS[20][0], 1 - PAIRS[20][1] % 2), *PAIRS[21:]]), "sample 20 is another one"),
    "another length": (TensorDataset(X[:29], Y[:29]), "has 30 samples, and 29 when"),
    "another shape": (TensorDataset(X[:, :3], Y), "sample 0 is another one"),
}


@pytest.mark.parametrize("name", AGAIN)
def test_splits_that_differ_when_they_are_made_again(name, tmp_path):
    train, message = AGAIN[name]
    stored = read(tmp_path, datasets())
    with pytest.raises(RecipeError, match=f"data.py:splits: train: {message}") as caught:
        splits.check_repeatable(datasets(train=train), stored, settings(tmp_path))
    assert len(caught.value.problems) == 1


class LateDraw(Items):
    """Only some samples in the middle are drawn anew each time."""

    def __getitem__(self, index):
        x, y = self.items[index]
        return (x + torch.rand(4), y) if index in range(7, 12) else (x, y)


def test_a_sample_in_the_middle_that_differs_is_noticed(tmp_path):
    (problem,) = problems_of(read, tmp_path, datasets(train=LateDraw(PAIRS)))
    assert "differs when it is read twice" in problem
