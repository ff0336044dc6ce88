# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017, MIT): 70,000 pictures of clothes, 28x28 grey pixels, ten classes.

``fetch.py`` gets the files. They are read from the folder that ``EDGEKD_DATA`` names, else from ``data/`` beside this file.
"""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import TensorDataset

if TYPE_CHECKING:
    from torch.utils.data import Dataset

SIDE = 28
TRAIN, CALIBRATION = 55_000, 500  # of 60,000; the publisher's order is shuffled, the rest is for validation
LABELLED = 10_000  # of the training pictures, in ``few``
SHIFT = 2


def splits() -> dict[str, Dataset]:
    """Return the splits: ``(image (1, 28, 28) in [0, 1], class)`` items. The evaluation set is the publisher's test set."""
    images, labels = _read("train")
    return {
        "train": TensorDataset(images[:TRAIN], labels[:TRAIN]),
        "validation": TensorDataset(images[TRAIN:], labels[TRAIN:]),
        "calibration": TensorDataset(images[:CALIBRATION], labels[:CALIBRATION]),
        "evaluation": TensorDataset(*_read("t10k")),
    }


def few() -> dict[str, Dataset]:
    """Return the splits with labels for 10,000 training pictures only; the other 45,000 are ``unlabelled``."""
    found = splits()
    images, labels = found["train"].tensors
    labelled = TensorDataset(images[:LABELLED], labels[:LABELLED])
    return {**found, "train": labelled, "unlabelled": TensorDataset(images[LABELLED:])}


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a batch with each picture mirrored or not, and moved by up to two pixels: what the teacher is taught on."""
    count = len(images)
    mirrored = torch.rand(count, generator=generator) < 0.5  # noqa: PLR2004  (heads or tails)
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    padded = functional.pad(images, (SHIFT,) * 4)
    row, column = torch.randint(0, 2 * SHIFT + 1, (2, count, 1), generator=generator) + torch.arange(SIDE)
    return padded[torch.arange(count)[:, None, None], 0, row[:, :, None], column[:, None, :]].unsqueeze(1)


def _read(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    folder = Path(os.environ.get("EDGEKD_DATA") or Path(__file__).parent / "data")
    pixels = _numbers(folder / f"{part}-images-idx3-ubyte.gz", header_bytes=16)
    images = torch.from_numpy(pixels.reshape(-1, 1, SIDE, SIDE)).float() / 255
    return images, torch.from_numpy(_numbers(folder / f"{part}-labels-idx1-ubyte.gz", header_bytes=8)).long()


def _numbers(path: Path, header_bytes: int) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; get the data with: python fetch.py, or name its folder: EDGEKD_DATA=...")
    return np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.uint8, offset=header_bytes).copy()
