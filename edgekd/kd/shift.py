# SPDX-License-Identifier: Apache-2.0
"""Whether unlabelled samples come from where the teacher is at home: by how sure it is of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from edgekd.kd.answers import Answers

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


def sureness(kept: Answers) -> Sureness:
    """Return how sure the teacher is, over all views: those of one sample are not independent, so they are averaged first."""
    import numpy as np

    if kept.header.samples == 0:
        return Sureness(0, 0.0, 0.0)
    confidence = np.mean([tops(kept, view)[1] for view in range(kept.header.views)], axis=0)
    return Sureness(len(confidence), float(confidence.mean()), float(confidence.var()))


def tops(kept: Answers, view: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the teacher's answer to each sample of a view and its confidence in it, the largest softmax. Shapes: (n,) each."""
    import numpy as np

    classes, confidence = [], []
    for start in range(0, kept.header.samples, CHUNK):
        rows = np.arange(start, min(start + CHUNK, kept.header.samples))
        if kept.header.slots:
            ids, logs = kept.read_sparse(view, rows)
            classes.append(ids[:, 0])
            confidence.append(np.exp(logs[:, 0].astype(np.float64)))
        else:
            logits = kept.read(view, rows).astype(np.float64)
            classes.append(logits.argmax(1))
            confidence.append(1 / np.exp(logits - logits.max(1, keepdims=True)).sum(1))
    return np.concatenate(classes), np.concatenate(confidence)


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
