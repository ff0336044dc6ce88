# SPDX-License-Identifier: Apache-2.0
"""Domain shift of the unlabelled samples, detected by the confidence of the teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from edgekd.kd.soft_targets.storage import SoftTargets

MIN_SAMPLES = 30  # fewer samples show nothing
MIN_DROP = 0.05  # of the mean confidence; a smaller drop has no consequence
Z = 2.58  # two-sided 99 %
CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Confidence:
    """The teacher's confidence (the largest softmax probability) on a split: number of samples, mean and variance."""

    samples: int
    mean: float
    variance: float


def mean_confidence(soft_targets: SoftTargets, views: int | None = None) -> Confidence:
    """Return the teacher's confidence on a split; the (first) views of a sample are averaged first, as they are not independent."""
    import numpy as np

    if soft_targets.header.samples == 0:
        return Confidence(0, 0.0, 0.0)
    confidence = np.mean([top1(soft_targets, view).confidence for view in range(soft_targets.header.views)[:views]], axis=0)
    return Confidence(len(confidence), float(confidence.mean()), float(confidence.var()))


class Top1(NamedTuple):
    """The teacher's predicted class for each sample, its confidence (the largest softmax), and minus the entropy. Shapes: (n,) each.

    For sampled soft targets, ``certainty`` is the logarithm of the confidence instead: either one orders samples by certainty.
    """

    classes: np.ndarray
    confidence: np.ndarray
    certainty: np.ndarray


def top1(soft_targets: SoftTargets, view: int) -> Top1:
    """Return the teacher's predictions for the samples of a view."""
    import numpy as np

    chunks = []
    for start in range(0, soft_targets.header.samples, CHUNK):
        rows = np.arange(start, min(start + CHUNK, soft_targets.header.samples))
        if soft_targets.header.slots:
            ids, logs = soft_targets.read_sparse(view, rows)
            chunks.append((ids[:, 0], np.exp(logs[:, 0].astype(np.float64)), logs[:, 0]))
        else:
            logits = soft_targets.read(view, rows).astype(np.float64)
            logits -= logits.max(1, keepdims=True)
            exponentials = np.exp(logits)
            total = exponentials.sum(1)
            chunks.append((logits.argmax(1), 1 / total, (exponentials * logits).sum(1) / total - np.log(total)))
    return Top1(*(np.concatenate(parts) for parts in zip(*chunks, strict=True)))


def expected_accuracy(
    in_domain: SoftTargets, labels: np.ndarray, unlabelled: SoftTargets, views: int | None = None
) -> tuple[float, float] | None:
    """Return bounds of the teacher's expected accuracy on samples without labels, or None if too few in-domain samples have one.

    The bounds are two estimates. One is the in-domain accuracy minus the difference of the mean confidences: it holds for a teacher
    that is calibrated in both domains. The other is the share of samples on which the teacher is more certain than a threshold,
    which the same share of in-domain samples exceeds as is predicted correctly: it is for a teacher that is overconfident elsewhere.

    Args:
        in_domain: Soft targets of the validation split.
        labels: Shape (n,): its classes, -1 where there is none.
        unlabelled: Soft targets of the samples without labels; several views are averaged.
        views: How many of them are read; None: all.

    Source:
        Guillory et al., arXiv 2107.03315; Garg et al., arXiv 2201.04234, section 4 (with minus the entropy).
    """
    import numpy as np

    is_labelled = labels >= 0
    if is_labelled.sum() < MIN_SAMPLES:
        return None
    validation, shifted = top1(in_domain, 0), [top1(unlabelled, view) for view in range(unlabelled.header.views)[:views]]
    accuracy = (validation.classes == labels)[is_labelled].mean()
    threshold = np.quantile(validation.certainty[is_labelled], 1 - accuracy)
    by_threshold = np.mean([(view.certainty >= threshold).mean() for view in shifted])
    by_confidence = accuracy - (validation.confidence[is_labelled].mean() - np.mean([view.confidence.mean() for view in shifted]))
    return float(min(by_threshold, by_confidence)), float(max(by_threshold, by_confidence))


def has_shifted(in_domain: Confidence, unlabelled: Confidence) -> bool:
    """Return whether the teacher is less confident on the unlabelled samples than on its validation split, relevantly and significantly.

    A teacher is more confident on samples like those that it was trained on. A shift that leaves it confident but wrong is not detected.

    Source: Welch 1947.
    """
    drop = in_domain.mean - unlabelled.mean
    if min(in_domain.samples, unlabelled.samples) < MIN_SAMPLES or drop < MIN_DROP:
        return False
    return drop >= Z * math.sqrt(in_domain.variance / in_domain.samples + unlabelled.variance / unlabelled.samples)


def warning(in_domain: Confidence, unlabelled: Confidence, expected: tuple[float, float] | None) -> str:
    """Return the warning that the domains differ.

    ``expected`` are bounds of the teacher's accuracy on the unlabelled samples. Without them, the difference of the mean confidences
    estimates the loss of accuracy (arXiv 2107.03315).
    """
    if expected is None:
        effect = f"wrong about {100 * (in_domain.mean - unlabelled.mean):.0f} points more often there"
    else:
        effect = f"right about {100 * expected[0]:.0f} to {100 * expected[1]:.0f} % of them"
    return (
        f"the domains differ: the teacher's confidence is {100 * unlabelled.mean:.1f} % on the unlabelled samples, "
        f"{100 * in_domain.mean:.1f} % on validation; expect it to be {effect}, and the student to follow it"
    )
