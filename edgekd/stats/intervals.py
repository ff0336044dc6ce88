# SPDX-License-Identifier: Apache-2.0
"""Statistics of verdicts: pure functions of numbers, each with its source."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgekd.domain.verdict import Interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

LEVEL = 0.95
RESAMPLES = 2000
DISCORDANT_SHARE = 0.05  # of samples on which a student and its teacher are not both right or both wrong, before it is known


def proportion(successes: int, n: int, level: float = LEVEL) -> Interval:
    """Return the Wilson score interval of a proportion.

    Source: Wilson 1927; recommended by Brown, Cai, DasGupta 2001, Statistical Science 16(2).
    """
    from scipy.stats import binomtest

    found = binomtest(successes, n).proportion_ci(level, method="wilson")
    return Interval(float(found.low), float(found.high), level)


def paired_difference(first: np.ndarray, second: np.ndarray, groups: np.ndarray, seed: int = 0, level: float = LEVEL) -> Interval:
    """Return the interval of mean(first) - mean(second) over samples that were scored twice.

    Scores that are 0 or 1, each sample a group of its own: Newcombe's interval for paired proportions (score method), which
    stays wide when no pair is discordant. Else: bootstrap over groups (speakers, sources), percentiles.

    Shapes: all (n,).
    Source: Newcombe 1998, Statistics in Medicine 17, method 10; Efron, Tibshirani 1993.
    """
    import numpy as np

    binary = bool(np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all())
    if binary and len(np.unique(groups)) == len(groups):
        both, only_first = int((first * second).sum()), int((first * (1 - second)).sum())
        only_second = int(((1 - first) * second).sum())
        return _newcombe(both, only_first, only_second, len(first) - both - only_first - only_second, level)
    index = bootstrap_groups(groups, RESAMPLES, seed)
    sums = np.bincount(np.unique(groups, return_inverse=True)[1], weights=first - second)
    counts = np.bincount(np.unique(groups, return_inverse=True)[1])
    means = sums[index].sum(1) / counts[index].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    if low == high:  # no group differs: the rule of three says how much could have been missed
        missed = -math.log((1 - level) / 2) / len(sums)
        return Interval(float(low) - missed, float(high) + missed, level)
    return Interval(float(low), float(high), level)


def _newcombe(a: int, b: int, c: int, d: int, level: float) -> Interval:
    n = a + b + c + d
    p1, p2 = (a + b) / n, (a + c) / n
    w1, w2 = proportion(a + b, n, level), proportion(a + c, n, level)
    product = (a + b) * (c + d) * (a + c) * (b + d)
    phi = 0.0
    if product > 0:
        cross = a * d - b * c
        phi = (max(cross - n / 2, 0.0) if cross > 0 else cross) / math.sqrt(product)
    l1, u1, l2, u2 = p1 - w1.low, w1.high - p1, p2 - w2.low, w2.high - p2
    low = math.sqrt(max(l1**2 - 2 * phi * l1 * u2 + u2**2, 0.0))
    high = math.sqrt(max(u1**2 - 2 * phi * u1 * l2 + l2**2, 0.0))
    return Interval(p1 - p2 - low, p1 - p2 + high, level)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p value of McNemar's test.

    Source: McNemar 1947; exact binomial form.
    """
    from scipy.stats import binomtest

    discordant = only_first + only_second
    return 1.0 if discordant == 0 else float(binomtest(only_first, discordant).pvalue)


