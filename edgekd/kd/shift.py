# SPDX-License-Identifier: Apache-2.0
"""Whether unlabelled samples come from where the teacher is at home: by how sure it is of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

MIN_SAMPLES = 30  # fewer say nothing
MIN_DROP = 0.05  # of mean confidence: a smaller one is of no consequence
Z = 2.58  # two-sided 99 %
CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Sureness:
    """Of the teacher's answers to a split: how many, and mean and variance of its confidence (the largest softmax)."""

    samples: int
    mean: float
    variance: float


def sureness(outputs: np.ndarray) -> Sureness:
    """Return how sure the teacher is, over all views. Shapes: outputs (V, n, C) logits."""
    import numpy as np

    views, samples, classes = outputs.shape
    if samples == 0:
        return Sureness(0, 0.0, 0.0)
    flat = outputs.reshape(-1, classes)
    parts = []
    for start in range(0, len(flat), CHUNK):
        logits = flat[start : start + CHUNK].astype(np.float64)
        parts.append(1 / np.exp(logits - logits.max(1, keepdims=True)).sum(1))
    confidence = np.concatenate(parts).reshape(views, samples).mean(0)  # views of one sample are not independent
    return Sureness(samples, float(confidence.mean()), float(confidence.var()))


def warning(home: Sureness, other: Sureness) -> str | None:
    """Return the warning that the teacher is less sure of the unlabelled samples than of its validation split, or None.

    A teacher is more confident on samples like those that it was taught on; the mean difference estimates what its accuracy
    loses there. It cannot see a shift that leaves it confidently wrong.

    Source: Guillory et al., arXiv 2107.03315 (difference of confidences); Welch 1947.
    """
    if min(home.samples, other.samples) < MIN_SAMPLES:
        return None
    drop = home.mean - other.mean
    error = math.sqrt(home.variance / home.samples + other.variance / other.samples)
    if drop < MIN_DROP or drop < Z * error:
        return None
    return (
        f"the domains differ: the teacher's confidence is {100 * other.mean:.1f} % on the unlabelled samples, {100 * home.mean:.1f} % on "
        f"validation; expect it to be wrong about {100 * drop:.0f} points more often there, and the student with it"
    )
