# SPDX-License-Identifier: Apache-2.0
"""BANKING77 (Casanueva et al., 2020, CC BY 4.0): questions of bank customers in English, 77 intents; ten labels an intent are used.

``EDGEKD_DATA`` names the folder that holds ``train.csv`` and ``test.csv`` (columns text, category), else it is ``data/`` beside
this file. The words are cut as the teacher's tokenizer does it: ``encoder.py``.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from encoder import TOKENS, tokenize
from torch.utils.data import Dataset, Subset, TensorDataset

LABELLED, VALIDATED = 10, 5  # questions of each intent whose label is used; all others are unlabelled

if TYPE_CHECKING:
    from collections.abc import Sequence


class Inputs(Dataset[torch.Tensor]):
    """Questions without their labels."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.ids)

    def __getitem__(self, row: int) -> torch.Tensor:
        """Return the token ids of one question, (40,)."""
        return self.ids[row]


def splits() -> dict[str, Dataset]:
    """Return the splits: ``(token ids (40,), intent)`` items; a question of two splits, as tokens, is kept in the first of them."""
    test_texts, test_names = _read("test")
    texts, names = _read("train")
    intents = sorted(set(names))
    ids = torch.from_numpy(tokenize([*test_texts, *texts]))
    labels = torch.tensor([intents.index(name) for name in [*test_names, *names]])
    rows = _first_of_equals(ids)
    evaluation = rows[rows < len(test_texts)]
    pool = np.random.default_rng(0).permutation(rows[rows >= len(test_texts)])
    of_intent = [pool[labels[pool].numpy() == number] for number in range(len(intents))]
    train = np.concatenate([found[:LABELLED] for found in of_intent])
    validation = np.concatenate([found[LABELLED : LABELLED + VALIDATED] for found in of_intent])
    unlabelled = np.concatenate([found[LABELLED + VALIDATED :] for found in of_intent])
    labelled = TensorDataset(ids[train], labels[train])
    return {
        "train": labelled,
        "validation": TensorDataset(ids[validation], labels[validation]),
        "calibration": Subset(labelled, range(0, len(train), 2)),
        "evaluation": TensorDataset(ids[evaluation], labels[evaluation]),
        "unlabelled": Inputs(ids[np.sort(unlabelled)]),
    }


def _first_of_equals(ids: torch.Tensor) -> np.ndarray:
    first = np.unique(ids.numpy().reshape(-1, TOKENS), axis=0, return_index=True)[1]
    found: np.ndarray = np.sort(first)
    return found


def _read(part: str) -> tuple[Sequence[str], Sequence[str]]:
    path = Path(os.environ.get("EDGEKD_DATA") or Path(__file__).parent / "data") / f"{part}.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; name the folder with train.csv and test.csv: EDGEKD_DATA=...")
    with path.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    return [row["text"] for row in rows], [row["category"] for row in rows]
