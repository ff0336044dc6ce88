# SPDX-License-Identifier: Apache-2.0
"""Intervals of independent observations: proportions, and quantiles and ratios of latencies; each with its source."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgekd.domain.verdict import Interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

LEVEL = 0.95
RESAMPLES = 2000


def proportion_interval(successes: int, n: int, level: float = LEVEL) -> Interval:
    """Return the Wilson score interval of a proportion.

    Source: Wilson 1927; recommended by Brown, Cai, DasGupta 2001, Statistical Science 16(2).
    """
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(level, method="wilson")
    return Interval(float(interval.low), float(interval.high), level)


def runs_needed(quantile: float, level: float = LEVEL) -> int:
    """Return how many runs are needed so that one of them exceeds the quantile with the probability of the level.

    >>> runs_needed(0.95), runs_needed(0.99)
    (59, 299)

    Source: MLPerf inference rules, early stopping with no overruns.
    """
    return math.ceil(math.log(1 - level) / math.log(quantile))


def quantile_interval(samples: Sequence[int], quantile: float, level: float = LEVEL) -> tuple[float, Interval | None]:
    """Return a quantile and its distribution-free interval from order statistics; None if there are too few samples.

    If there are too few for the two-sided upper end, it is the largest sample: one-sided, at level 1 - quantile^n.

    Source: David, Nagaraja 2003, Order Statistics, section 7.1.
    """
    import numpy as np
    from scipy.stats import quantile_test

    value = float(np.quantile(samples, quantile, method="inverted_cdf"))
    if len(samples) < runs_needed(max(quantile, 1 - quantile), level):
        return value, None
    low, high = quantile_test(samples, p=quantile).confidence_interval(level)  # nan where there is no such order statistic
    return value, Interval(float(np.fmax(low, min(samples))), float(np.fmin(high, max(samples))), level)


def ratio_of_medians(
    first: Sequence[Sequence[int]], second: Sequence[Sequence[int]], seed: int = 0, level: float = LEVEL
) -> tuple[float, Interval | None]:
    """Return median(first) / median(second) and its interval; the blocks are interleaved, and a pair of blocks is the unit.

    One pair has no interval.

    Source: percentile bootstrap of paired blocks (Efron, Tibshirani 1993, section 8.6), on the median of each block.
    """
    import numpy as np
    from scipy.stats import bootstrap

    rounds = min(len(first), len(second))
    medians = [np.array([np.median(block) for block in blocks[:rounds]]) for blocks in (first, second)]
    value = float(_ratio_of_medians(medians[0], medians[1]))
    if rounds == 1:
        return value, None
    interval = bootstrap(
        medians,
        _ratio_of_medians,
        paired=True,
        n_resamples=RESAMPLES,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return value, Interval(float(interval.low), float(interval.high), level)


def _ratio_of_medians(first: np.ndarray, second: np.ndarray, axis: int = -1) -> np.ndarray:
    import numpy as np

    ratio: np.ndarray = np.median(first, axis) / np.median(second, axis)
    return ratio


def median(samples: Sequence[int]) -> float:
    """Return the median.

    >>> median([3, 1, 2])
    2.0
    """
    import numpy as np

    return float(np.median(samples))
