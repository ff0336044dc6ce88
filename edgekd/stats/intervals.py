# SPDX-License-Identifier: Apache-2.0
"""Confidence intervals of verdicts: pure functions of numbers, each with its source."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgekd.domain.verdict import Interval

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

LEVEL = 0.95
RESAMPLES = 2000
DISCORDANT_SHARE = 0.05  # assumed share of samples on which only one of student and teacher is right


def proportion_interval(successes: int, n: int, level: float = LEVEL) -> Interval:
    """Return the Wilson score interval of a proportion.

    Source: Wilson 1927; recommended by Brown, Cai, DasGupta 2001, Statistical Science 16(2).
    """
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(level, method="wilson")
    return Interval(float(interval.low), float(interval.high), level)


def paired_difference_interval(first: np.ndarray, second: np.ndarray, groups: np.ndarray, seed: int = 0, level: float = LEVEL) -> Interval:
    """Return the interval of mean(first) - mean(second) over samples that both models were scored on.

    If all scores are 0 or 1 and each sample is its own group: Newcombe's interval for paired proportions (score method), which
    has a width even if no pair is discordant. Otherwise: percentile bootstrap over groups (speakers, sources).

    Shapes: all (n,).
    Source: Newcombe 1998, Statistics in Medicine 17, method 10; Efron, Tibshirani 1993.
    """
    import numpy as np

    is_binary = bool(np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all())
    if is_binary and len(np.unique(groups)) == len(groups):
        both, only_first = int((first * second).sum()), int((first * (1 - second)).sum())
        only_second = int(((1 - first) * second).sum())
        return _newcombe_interval(both, only_first, only_second, len(first) - both - only_first - only_second, level)
    index, counts = np.unique(groups, return_inverse=True, return_counts=True)[1:]
    sums = np.bincount(index, weights=first - second)
    interval = _bootstrap_interval(_ratio_of_sums, (sums, counts), seed, level)
    return _widened(interval.low, len(sums), level) if interval.low == interval.high else interval


def _ratio_of_sums(sums: np.ndarray, counts: np.ndarray, axis: int = -1) -> np.ndarray:
    means: np.ndarray = sums.sum(axis) / counts.sum(axis)
    return means


def _newcombe_interval(a: int, b: int, c: int, d: int, level: float) -> Interval:
    n = a + b + c + d
    p1, p2 = (a + b) / n, (a + c) / n
    w1, w2 = proportion_interval(a + b, n, level), proportion_interval(a + c, n, level)
    product = (a + b) * (c + d) * (a + c) * (b + d)
    phi = 0.0
    if product > 0:
        cross = a * d - b * c
        phi = (max(cross - n / 2, 0.0) if cross > 0 else cross) / math.sqrt(product)
    l1, u1, l2, u2 = p1 - w1.low, w1.high - p1, p2 - w2.low, w2.high - p2
    low = math.sqrt(max(l1**2 - 2 * phi * l1 * u2 + u2**2, 0.0))
    high = math.sqrt(max(u1**2 - 2 * phi * u1 * l2 + l2**2, 0.0))
    return Interval(p1 - p2 - low, p1 - p2 + high, level)


def _bootstrap_interval(statistic: Callable[..., np.ndarray], paired: tuple[np.ndarray, ...], seed: int, level: float) -> Interval:
    """Return the percentile interval of a statistic of paired observations; one of no width if there is only one pair.

    Source: Efron, Tibshirani 1993, section 8.6.
    """
    import numpy as np
    from scipy.stats import bootstrap

    if len(paired[0]) == 1:
        value = float(statistic(*paired))
        return Interval(value, value, level)
    interval = bootstrap(
        paired,
        statistic,
        paired=True,
        n_resamples=RESAMPLES,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(interval.low), float(interval.high), level)


def _widened(value: float, units: int, level: float) -> Interval:
    """Return the interval of a difference that no unit shows: the rule of three bounds the share that was missed."""
    margin = -math.log((1 - level) / 2) / units
    return Interval(value - margin, value + margin, level)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p value of McNemar's test.

    Source: McNemar 1947; exact binomial form.
    """
    from scipy.stats import binomtest

    discordant = only_first + only_second
    return 1.0 if discordant == 0 else float(binomtest(only_first, discordant).pvalue)


