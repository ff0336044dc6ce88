# SPDX-License-Identifier: Apache-2.0
"""Keywords with background babble: the teacher was trained on clean clips; the same clips with babble are unlabelled.

The clips are those of ``data.py``. Babble in the unlabelled clips comes from the training speakers, in the evaluation clips from the
validation speakers: no voice is in both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from data import SAMPLES, Clips, fix_length, read_clips, to_datasets

if TYPE_CHECKING:
    from torch.utils.data import Dataset

LEVEL_DB = 25.0  # signal-to-noise ratio; pauses are so quiet in these recordings that the teacher fails at 15
VOICES = 6


def splits() -> dict[str, Dataset]:
    """Return the splits: as in ``data.py``, but with babble in ``evaluation``, and ``unlabelled``, the training clips with babble."""
    train, validation, evaluation = (read_clips(name) for name in ("train", "val", "test"))
    unlabelled = Clips(add_babble(train.waveforms, train.waveforms, seed=0), [], [])
    noisy = evaluation._replace(waveforms=add_babble(evaluation.waveforms, validation.waveforms, seed=1))
    return to_datasets({"train": train, "validation": validation, "evaluation": noisy, "unlabelled": unlabelled})


def add_babble(waveforms: list[np.ndarray], voices: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """Return one second of each waveform mixed with its own babble, ``LEVEL_DB`` below the clip."""
    generator = np.random.default_rng(seed)
    noisy_clips = []
    for waveform in waveforms:
        clip, noise = fix_length(waveform), babble(voices, generator)
        noisy_clips.append(clip + noise * np.sqrt(np.mean(clip**2) / np.mean(noise**2)) / 10 ** (LEVEL_DB / 20))
    return noisy_clips


def babble(voices: list[np.ndarray], generator: np.random.Generator) -> np.ndarray:
    """Return one second of several voices at once, equally loud, each shifted in time. Shapes: result (SAMPLES,)."""
    mixture = np.zeros(SAMPLES)
    for row in generator.choice(len(voices), VOICES, replace=False):
        voice = fix_length(voices[row])
        mixture += np.roll(voice / np.sqrt(np.mean(voice**2)), generator.integers(SAMPLES))
    return mixture
