# SPDX-License-Identifier: Apache-2.0
"""Twelve of the forty words of the Arabic Speech Commands Dataset (Ghandoura, Hjabo and Al Dakkak, 2021, CC BY 4.0).

``EDGEKD_DATA`` names the folder that holds ``train.tar``, ``val.tar`` and ``test.tar``, else it is ``data/`` beside this file:
clips ``WORD/SPEAKER_NO_ROUND.flac`` of about a second, 16 kHz. No speaker stands in two of the three.
"""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import soundfile
import torch
from scipy.fft import dct
from torch.utils.data import Subset, TensorDataset
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

if TYPE_CHECKING:
    from torch.utils.data import Dataset

WORDS = ("close", "disable", "down", "enable", "left", "no", "open", "right", "start", "stop", "up", "yes")
RATE, SAMPLES = 16_000, 16_000
WINDOW, HOP, BANDS, COEFFICIENTS = 512, 256, 40, 13
CALIBRATION = 240
SHIFT = 6  # frames, 16 ms each
MASKED = 8  # frames at most


class Clips(NamedTuple):
    """Samples in [-1, 1], the number of the word and the speaker, of each clip; clips that nobody labelled have no words."""

    waveforms: list[np.ndarray]
    words: list[int]
    speakers: list[str]


def splits() -> dict[str, Dataset]:
    """Return the splits: ``(MFCC (1, 63, 13), word)`` items, each coefficient scaled by the training set's mean and deviation."""
    return scaled({"train": clips("train"), "validation": clips("val"), "evaluation": clips("test")})


def scaled(found: dict[str, Clips]) -> dict[str, Dataset]:
    """Return the splits of these clips, and ``calibration``; items of clips without words are ``(MFCC,)``."""
    features = {name: torch.from_numpy(np.stack([mfcc(one) for one in heard.waveforms])).unsqueeze(1) for name, heard in found.items()}
    mean, deviation = features["train"].mean((0, 1, 2)), features["train"].std((0, 1, 2))
    made = {}
    for name, heard in found.items():
        words = (torch.tensor(heard.words),) if heard.words else ()
        made[name] = TensorDataset((features[name] - mean) / deviation, *words)
    made["evaluation"].groups = found["evaluation"].speakers  # clips of one speaker are not independent
    count = len(features["train"])
    return {**made, "calibration": Subset(made["train"], range(0, count, count // CALIBRATION))}


def augment(features: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a batch with each clip moved in time by up to 0.1 s, and up to 0.13 s of it blanked (Park et al. 2019)."""
    count, frames = len(features), features.shape[2]
    moved = torch.arange(frames) + torch.randint(-SHIFT, SHIFT + 1, (count, 1), generator=generator)
    features = features[torch.arange(count)[:, None], 0, moved.clamp(0, frames - 1)].unsqueeze(1)
    length = torch.randint(0, MASKED + 1, (count, 1), generator=generator)
    start = (torch.rand(count, 1, generator=generator) * (frames - length)).long()
    blank = (torch.arange(frames) >= start) & (torch.arange(frames) < start + length)
    return features.masked_fill(blank[:, None, :, None], 0.0)


def mfcc(samples: np.ndarray) -> np.ndarray:
    """Return Mel-frequency cepstral coefficients. Shapes: samples (n,) in [-1, 1], result (63, 13)."""
    filters = mel_filter_bank(WINDOW // 2 + 1, BANDS, 20.0, RATE / 2, RATE, mel_scale="htk")
    heard = second(samples)
    bands = spectrogram(heard, window_function(WINDOW, "hann"), WINDOW, HOP, power=2.0, mel_filters=filters, log_mel="log", mel_floor=1e-8)
    found: np.ndarray = dct(bands.T, norm="ortho")[:, :COEFFICIENTS].astype(np.float32)
    return found


def second(samples: np.ndarray) -> np.ndarray:
    """Return the second that the networks hear: cut, or with silence behind it."""
    padded = np.zeros(SAMPLES)
    padded[: min(len(samples), SAMPLES)] = samples[:SAMPLES]
    return padded


def clips(split: str) -> Clips:
    """Return the clips of an archive, in the order of their names."""
    path = Path(os.environ.get("EDGEKD_DATA") or Path(__file__).parent / "data") / f"{split}.tar"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; name the folder with train.tar, val.tar and test.tar: EDGEKD_DATA=...")
    found = Clips([], [], [])
    with tarfile.open(path) as archive:
        for member in sorted((item for item in archive if item.name.endswith(".flac")), key=lambda item: item.name):
            word, _, name = member.name.removeprefix("./").rpartition("/")
            samples, rate = soundfile.read(io.BytesIO(archive.extractfile(member).read()), dtype="float32")  # 16 bits fit exactly
            if rate != RATE or samples.ndim != 1:
                raise ValueError(f"{path}: {member.name}: {rate} Hz in {samples.ndim} dimensions; expected {RATE} Hz, mono")
            found.waveforms.append(samples)
            found.words.append(WORDS.index(word))
            found.speakers.append(name.partition("_")[0])
    return found
