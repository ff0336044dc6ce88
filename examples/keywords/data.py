# SPDX-License-Identifier: Apache-2.0
"""Twelve of the forty words of the Arabic Speech Commands Dataset (Ghandoura, Hjabo and Al Dakkak, 2021, CC BY 4.0).

``EDGEKD_DATA`` names the folder that holds ``train.tar``, ``val.tar`` and ``test.tar``, else it is ``data/`` beside this file:
clips ``WORD/SPEAKER_NO_ROUND.flac`` of about a second, 16 kHz. No speaker is in more than one of the three.
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
    """Each clip's waveform in [-1, 1], the index of its word, and its speaker; unlabelled clips have no words."""

    waveforms: list[np.ndarray]
    words: list[int]
    speakers: list[str]


def splits() -> dict[str, Dataset]:
    """Return the splits: ``(MFCC (1, 63, 13), word)`` items, each coefficient standardized by the training set's mean and deviation."""
    return to_datasets({"train": read_clips("train"), "validation": read_clips("val"), "evaluation": read_clips("test")})


def to_datasets(clips_by_split: dict[str, Clips]) -> dict[str, Dataset]:
    """Return standardized MFCC data sets for the given clips, and ``calibration``; items of unlabelled clips are ``(MFCC,)``."""
    features = {
        name: torch.from_numpy(np.stack([mfcc(waveform) for waveform in clips.waveforms])).unsqueeze(1)
        for name, clips in clips_by_split.items()
    }
    mean, deviation = features["train"].mean((0, 1, 2)), features["train"].std((0, 1, 2))
    datasets = {}
    for name, clips in clips_by_split.items():
        words = (torch.tensor(clips.words),) if clips.words else ()
        datasets[name] = TensorDataset((features[name] - mean) / deviation, *words)
    datasets["evaluation"].groups = clips_by_split["evaluation"].speakers  # clips of one speaker are not independent
    count = len(features["train"])
    return {**datasets, "calibration": Subset(datasets["train"], range(0, count, count // CALIBRATION))}


def augment(features: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a batch with each clip shifted in time by up to 0.1 s, and up to 0.13 s of it masked (Park et al. 2019)."""
    count, frames = len(features), features.shape[2]
    shifted = torch.arange(frames) + torch.randint(-SHIFT, SHIFT + 1, (count, 1), generator=generator)
    features = features[torch.arange(count)[:, None], 0, shifted.clamp(0, frames - 1)].unsqueeze(1)
    length = torch.randint(0, MASKED + 1, (count, 1), generator=generator)
    start = (torch.rand(count, 1, generator=generator) * (frames - length)).long()
    mask = (torch.arange(frames) >= start) & (torch.arange(frames) < start + length)
    return features.masked_fill(mask[:, None, :, None], 0.0)


def mfcc(samples: np.ndarray) -> np.ndarray:
    """Return Mel-frequency cepstral coefficients. Shapes: samples (n,) in [-1, 1], result (63, 13)."""
    filters = mel_filter_bank(WINDOW // 2 + 1, BANDS, 20.0, RATE / 2, RATE, mel_scale="htk")
    waveform = fix_length(samples)
    bands = spectrogram(
        waveform, window_function(WINDOW, "hann"), WINDOW, HOP, power=2.0, mel_filters=filters, log_mel="log", mel_floor=1e-8
    )
    coefficients: np.ndarray = dct(bands.T, norm="ortho")[:, :COEFFICIENTS].astype(np.float32)
    return coefficients


def fix_length(samples: np.ndarray) -> np.ndarray:
    """Return exactly one second: longer clips are cut, shorter ones padded with silence."""
    padded = np.zeros(SAMPLES)
    padded[: min(len(samples), SAMPLES)] = samples[:SAMPLES]
    return padded


def read_clips(split: str) -> Clips:
    """Return the clips of an archive, sorted by name."""
    path = Path(os.environ.get("EDGEKD_DATA") or Path(__file__).parent / "data") / f"{split}.tar"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; name the folder with train.tar, val.tar and test.tar: EDGEKD_DATA=...")
    clips = Clips([], [], [])
    with tarfile.open(path) as archive:
        for member in sorted((item for item in archive if item.name.endswith(".flac")), key=lambda item: item.name):
            word, _, name = member.name.removeprefix("./").rpartition("/")
            samples, rate = soundfile.read(io.BytesIO(archive.extractfile(member).read()), dtype="float32")  # 16 bits fit exactly
            if rate != RATE or samples.ndim != 1:
                raise ValueError(f"{path}: {member.name}: {rate} Hz in {samples.ndim} dimensions; expected {RATE} Hz, mono")
            clips.waveforms.append(samples)
            clips.words.append(WORDS.index(word))
            clips.speakers.append(name.partition("_")[0])
    return clips