def bootstrap_groups(groups: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Return which groups each resample draws, by position among the sorted group ids; the same for all models of a set.

    Shapes: groups (n,); result (resamples, number of groups).
    """
    import numpy as np

    count = len(np.unique(groups))
    return np.random.default_rng(seed).integers(0, count, (resamples, count))


def difference_of_resampled(first: np.ndarray, second: np.ndarray, level: float = LEVEL) -> Interval:
    """Return the percentile interval of a difference of metrics that were computed on the same resamples.

    Source: Efron, Tibshirani 1993, chapter 13.
    """
    import numpy as np

    low, high = np.quantile(first - second, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level)


def difference_over_seeds(differences: np.ndarray, groups: np.ndarray, level: float = LEVEL) -> tuple[float, Interval]:
    """Return the mean of differences that were paired by seed and by sample, and its interval for new seeds and new samples.

    Shapes: differences (S, n), groups (n,).
    Source: as :func:`interval_over_seeds`; samples that share a group are summed first (Liang, Zeger 1986).
    """
    import numpy as np

    seeds, count = differences.shape
    by_seed = differences.mean(1)
    value = by_seed.mean()
    index = np.unique(groups, return_inverse=True)[1]
    sums = np.stack([np.bincount(index, weights=row) for row in differences - by_seed[:, None]])
    units = sums.shape[1]
    correction = units / max(units - 1, 1) / count**2
    sample_variance = float((sums.mean(0) ** 2).sum() * correction)
    both_variance = float(((sums - sums.mean(0)) ** 2).sum() * correction / (seeds - 1) / seeds)
    return float(value), interval_over_seeds(by_seed, sample_variance, both_variance, units, level)


def interval_over_seeds(by_seed: np.ndarray, sample_variance: float, both_variance: float, units: int, level: float = LEVEL) -> Interval:
    """Return the interval of a mean over seeds and samples, both drawn at random and crossed: each seed saw each sample.

    The variance is that between seeds plus that between samples, less what both hold of their interaction; degrees of
    freedom after Satterthwaite, so that few seeds widen it as they must.

    Args:
        by_seed: Shape (S,), S > 1: the mean of each seed.
        sample_variance: Of the overall mean, over samples.
        both_variance: The interaction's share of that, which the seeds' variance holds too.
        units: How many independent samples there are.
        level: Of the interval.

    Source: two-way random effects (Searle, Casella, McCulloch 1992, chapter 4); Satterthwaite 1946, Biometrics Bulletin 2.
    """
    import numpy as np
    from scipy.stats import t

    seed_variance = float(np.var(by_seed, ddof=1)) / len(by_seed)
    variance = max(seed_variance + sample_variance - both_variance, seed_variance, sample_variance)
    value = float(by_seed.mean())
    if variance == 0:  # no sample was answered differently under any seed: the rule of three says what could have been missed
        missed = -math.log((1 - level) / 2) / units
        return Interval(value - missed, value + missed, level)
    spread = seed_variance**2 / (len(by_seed) - 1) + sample_variance**2 / max(units - 1, 1)
    freedom = (seed_variance + sample_variance) ** 2 / spread
    half = float(t.ppf((1 + level) / 2, freedom)) * math.sqrt(variance)
    return Interval(value - half, value + half, level)


def runs_needed(quantile: float, level: float = LEVEL) -> int:
    """Return how many runs a quantile needs so that a sample above it is there with the level's probability.

    >>> runs_needed(0.95), runs_needed(0.99)
    (59, 299)

    Source: MLPerf inference rules, early stopping with no overruns.
    """
    return math.ceil(math.log(1 - level) / math.log(quantile))


def quantile_interval(samples: Sequence[int], quantile: float, level: float = LEVEL) -> tuple[float, Interval | None]:
    """Return a quantile and its distribution-free interval from order statistics; None where n cannot carry it.

    Source: David, Nagaraja 2003, Order Statistics, section 7.1.
    """
    from scipy.stats import binom

    ordered = sorted(samples)
    n = len(ordered)
    value = float(ordered[min(n - 1, math.ceil(quantile * n) - 1)])
    if n < runs_needed(max(quantile, 1 - quantile), level):
        return value, None
    tail = (1 - level) / 2
    low = int(binom.ppf(tail, n, quantile))
    high = int(binom.isf(tail, n, quantile)) + 1
    # with fewer runs than the upper end asks for, the largest stands for it: one-sided, its level is 1 - quantile^n
    return value, Interval(float(ordered[max(low - 1, 0)]), float(ordered[min(high - 1, n - 1)]), level)


def ratio_of_medians(
    first: Sequence[Sequence[int]], second: Sequence[Sequence[int]], seed: int = 0, level: float = LEVEL
) -> tuple[float, Interval]:
    """Return median(first) / median(second) and its interval; blocks were taken in turns, and the pair of blocks is the unit.

    Source: bootstrap of paired blocks (Efron, Tibshirani 1993, section 8.6), on each block's median.
    """
    import numpy as np

    rounds = min(len(first), len(second))
    one = np.array([np.median(block) for block in first[:rounds]])
    two = np.array([np.median(block) for block in second[:rounds]])
    index = np.random.default_rng(seed).integers(0, rounds, (RESAMPLES, rounds))
    ratios = np.median(one[index], axis=1) / np.median(two[index], axis=1)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(np.median(one) / np.median(two)), Interval(float(low), float(high), level)


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
