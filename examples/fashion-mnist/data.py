# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017, MIT): 70,000 grey images of 28x28 pixels, ten classes of clothing.

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
# rows of the 60,000 training images, whose order is random
TEACHER_TRAIN, TEACHER_VALIDATION = range(28_000), range(28_000, 30_000)
LABELLED, UNLABELLED, VALIDATION = range(30_000, 32_000), range(32_000, 50_000), range(58_000, 60_000)
CALIBRATION = 500
SHIFT = 2


def splits() -> dict[str, Dataset]:
    """Return the demo's splits: 2,000 labelled training images and 18,000 unlabelled ones; the teacher was trained on none of them.

    Items are ``(image (1, 28, 28) in [0, 1], class)``, unlabelled ones the image alone. The evaluation split is the publisher's test set.
    """
    return {**_labelled(LABELLED, VALIDATION), "unlabelled": TensorDataset(_read("train")[0][UNLABELLED.start : UNLABELLED.stop])}


def elsewhere() -> dict[str, Dataset]:
    """Return the splits that the teacher was trained on: 28,000 labelled images, none of which is in the demo's splits."""
    return _labelled(TEACHER_TRAIN, TEACHER_VALIDATION)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a batch with each image mirrored or not, and moved by up to two pixels: the augmentation of the teacher's training."""
    count = len(images)
    mirrored = torch.rand(count, generator=generator) < 0.5  # noqa: PLR2004  (a fair coin)
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    padded = functional.pad(images, (SHIFT,) * 4)
    row, column = torch.randint(0, 2 * SHIFT + 1, (2, count, 1), generator=generator) + torch.arange(SIDE)
    return padded[torch.arange(count)[:, None, None], 0, row[:, :, None], column[:, None, :]].unsqueeze(1)


def _labelled(train: range, validation: range) -> dict[str, Dataset]:
    images, labels = _read("train")
    calibration = train[:CALIBRATION]
    parts = {"train": train, "validation": validation, "calibration": calibration}
    datasets = {name: TensorDataset(images[rows.start : rows.stop], labels[rows.start : rows.stop]) for name, rows in parts.items()}
    return {**datasets, "evaluation": TensorDataset(*_read("t10k"))}


def _read(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    folder = Path(os.environ.get("EDGEKD_DATA") or Path(__file__).parent / "data")
    pixels = _numbers(folder / f"{part}-images-idx3-ubyte.gz", header_bytes=16)
    images = torch.from_numpy(pixels.reshape(-1, 1, SIDE, SIDE)).float() / 255
    return images, torch.from_numpy(_numbers(folder / f"{part}-labels-idx1-ubyte.gz", header_bytes=8)).long()


def _numbers(path: Path, header_bytes: int) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; get the data with: python fetch.py, or name its folder: EDGEKD_DATA=...")
    return np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.uint8, offset=header_bytes).copy()
