# SPDX-License-Identifier: Apache-2.0
"""Checks of the user's score function and metric, on outputs of all kinds that a network may have."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from edgekd import usercode
from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError
from edgekd.usercode import metrics

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from edgekd.stages.inspect.params import CheckContext

PARTS = 100  # the metric of the whole set is computed without each of so many parts, for its interval
_FEW_PARTS = 20  # if it is slow
_MAX_SECONDS = 60.0  # of a metric for one model
_SAMPLES = 64  # that a metric is checked on, beside all labels
_CONSTANTS = 16  # classes that a metric is checked on alone
_SURE = 10.0  # a logit
_SAME = 1e-6  # values that differ by less are the same


def check_metric(check: CheckContext, outputs: np.ndarray, labels: np.ndarray, all_labels: np.ndarray) -> tuple[int, list[str]]:
    """Run the user's score function or metric on outputs of the student, random ones, constant ones and perfect ones.

    Args:
        check: The recipe and its folder.
        outputs: Shape (n, C): of the student, not trained.
        labels: Shape (n,) or (n, ...), of the same samples.
        all_labels: Of the whole evaluation split.

    Returns:
        How many parts of the evaluation set the interval of a metric is computed from, and notes.

    Raises:
        RecipeError: if it returns something else than scores, differs between two calls, or is lower for better predictions.
    """
    import numpy as np

    name = check.params.score or check.params.metric or ""
    entry = EntryPoint.parse(name)
    function = usercode.load_function(check.recipe_dir, entry)
    call: Callable[..., np.ndarray] = _call_score if check.params.score is not None else _call_metric
    first, again = (call(function, entry, outputs, labels) for _ in range(2))
    if not np.allclose(first, again, rtol=0, atol=_SAME):
        values = f"{first.mean():.6g} and {again.mean():.6g}"
        raise RecipeError(f"{entry}: returned {values} for the same outputs; expected the same (a generator with a fixed seed)")
    generator, width = np.random.default_rng(0), outputs.shape[1]
    try:
        for constant in (outputs[0], *_SURE * np.eye(width, dtype=np.float32)[:_CONSTANTS]):  # as of a student that learned nothing
            call(function, entry, np.tile(constant, (len(labels), 1)), labels)
        started = time.monotonic()
        call(function, entry, generator.standard_normal((len(all_labels), width), dtype=np.float32), all_labels)
        seconds = time.monotonic() - started
    except RecipeError as error:
        raise RecipeError(f"{error} (with outputs that are the same for all samples, or random ones for the whole split)") from None
    notes = _check_direction(check, labels, width, lambda outputs: float(call(function, entry, outputs, labels).mean()))
    if check.params.metric is None or seconds * (PARTS + 1) <= _MAX_SECONDS:
        return PARTS, notes
    total = f"about {seconds * (_FEW_PARTS + 1) / 60:.0f} minutes for each model"
    return _FEW_PARTS, [*notes, f"{entry} takes {seconds:.1f} s: its interval is computed from {_FEW_PARTS} parts of the set, {total}"]


def metric_rows(labels: np.ndarray) -> list[int]:
    """Return the samples that a metric is checked on: some of each class, as many metrics fail without; otherwise the first ones."""
    import numpy as np

    if labels.dtype != np.int64 or labels.ndim != 1:
        return list(range(min(_SAMPLES, len(labels))))
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(labels[order]) > 0])
    rows_by_class = np.split(order, starts[1:])
    per_class = max(1, _SAMPLES // len(rows_by_class))
    return sorted(int(row) for rows in rows_by_class for row in rows[:per_class])


def _check_direction(check: CheckContext, labels: np.ndarray, width: int, value_of: Callable[[np.ndarray], float]) -> list[str]:
    """Return a note if predictions do not matter; refuse what is lower for perfect predictions than for random ones."""
    import numpy as np

    name = check.params.score or check.params.metric
    is_class_id = labels.dtype == np.int64 and labels.ndim == 1 and check.params.task == "multiclass" and not check.params.heads
    if not is_class_id or width == 1 or labels.min() < 0 or labels.max() >= width:
        return []
    sure = _SURE * np.eye(width, dtype=np.float32)
    perfect, wrong = value_of(sure[labels]), value_of(sure[(labels + 1) % width])
    if perfect < wrong - _SAME:
        values = f"{perfect:.4g} for perfect predictions and {wrong:.4g} for wrong ones"
        raise RecipeError(f"{name}: returned {values}; expected more for better predictions (1 - error, not the error)")
    return [f"warning: {name} returned {perfect:.4g} for perfect and for wrong predictions alike"] if perfect <= wrong + _SAME else []


def _call_score(function: Callable[..., object], entry: EntryPoint, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return metrics.score_samples(function, entry, outputs, labels)


def _call_metric(function: Callable[..., object], entry: EntryPoint, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.array([metrics.score_set(function, entry, outputs, labels)])
