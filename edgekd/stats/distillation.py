# SPDX-License-Identifier: Apache-2.0
"""The verdict on distillation: students of several seeds against baselines that were trained alike, without a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgekd.domain.recipe import DISTILLED
from edgekd.stats import intervals, jackknife, scores, seeds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from edgekd.domain.verdict import Interval
    from edgekd.stats.scores import ModelScores

CALIBRATION_BINS = 15
HELPS, NO_EFFECT, HURTS = "HELPS", "NO EFFECT", "HURTS"


def judge_distillation(
    methods: Mapping[str, Sequence[ModelScores]],
    validation: Mapping[str, Sequence[float]],
    teacher: ModelScores,
    labels: np.ndarray,
    groups: np.ndarray,
    *,
    calibrated: bool,
) -> dict[str, Any]:
    """Return whether distillation helped, for a report.

    Args:
        methods: The scores of each method (``distilled`` and the baselines), seed by seed in the same order.
        validation: Each method's accuracy on the validation split (for a regression, its negative loss), seed by seed.
        teacher: The scores of the teacher.
        labels: Shape (n,).
        groups: Shape (n,): samples that share a speaker or a source share a group.
        calibrated: Whether outputs are logits of classes, so that a calibration error has a meaning.
    """
    baselines = [method for method in methods if method != DISTILLED]
    strongest_baseline = max(baselines, key=lambda method: _mean(validation[method]))  # not chosen on the split that decides
    gains = {method: _gain(methods[DISTILLED], methods[method], groups) for method in baselines}
    deciding = gains[strongest_baseline][1]
    distilled, no_teacher = (_mean([item.accuracy for item in methods[method]]) for method in (DISTILLED, "no_teacher"))
    gap = teacher.accuracy - no_teacher
    return {
        "outcome": NO_EFFECT if deciding is None else HELPS if deciding.low > 0 else HURTS if deciding.high < 0 else NO_EFFECT,
        "seeds": len(methods[DISTILLED]),
        "baseline": strongest_baseline,
        "methods": [_method_row(method, by_seed, labels if calibrated else None) for method, by_seed in methods.items()],
        "gains": [
            {"baseline": method, "pp": 100 * value, "interval_pp": scores.interval_row(interval, 100)}
            for method, (value, interval) in gains.items()
        ],
        "gap_closed": (distilled - no_teacher) / gap if gap > 0 else None,
        "flags": [*_teacher_flags(teacher, distilled, no_teacher, groups), *_shared_error_flags(methods, teacher, labels, groups)],
    }


def calibration_error(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Return the expected calibration error: the mean gap between confidence and accuracy over bins of equal width.

    Shapes: outputs (n, C) logits, labels (n,).
    Source: Guo et al., arXiv 1706.04599, equation 3.
    """
    import numpy as np
    from scipy.special import softmax

    confidence, is_correct = softmax(outputs.astype(np.float64), axis=1).max(1), outputs.argmax(1) == labels
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=confidence - is_correct, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(labels))


def negative_log_likelihood(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean of ``-log softmax(outputs)[label]``. Shapes: outputs (n, C), labels (n,)."""
    import numpy as np
    from scipy.special import log_softmax

    return float(-log_softmax(outputs.astype(np.float64), axis=1)[np.arange(len(labels)), labels].mean())


def _method_row(method: str, by_seed: Sequence[ModelScores], labels: np.ndarray | None) -> dict[str, Any]:
    """Return a method's accuracy of each seed, and its calibration if there are labels."""
    return {
        "method": method,
        "accuracies": [item.accuracy for item in by_seed],
        "ece": None if labels is None else _mean([calibration_error(item.outputs, labels) for item in by_seed]),
        "nll": None if labels is None else _mean([negative_log_likelihood(item.outputs, labels) for item in by_seed]),
    }


def _gain(distilled: Sequence[ModelScores], baseline: Sequence[ModelScores], groups: np.ndarray) -> tuple[float, Interval | None]:
    """Return the mean difference of two methods, paired by seed and by sample, and its interval over both."""
    import numpy as np

    pairs = list(zip(distilled, baseline, strict=True))
    if all(item.scores is not None for item in (*distilled, *baseline)):
        return seeds.difference_over_seeds(np.stack([first.scores - second.scores for first, second in pairs]), groups)  # type: ignore[operator]  # none is None
    by_seed = np.array([first.accuracy - second.accuracy for first, second in pairs])
    without_part = ([item.jackknife for item in method if item.jackknife is not None] for method in (distilled, baseline))
    return float(by_seed.mean()), seeds.metric_difference_over_seeds(by_seed, jackknife.mean_difference(*without_part), groups)


def _teacher_flags(teacher: ModelScores, distilled: float, no_teacher: float, groups: np.ndarray) -> list[str]:
    if teacher.accuracy <= no_teacher:
        accuracies = f"{100 * teacher.accuracy:.2f} % and {100 * no_teacher:.2f} %"
        return [f"the teacher is no better than a student that is trained on labels only ({accuracies}): a better teacher is needed"]
    interval = scores.accuracy_interval(teacher, groups)
    if interval is not None and distilled >= interval.low:
        accuracies = f"{100 * distilled:.2f} % of {100 * teacher.accuracy:.2f} %"
        return [f"the student has reached its teacher ({accuracies}): a better student needs a better teacher"]
    return []


def _shared_error_flags(
    methods: Mapping[str, Sequence[ModelScores]], teacher: ModelScores, labels: np.ndarray, groups: np.ndarray
) -> list[str]:
    """Return a flag for each class in which teacher and distilled students are less accurate than those without a teacher."""
    import numpy as np

    if labels.ndim != 1 or any(item.scores is None for item in (teacher, *methods[DISTILLED], *methods["no_teacher"])):
        return []
    distilled, no_teacher = (np.stack([np.asarray(item.scores) for item in methods[method]]) for method in (DISTILLED, "no_teacher"))
    flags = []
    classes = np.unique(labels)
    for label in classes:
        rows = labels == label
        teacher_accuracy, accuracy = float(teacher.scores[rows].mean()), float(no_teacher[:, rows].mean())  # type: ignore[index]  # the same
        if teacher_accuracy >= accuracy:
            continue
        differences = (distilled - no_teacher)[:, rows]
        change, interval = seeds.difference_over_seeds(differences, groups[rows], 1 - (1 - intervals.LEVEL) / len(classes))
        if interval is not None and interval.high < 0:
            flags.append(
                f"the student shares its teacher's errors in class {label}: accuracy of the teacher {100 * teacher_accuracy:.1f} %, "
                f"of the student without a teacher {100 * accuracy:.1f} %, of the distilled student {100 * (accuracy + change):.1f} %"
            )
    return flags


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