def bootstrap_groups(groups: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Return the groups of each resample, as positions among the sorted group ids; the same for all models of an evaluation set.

    Shapes: groups (n,); result (resamples, number of groups).
    """
    import numpy as np

    count = len(np.unique(groups))
    return np.random.default_rng(seed).integers(0, count, (resamples, count))


def resampled_difference_interval(first: np.ndarray, second: np.ndarray, level: float = LEVEL) -> Interval:
    """Return the percentile interval of the difference of two metrics that were computed on the same resamples.

    Source: Efron, Tibshirani 1993, chapter 13.
    """
    import numpy as np

    low, high = np.quantile(first - second, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level)


def difference_over_seeds(differences: np.ndarray, groups: np.ndarray, level: float = LEVEL) -> tuple[float, Interval]:
    """Return the mean of differences that are paired by seed and by sample, and its interval for new seeds and new samples.

    Shapes: differences (S, n), groups (n,).
    Source: as :func:`interval_over_seeds`; samples that share a group are summed first (Liang, Zeger 1986).
    """
    import numpy as np

    seeds, count = differences.shape
    by_seed = differences.mean(1)
    index = np.unique(groups, return_inverse=True)[1]
    sums = np.stack([np.bincount(index, weights=row) for row in differences - by_seed[:, None]])
    units = sums.shape[1]
    correction = units / max(units - 1, 1) / count**2
    sample_variance = float((sums.mean(0) ** 2).sum() * correction)
    interaction_variance = float(((sums - sums.mean(0)) ** 2).sum() * correction / (seeds - 1) / seeds)
    return float(by_seed.mean()), interval_over_seeds(by_seed, sample_variance, interaction_variance, units, level)


def interval_over_seeds(
    by_seed: np.ndarray, sample_variance: float, interaction_variance: float, units: int, level: float = LEVEL
) -> Interval:
    """Return the interval of a mean over random seeds and random samples that are crossed: every seed is scored on every sample.

    The variance is that between seeds plus that between samples, minus their interaction, which both contain. The degrees of
    freedom follow Satterthwaite, so few seeds widen the interval.

    Args:
        by_seed: Shape (S,), S > 1: the mean of each seed.
        sample_variance: Of the overall mean, over samples.
        interaction_variance: The part of ``sample_variance`` that the variance between seeds contains too.
        units: How many independent samples there are.
        level: Of the interval.

    Source: two-way random effects (Searle, Casella, McCulloch 1992, chapter 4); Satterthwaite 1946, Biometrics Bulletin 2.
    """
    import numpy as np
    from scipy.stats import t

    seed_variance = float(np.var(by_seed, ddof=1)) / len(by_seed)
    variance = max(seed_variance + sample_variance - interaction_variance, seed_variance, sample_variance)
    value = float(by_seed.mean())
    if variance == 0:
        return _widened(value, units, level)
    spread = seed_variance**2 / (len(by_seed) - 1) + sample_variance**2 / max(units - 1, 1)
    freedom = (seed_variance + sample_variance) ** 2 / spread
    half_width = float(t.ppf((1 + level) / 2, freedom)) * math.sqrt(variance)
    return Interval(value - half_width, value + half_width, level)


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
) -> tuple[float, Interval]:
    """Return median(first) / median(second) and its interval; the blocks are interleaved, and a pair of blocks is the unit.

    Source: bootstrap of paired blocks (Efron, Tibshirani 1993, section 8.6), on the median of each block.
    """
    import numpy as np

    rounds = min(len(first), len(second))
    first_medians, second_medians = (np.array([np.median(block) for block in blocks[:rounds]]) for blocks in (first, second))
    interval = _bootstrap_interval(_ratio_of_medians, (first_medians, second_medians), seed, level)
    return float(_ratio_of_medians(first_medians, second_medians)), interval


def _ratio_of_medians(first: np.ndarray, second: np.ndarray, axis: int = -1) -> np.ndarray:
    import numpy as np

    ratio: np.ndarray = np.median(first, axis) / np.median(second, axis)
    return ratio


def provable_drop(n: int) -> tuple[float, float]:
    """Return the smallest drop that n samples can rule out at 95 %: with no discordant pair, and with the usual share.

    Source: the score interval of zero events, and the normal interval of a paired difference around zero.
    """
    z = 1.959963984540054
    return z**2 / (n + z**2), z * math.sqrt(DISCORDANT_SHARE / n)


def median(samples: Sequence[int]) -> float:
    """Return the median.

    >>> median([3, 1, 2])
    2.0
    """
    import numpy as np

    return float(np.median(samples))
