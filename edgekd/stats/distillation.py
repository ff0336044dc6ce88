# SPDX-License-Identifier: Apache-2.0
"""The verdict on distillation: students of several seeds against twins that were trained alike, without a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgekd.domain.recipe import DISTILLED
from edgekd.stats import intervals, scores

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from edgekd.domain.verdict import Interval
    from edgekd.stats.scores import ModelScores

BINS = 15  # of the calibration error
HELPS, NO_EFFECT, HURTS = "HELPS", "NO EFFECT", "HURTS"


def judge_distillation(
    arms: Mapping[str, Sequence[ModelScores]],
    validation: Mapping[str, Sequence[float]],
    teacher: ModelScores,
    labels: np.ndarray,
    groups: np.ndarray,
    *,
    calibrated: bool,
) -> dict[str, Any]:
    """Return whether distillation helped, for a report.

    Args:
        arms: What was scored of each arm (``distilled`` and the twins), seed by seed in the same order.
        validation: Each arm's accuracy on the validation split (or its loss with a minus, without classes), seed by seed.
        teacher: The reference.
        labels: Shape (n,).
        groups: Shape (n,): samples that share a speaker or a source share a group.
        calibrated: Whether outputs are logits of classes, so that a calibration error has a meaning.
    """
    rival = max((arm for arm in arms if arm != DISTILLED), key=lambda arm: _mean(validation[arm]))  # chosen where nothing is judged
    rows: list[dict[str, Any]] = []
    gains: list[dict[str, Any]] = []
    for arm, scored in arms.items():
        row: dict[str, Any] = {"arm": arm, "accuracies": [item.accuracy for item in scored], "ece": None, "nll": None}
        if calibrated:
            row["ece"] = _mean([calibration_error(item.outputs, labels) for item in scored])
            row["nll"] = _mean([negative_log_likelihood(item.outputs, labels) for item in scored])
        rows.append(row)
        if arm != DISTILLED:
            value, interval = _gain(arms[DISTILLED], scored, groups)
            gains.append({"against": arm, "pp": 100 * value, "interval_pp": [100 * interval.low, 100 * interval.high]})
    deciding = next(gain for gain in gains if gain["against"] == rival)
    low, high = deciding["interval_pp"]
    distilled, alone = (_mean([item.accuracy for item in arms[arm]]) for arm in (DISTILLED, "no_teacher"))
    gap = teacher.accuracy - alone
    return {
        "outcome": HELPS if low > 0 else HURTS if high < 0 else NO_EFFECT,
        "seeds": len(arms[DISTILLED]),
        "against": rival,
        "arms": rows,
        "gains": gains,
        "gap_closed": (distilled - alone) / gap if gap > 0 else None,
        "flags": [*_flags(teacher, distilled, alone, groups), *_inherited(arms, teacher, labels, groups)],
    }


def calibration_error(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Return the expected calibration error: how far confidence is from accuracy, over bins of equal width, by their share.

    Shapes: outputs (n, C) logits, labels (n,).
    Source: Guo et al., arXiv 1706.04599, equation 3.
    """
    import numpy as np

    shares = np.exp(_log_softmax(outputs))
    confidence, right = shares.max(1), outputs.argmax(1) == labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=confidence - right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(labels))


def negative_log_likelihood(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean of ``-log softmax(outputs)[label]``. Shapes: outputs (n, C), labels (n,)."""
    import numpy as np

    return float(-_log_softmax(outputs)[np.arange(len(labels)), labels].mean())


def _gain(first: Sequence[ModelScores], second: Sequence[ModelScores], groups: np.ndarray) -> tuple[float, Interval]:
    """Return the mean difference of two arms, paired by seed and by sample, and its interval over both."""
    import numpy as np

    if all(item.scores is not None for item in (*first, *second)):
        return intervals.difference_over_seeds(np.stack([one.scores - two.scores for one, two in zip(first, second, strict=True)]), groups)  # type: ignore[operator]  # none is None
    by_seed = np.array([one.accuracy - two.accuracy for one, two in zip(first, second, strict=True)])
    resampled = np.stack([one.resampled - two.resampled for one, two in zip(first, second, strict=True)])  # type: ignore[operator]  # a whole-set metric has them
    interval = intervals.interval_over_seeds(by_seed, float(resampled.mean(0).var(ddof=1)), 0.0, len(np.unique(groups)))
    return float(by_seed.mean()), interval


def _flags(teacher: ModelScores, distilled: float, alone: float, groups: np.ndarray) -> list[str]:
    flags = []
    if teacher.accuracy <= alone:
        told = f"{100 * teacher.accuracy:.2f} % against {100 * alone:.2f} %"
        flags.append(
            f"the teacher is no better than a student that learns from the labels alone ({told}): it cannot teach this student more"
        )
    elif distilled >= scores.accuracy_interval(teacher, groups).low:
        told = f"{100 * distilled:.2f} % of {100 * teacher.accuracy:.2f} %"
        flags.append(f"the student has reached its teacher ({told}): a better student needs a better teacher")
    return flags


def _inherited(arms: Mapping[str, Sequence[ModelScores]], teacher: ModelScores, labels: np.ndarray, groups: np.ndarray) -> list[str]:
    """Return a flag for each class that the teacher knows less of than the twin alone does, if its students know less of it too."""
    import numpy as np

    scored = {arm: [item.scores for item in found] for arm, found in arms.items()}
    if teacher.scores is None or labels.ndim != 1 or any(item is None for found in scored.values() for item in found):
        return []
    flags = []
    classes = np.unique(labels)
    for label in classes:
        rows = labels == label
        distilled, alone = (np.stack(scored[arm])[:, rows] for arm in (DISTILLED, "no_teacher"))  # type: ignore[arg-type]  # none is None
        known, plain = float(teacher.scores[rows].mean()), float(alone.mean())
        if known >= plain:
            continue
        value, interval = intervals.difference_over_seeds(distilled - alone, groups[rows], 1 - (1 - intervals.LEVEL) / len(classes))
        if interval.high < 0:
            told = f"{100 * known:.1f} %, the twin alone {100 * plain:.1f} %, the distilled student {100 * (plain + value):.1f} %"
            flags.append(f"the student inherits its teacher's errors in class {label}: the teacher is right on {told}")
    return flags


def _log_softmax(outputs: np.ndarray) -> np.ndarray:
    import numpy as np

    shifted = outputs.astype(np.float64) - outputs.max(1, keepdims=True)
    found: np.ndarray = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
