# SPDX-License-Identifier: Apache-2.0
"""Whether unlabelled samples come from where the teacher is at home: by how sure it is of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from edgekd.kd.soft_targets.storage import SoftTargets

MIN_SAMPLES = 30  # fewer say nothing
MIN_DROP = 0.05  # of mean confidence: a smaller one is of no consequence
Z = 2.58  # two-sided 99 %
CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Confidence:
    """Of the teacher's answers to a split: how many, and mean and variance of its confidence (the largest softmax)."""

    samples: int
    mean: float
    variance: float


def mean_confidence(kept: SoftTargets) -> Confidence:
    """Return how sure the teacher is, over all views: those of one sample are not independent, so they are averaged first."""
    import numpy as np

    if kept.header.samples == 0:
        return Confidence(0, 0.0, 0.0)
    confidence = np.mean([top1(kept, view).confidence for view in range(kept.header.views)], axis=0)
    return Confidence(len(confidence), float(confidence.mean()), float(confidence.var()))


class Top1(NamedTuple):
    """The teacher's answer to each sample, its confidence (the largest softmax), and minus the entropy. Shapes: (n,) each.

    Of answers that are kept as samples, the log of the confidence stands for the latter: either orders samples by certainty.
    """

    classes: np.ndarray
    confidence: np.ndarray
    certainty: np.ndarray


def top1(kept: SoftTargets, view: int) -> Top1:
    """Return what the teacher says of each sample of a view."""
    import numpy as np

    found = []
    for start in range(0, kept.header.samples, CHUNK):
        rows = np.arange(start, min(start + CHUNK, kept.header.samples))
        if kept.header.slots:
            ids, logs = kept.read_sparse(view, rows)
            found.append((ids[:, 0], np.exp(logs[:, 0].astype(np.float64)), logs[:, 0]))
        else:
            logits = kept.read(view, rows).astype(np.float64)
            logits -= logits.max(1, keepdims=True)
            shares = np.exp(logits)
            whole = shares.sum(1)
            found.append((logits.argmax(1), 1 / whole, (shares * logits).sum(1) / whole - np.log(whole)))
    return Top1(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def expected_accuracy(home: SoftTargets, labels: np.ndarray, other: SoftTargets) -> tuple[float, float] | None:
    """Return between which shares of samples without labels the teacher is expected to be right, or None if too few have one at home.

    Two estimates: its accuracy at home less the difference of mean confidences, which is true of a teacher that is as sure as
    it is right in both domains; and the share of samples about which it is surer than a threshold, which as many pass at home as
    it is right about, for one that is too sure away from home.

    Args:
        home: Its answers to the validation split.
        labels: Shape (n,): classes there, -1 where there is none.
        other: Its answers to the samples without labels; of several views the mean counts.

    Source:
        Guillory et al., arXiv 2107.03315; Garg et al., arXiv 2201.04234, section 4 (with minus the entropy).
    """
    import numpy as np

    known = labels >= 0
    if known.sum() < MIN_SAMPLES:
        return None
    found, others = top1(home, 0), [top1(other, view) for view in range(other.header.views)]
    right = (found.classes == labels)[known].mean()
    threshold = np.quantile(found.certainty[known], 1 - right)
    surer = np.mean([(one.certainty >= threshold).mean() for one in others])
    calibrated = right - (found.confidence[known].mean() - np.mean([one.confidence.mean() for one in others]))
    return float(min(surer, calibrated)), float(max(surer, calibrated))


def has_shifted(home: Confidence, other: Confidence) -> bool:
    """Return whether the teacher is less sure of the unlabelled samples than of its validation split, by enough and clearly so.

    A teacher is more confident on samples like those that it was taught on. A shift that leaves it confidently wrong is not seen.

    Source: Welch 1947.
    """
    drop = home.mean - other.mean
    if min(home.samples, other.samples) < MIN_SAMPLES or drop < MIN_DROP:
        return False
    return drop >= Z * math.sqrt(home.variance / home.samples + other.variance / other.samples)


def warning(home: Confidence, other: Confidence, expected: tuple[float, float] | None) -> str:
    """Return the warning that the domains differ.

    ``expected``: between what the teacher's accuracy on the others is by estimates; without them, the mean difference of
    confidences says what accuracy loses there (arXiv 2107.03315).
    """
    told = f"wrong about {100 * (home.mean - other.mean):.0f} points more often there"
    if expected is not None:
        told = f"right about {100 * expected[0]:.0f} to {100 * expected[1]:.0f} % of them"
    return (
        f"the domains differ: the teacher's confidence is {100 * other.mean:.1f} % on the unlabelled samples, {100 * home.mean:.1f} % on "
        f"validation; expect it to be {told}, and the student to follow it"
    )
