# SPDX-License-Identifier: Apache-2.0
"""Intervals of metrics of the whole evaluation set, from their values without one part of it at a time (delete-a-group jackknife)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekd.domain.verdict import Interval
from edgekd.stats import paired
from edgekd.stats.intervals import LEVEL

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

SEED = 0
_CORRELATION = 0.03  # of samples of a part, for degrees of freedom; chosen by simulation, with a variance that is a little too large


@dataclass(frozen=True, slots=True)
class Jackknife:
    """A metric without each part: ``values`` (K,), nan where it is undefined. ``support``: parts with a sample of the rarer of two classes.

    ``support`` is K unless the labels are two classes. Such metrics (AUC, F1) vary as much as the rarer class does.
    """

    values: np.ndarray
    support: int


def assign_parts(groups: np.ndarray, limit: int) -> np.ndarray:
    """Return the part of each sample, 0 to K - 1: a group each, or at random as many groups each if there are more than ``limit``.

    Shapes: groups (n,), result (n,). It is the same for all models of an evaluation set.
    Source: Kott 2001, Journal of Official Statistics 17.
    """
    import numpy as np

    index = np.unique(groups, return_inverse=True)[1]
    count = int(index.max()) + 1
    if count <= limit:
        return index
    parts: np.ndarray = (np.random.default_rng(SEED).permutation(count) % limit)[index]
    return parts


def support(labels: np.ndarray, parts: np.ndarray) -> int:
    """Return in how many parts the rarer of two classes is; the number of parts if the labels are not two classes.

    Shapes: labels (n,) or (n, ...), parts (n,).
    """
    import numpy as np

    classes = np.unique(labels) if labels.ndim == 1 and labels.dtype.kind in "iub" else ()
    if len(classes) != 2:  # noqa: PLR2004  (two classes)
        return int(parts.max()) + 1
    return min(len(np.unique(parts[labels == label])) for label in classes)


def mean_difference(first: Sequence[Jackknife], second: Sequence[Jackknife]) -> Jackknife:
    """Return the mean difference of metrics that were computed without the same parts, over pairs (seeds)."""
    import numpy as np

    values = [one.values - other.values for one, other in zip(first, second, strict=True)]
    return Jackknife(np.mean(values, axis=0), first[0].support)


def metric_interval(value: float, jackknife: Jackknife, groups: np.ndarray, level: float = LEVEL) -> Interval | None:
    """Return the interval of a metric, or of the difference of two metrics; None if there is no telling (:func:`is_defined`).

    If the metric is the same without any part, its width is that of a proportion of no events (:func:`missed_share`).

    Shapes: groups (n,), those that the parts were assigned from.
    Source: Student's t with the variance and the degrees of freedom of :func:`variance`.
    """
    from scipy.stats import t

    if not is_defined(jackknife):
        return None
    squared_error, freedom = variance(jackknife, groups)
    half_width = float(t.ppf((1 + level) / 2, freedom)) * math.sqrt(squared_error)
    if squared_error == 0:
        half_width = missed_share(jackknife, groups, level)
    return Interval(value - half_width, value + half_width, level) if math.isfinite(half_width) else None


def is_defined(jackknife: Jackknife) -> bool:
    """Return whether there is more than one part, each class is in more than one, and the metric is defined without each."""
    import numpy as np

    return len(jackknife.values) > 1 and jackknife.support > 1 and bool(np.isfinite(jackknife.values).all())


def variance(jackknife: Jackknife, groups: np.ndarray) -> tuple[float, float]:
    """Return the variance of a metric and its degrees of freedom: those of a mean over parts of these sizes, less than the support.

    The variance is 0 if the metric is the same without any part, up to rounding.
    Source: Shao, Tu 1995, The Jackknife and Bootstrap, section 2.3 (for a mean it is CR3); Bell, McCaffrey 2002.
    """
    import numpy as np

    count = len(jackknife.values)
    deviations = jackknife.values - jackknife.values.mean()
    sizes = np.bincount(assign_parts(groups, count))
    freedom = min(paired.degrees_of_freedom(sizes, _CORRELATION), jackknife.support - 1)
    if np.abs(deviations).max() * (count - 1) <= paired.SAME:
        return 0.0, freedom
    with np.errstate(over="ignore"):
        return float((deviations**2).sum()) * (count - 1) / count, freedom


def missed_share(jackknife: Jackknife, groups: np.ndarray, level: float = LEVEL) -> float:
    """Return the largest share of samples in which there may be a difference although none was seen."""
    import numpy as np

    samples = paired.effective_samples(np.unique(groups, return_counts=True)[1], level)
    return paired.missed_share(samples * jackknife.support / len(jackknife.values), level)
