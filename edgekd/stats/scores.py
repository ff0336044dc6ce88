# SPDX-License-Identifier: Apache-2.0
"""Scores compared: accuracy, drops against the teacher, agreement, inherited errors, and each stage's charge; all paired."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekd.domain.verdict import Interval
from edgekd.stats import intervals

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from edgekd.domain.artifact import Artifact


@dataclass(frozen=True, slots=True)
class ModelScores:
    """What ``evaluate`` kept of one model: ``scores`` (n,) for each sample, or ``resampled`` (B,) of a whole-set metric."""

    accuracy: float
    outputs: np.ndarray
    scores: np.ndarray | None
    resampled: np.ndarray | None
    instruction_set: str


@dataclass(frozen=True, slots=True)
class Difference:
    """First less second: value and interval as fractions, exact p where scores are right or wrong."""

    value: float
    interval: Interval
    p: float | None


def read_scores(artifacts: Mapping[str, Artifact]) -> ModelScores:
    """Return what an evaluate step kept."""
    import numpy as np

    summary = json.loads(artifacts["summary.json"].path.read_text())

    def array(name: str) -> np.ndarray | None:
        return np.load(artifacts[name].path, allow_pickle=False) if name in artifacts else None

    outputs = np.load(artifacts["outputs.npy"].path, allow_pickle=False)
    return ModelScores(summary["accuracy"], outputs, array("scores.npy"), array("resampled.npy"), summary["instruction_set"])


def accuracy_interval(scored: ModelScores, groups: np.ndarray) -> Interval:
    """Return the interval of an accuracy."""
    import numpy as np

    if scored.scores is None:
        found = intervals.difference_of_resampled(_resampled(scored), np.zeros_like(_resampled(scored)))
        return Interval(found.low, found.high)
    if np.isin(scored.scores, (0, 1)).all() and len(np.unique(groups)) == len(groups):
        return intervals.proportion(int(scored.scores.sum()), len(scored.scores))
    return intervals.paired_difference(scored.scores, np.zeros_like(scored.scores), groups)


def difference(first: ModelScores, second: ModelScores, groups: np.ndarray) -> Difference:
    """Return first less second, on the same samples."""
    import numpy as np

    value = first.accuracy - second.accuracy
    if first.scores is None or second.scores is None:
        return Difference(value, intervals.difference_of_resampled(_resampled(first), _resampled(second)), None)
    p = None
    if np.isin(first.scores, (0, 1)).all() and np.isin(second.scores, (0, 1)).all():
        p = intervals.mcnemar_p(
            int(((first.scores == 1) & (second.scores == 0)).sum()), int(((first.scores == 0) & (second.scores == 1)).sum())
        )
    return Difference(value, intervals.paired_difference(first.scores, second.scores, groups), p)


def class_drops(teacher: ModelScores, scored: ModelScores, labels: np.ndarray, groups: np.ndarray) -> dict[str, dict[str, Any]]:
    """Return for each class the samples, both accuracies and the drop with its interval (fractions)."""
    import numpy as np

    if teacher.scores is None or scored.scores is None or not _are_classes(labels):
        return {}
    found = {}
    for label in np.unique(labels):
        rows = labels == label
        first, second = teacher.scores[rows], scored.scores[rows]
        interval = intervals.paired_difference(first, second, groups[rows])
        found[str(label)] = {
            "samples": int(rows.sum()),
            "teacher": float(first.mean()),
            "accuracy": float(second.mean()),
            "drop": float(first.mean() - second.mean()),
            "interval": [interval.low, interval.high],
        }
    return found


def agreement(teacher: ModelScores, scored: ModelScores, task: str = "multiclass", heads: Sequence[int] = ()) -> float | None:
    """Return the share of samples on which both give the same answer, all of it where there are several; None for numbers.

    ``answers`` and ``heads`` are the student's, as the recipe says.
    """
    import numpy as np

    if task == "regression":
        return None
    if task == "multilabel":
        same = ((teacher.outputs > 0) == (scored.outputs > 0)).all(1)
    else:
        cuts = np.cumsum(heads)[:-1]
        pairs = zip(np.split(teacher.outputs, cuts, axis=1), np.split(scored.outputs, cuts, axis=1), strict=True)
        same = np.logical_and.reduce([first.argmax(1) == second.argmax(1) for first, second in pairs])
    return float(same.mean())


def _are_classes(labels: np.ndarray) -> bool:
    return labels.ndim == 1 and labels.dtype.kind in "iu"


def shared_errors(teacher: ModelScores, scored: ModelScores, labels: np.ndarray) -> dict[str, Any]:
    """Return how many errors the teacher makes, the share that the student makes too, and the share with the same wrong answer."""
    if not _are_classes(labels):
        return {"teacher_errors": 0, "also_wrong": None, "same_answer": None}
    wrong = teacher.outputs.argmax(1) != labels
    count = int(wrong.sum())
    if count == 0:
        return {"teacher_errors": 0, "also_wrong": None, "same_answer": None}
    answers = scored.outputs.argmax(1)
    also = wrong & (answers != labels)
    same = wrong & (answers == teacher.outputs.argmax(1))
    return {"teacher_errors": count, "also_wrong": float(also.sum() / count), "same_answer": float(same.sum() / count)}


def difference_row(found: Difference) -> dict[str, Any]:
    """Return a difference in points, for a report."""
    return {"pp": 100 * found.value, "interval_pp": [100 * found.interval.low, 100 * found.interval.high], "p": found.p}


def interval_row(interval: Interval) -> list[float]:
    """Return an interval as a pair."""
    return [interval.low, interval.high]


def _resampled(scored: ModelScores) -> np.ndarray:
    if scored.resampled is None:
        raise ValueError("the model was scored without resamples")
    return scored.resampled
