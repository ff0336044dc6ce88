# SPDX-License-Identifier: Apache-2.0
"""Paired comparisons of scores: accuracy, drop against the teacher, agreement, shared errors, and the cost of each stage."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekd.domain.verdict import Difference, Interval
from edgekd.stats import intervals, jackknife, paired
from edgekd.stats.jackknife import Jackknife

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from edgekd.domain.artifact import Artifact


@dataclass(frozen=True, slots=True)
class ModelScores:
    """The evaluation of one model: ``scores`` (n,) of each sample, or a metric of the whole set without each part of it."""

    accuracy: float
    outputs: np.ndarray
    scores: np.ndarray | None
    jackknife: Jackknife | None
    instruction_set: str


def read_scores(artifacts: Mapping[str, Artifact]) -> ModelScores:
    """Read the files of an ``evaluate`` step."""
    import numpy as np

    summary = json.loads(artifacts["summary.json"].path.read_text())

    def array(name: str) -> np.ndarray | None:
        return np.load(artifacts[name].path, allow_pickle=False) if name in artifacts else None

    outputs = np.load(artifacts["outputs.npy"].path, allow_pickle=False)
    without_part = array("jackknife.npy")
    parts = None if without_part is None else Jackknife(without_part, summary["support"])
    return ModelScores(summary["accuracy"], outputs, array("scores.npy"), parts, summary["instruction_set"])


def accuracy_interval(scored: ModelScores, groups: np.ndarray) -> Interval | None:
    """Return the interval of an accuracy; None if one group, or a metric that is undefined without some part, says nothing."""
    import numpy as np

    if scored.scores is None:
        return jackknife.metric_interval(scored.accuracy, _jackknife(scored), groups)
    scores, is_binary = scored.scores, bool(np.isin(scored.scores, (0, 1)).all())
    if is_binary and len(np.unique(groups)) == len(groups):
        return intervals.proportion_interval(int(scores.sum()), len(scores))
    if is_binary and scores.mean() > 0.5:  # noqa: PLR2004  (errors are rarer, and rare events are what an interval is made for)
        interval = paired.difference_interval(1 - scores, groups)
        return None if interval is None else Interval(1 - interval.high, min(1 - interval.low, 1.0), interval.level)
    interval = paired.difference_interval(scores, groups)
    return None if interval is None else Interval(max(interval.low, 0.0), interval.high, interval.level)


def difference(first: ModelScores, second: ModelScores, groups: np.ndarray) -> Difference:
    """Return first minus second, on the same samples."""
    import numpy as np

    value = first.accuracy - second.accuracy
    if first.scores is None or second.scores is None:
        without_part = [_jackknife(item) for item in (first, second)]
        both = Jackknife(without_part[0].values - without_part[1].values, without_part[0].support)
        return Difference(value, jackknife.metric_interval(value, both, groups), None)
    differences = first.scores - second.scores
    are_binary = bool(np.isin((first.scores, second.scores), (0, 1)).all())
    p = paired.difference_p(differences, groups) if are_binary else None
    return Difference(value, paired.difference_interval(differences, groups), p)


def class_drops(teacher: ModelScores, scored: ModelScores, labels: np.ndarray, groups: np.ndarray) -> dict[str, dict[str, Any]]:
    """Return the number of samples, both accuracies and the drop with its interval (fractions) of each class."""
    import numpy as np

    if teacher.scores is None or scored.scores is None or not _are_classes(labels):
        return {}
    drops = {}
    for label in np.unique(labels):
        rows = labels == label
        teacher_scores, model_scores = teacher.scores[rows], scored.scores[rows]
        interval = paired.difference_interval(teacher_scores - model_scores, groups[rows])
        drops[str(label)] = {
            "samples": int(rows.sum()),
            "teacher": float(teacher_scores.mean()),
            "accuracy": float(model_scores.mean()),
            "drop": float(teacher_scores.mean() - model_scores.mean()),
            "interval": interval_row(interval),
        }
    return drops


def agreement(teacher: ModelScores, scored: ModelScores, task: str = "multiclass", heads: Sequence[int] = ()) -> float | None:
    """Return the share of samples for which both models predict the same (all heads or labels); None for a regression.

    ``task`` and ``heads`` are the student's, from the recipe.
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
    """Return how many errors the teacher makes, the share that the student makes too, and the share with the same wrong class."""
    if not _are_classes(labels):
        return {"teacher_errors": 0, "also_wrong": None, "same_prediction": None}
    teacher_predictions, predictions = teacher.outputs.argmax(1), scored.outputs.argmax(1)
    teacher_wrong = teacher_predictions != labels
    count = int(teacher_wrong.sum())
    if count == 0:
        return {"teacher_errors": 0, "also_wrong": None, "same_prediction": None}
    also_wrong = (predictions != labels)[teacher_wrong].mean()
    same_prediction = (predictions == teacher_predictions)[teacher_wrong].mean()
    return {"teacher_errors": count, "also_wrong": float(also_wrong), "same_prediction": float(same_prediction)}


def difference_row(item: Difference) -> dict[str, Any]:
    """Return a difference in percentage points, for a report."""
    return {"pp": 100 * item.value, "interval_pp": interval_row(item.interval, 100), "p": item.p}


def interval_row(interval: Interval | None, factor: float = 1) -> list[float] | None:
    """Return an interval as a pair; None if there is none."""
    return None if interval is None else [factor * interval.low, factor * interval.high]


def _jackknife(scored: ModelScores) -> Jackknife:
    if scored.jackknife is None:
        raise ValueError("the model has no metric without each part")
    return scored.jackknife
