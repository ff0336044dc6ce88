# SPDX-License-Identifier: Apache-2.0
"""BANKING77 (Casanueva et al., 2020, CC BY 4.0): English questions of bank customers, 77 intents; ten labels per intent are used.

``EDGEKD_DATA`` names the folder that holds ``train.csv`` and ``test.csv`` (columns text, category), else it is ``data/`` beside
this file. Questions are tokenized with the teacher's tokenizer: ``encoder.py``.
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

LABELLED, VALIDATED = 10, 5  # labelled questions per intent; all others are unlabelled

if TYPE_CHECKING:
    from collections.abc import Sequence


class Inputs(Dataset[torch.Tensor]):
    """Questions without their labels."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self.ids)

    def __getitem__(self, row: int) -> torch.Tensor:
        """Return the token ids of one question, (40,)."""
        return self.ids[row]


def splits() -> dict[str, Dataset]:
    """Return the splits: ``(token ids (40,), intent)`` items. Duplicates, compared as tokens, are used once, in evaluation first."""
    test_texts, test_names = _read("test")
    texts, names = _read("train")
    intents = sorted(set(names))
    ids = torch.from_numpy(tokenize([*test_texts, *texts]))
    labels = torch.tensor([intents.index(name) for name in [*test_names, *names]])
    rows = _first_occurrences(ids)
    evaluation = rows[rows < len(test_texts)]
    pool = np.random.default_rng(0).permutation(rows[rows >= len(test_texts)])
    rows_by_intent = [pool[labels[pool].numpy() == number] for number in range(len(intents))]
    train = np.concatenate([rows[:LABELLED] for rows in rows_by_intent])
    validation = np.concatenate([rows[LABELLED : LABELLED + VALIDATED] for rows in rows_by_intent])
    unlabelled = np.concatenate([rows[LABELLED + VALIDATED :] for rows in rows_by_intent])
    labelled = TensorDataset(ids[train], labels[train])
    return {
        "train": labelled,
        "validation": TensorDataset(ids[validation], labels[validation]),
        "calibration": Subset(labelled, range(0, len(train), 2)),
        "evaluation": TensorDataset(ids[evaluation], labels[evaluation]),
        "unlabelled": Inputs(ids[np.sort(unlabelled)]),
    }


def _first_occurrences(ids: torch.Tensor) -> np.ndarray:
    first = np.unique(ids.numpy().reshape(-1, TOKENS), axis=0, return_index=True)[1]
    rows: np.ndarray = np.sort(first)
    return rows


def _read(part: str) -> tuple[Sequence[str], Sequence[str]]:
    path = Path(os.environ.get("EDGEKD_DATA") or Path(__file__).parent / "data") / f"{part}.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; name the folder with train.csv and test.csv: EDGEKD_DATA=...")
    with path.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    return [row["text"] for row in rows], [row["category"] for row in rows]
