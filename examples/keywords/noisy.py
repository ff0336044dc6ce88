# SPDX-License-Identifier: Apache-2.0
"""Keywords among other voices: a teacher that was taught on clean clips, and the same clips with babble, which nobody labelled.

The data are those of ``data.py``. Babble for what is learnt from is made of the training speakers, for what is evaluated of the
validation speakers: nobody is heard in both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from data import SAMPLES, Clips, clips, scaled, second

if TYPE_CHECKING:
    from torch.utils.data import Dataset

LEVEL_DB = 25.0  # a clip's power over its babble's: pauses are so quiet in these recordings that the teacher is lost at 15
VOICES = 6


def splits() -> dict[str, Dataset]:
    """Return the splits: as in ``data.py``, but with babble in ``evaluation``, and ``unlabelled``, the training clips with babble."""
    train, validation, evaluation = (clips(name) for name in ("train", "val", "test"))
    unlabelled = Clips(mixed(train.waveforms, train.waveforms, seed=0), [], [])
    noisy = evaluation._replace(waveforms=mixed(evaluation.waveforms, validation.waveforms, seed=1))
    return scaled({"train": train, "validation": validation, "evaluation": noisy, "unlabelled": unlabelled})


def mixed(waveforms: list[np.ndarray], voices: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """Return a second of each waveform with babble of its own in it, ``LEVEL_DB`` below it."""
    generator = np.random.default_rng(seed)
    found = []
    for waveform in waveforms:
        clip, noise = second(waveform), babble(voices, generator)
        found.append(clip + noise * np.sqrt(np.mean(clip**2) / np.mean(noise**2)) / 10 ** (LEVEL_DB / 20))
    return found


def babble(voices: list[np.ndarray], generator: np.random.Generator) -> np.ndarray:
    """Return a second of some of the voices at once, equally loud, each moved in time. Shapes: result (SAMPLES,)."""
    found = np.zeros(SAMPLES)
    for row in generator.choice(len(voices), VOICES, replace=False):
        voice = second(voices[row])
        found += np.roll(voice / np.sqrt(np.mean(voice**2)), generator.integers(SAMPLES))
    return found
