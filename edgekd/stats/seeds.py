# SPDX-License-Identifier: Apache-2.0
"""Intervals over random seeds and random samples at once: two methods, trained with several seeds each, scored on the same samples."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgekd.domain.verdict import Interval
from edgekd.stats import jackknife, paired
from edgekd.stats.intervals import LEVEL

if TYPE_CHECKING:
    import numpy as np

    from edgekd.stats.jackknife import Jackknife


def difference_over_seeds(differences: np.ndarray, groups: np.ndarray, level: float = LEVEL) -> tuple[float, Interval | None]:
    """Return the mean of differences that are paired by seed and by sample, and its interval for new seeds and new samples.

    None for one group. If few samples differ (:data:`paired.FEW`), the interval is wider by the share of samples that may have been missed.

    Shapes: differences (S, n), groups (n,).
    Source: as :func:`interval_over_seeds`; samples that share a group count as :func:`paired.cluster_variance` counts them.
    """
    import numpy as np

    seeds = len(differences)
    by_seed, by_sample = differences.mean(1), differences.mean(0)
    sizes = np.unique(groups, return_counts=True)[1]
    if len(sizes) == 1:
        return float(by_seed.mean()), None
    sample_variance, freedom = paired.cluster_variance(by_sample, groups)
    interaction_variance = sum(paired.cluster_variance(row, groups)[0] for row in differences - by_sample) / (seeds - 1) / seeds
    interval = interval_over_seeds(by_seed, sample_variance, interaction_variance, freedom, level)
    if np.count_nonzero(np.abs(differences).max(0) > paired.SAME) <= paired.FEW or interval.low == interval.high:
        interval = _widen(interval, paired.missed_share(paired.effective_samples(sizes, level), level))
    return float(by_seed.mean()), interval


def metric_difference_over_seeds(by_seed: np.ndarray, difference: Jackknife, groups: np.ndarray, level: float = LEVEL) -> Interval | None:
    """Return the interval of the mean difference of a metric of the whole set; None where :func:`jackknife.metric_interval` is.

    Shapes: by_seed (S,), groups (n,); ``difference`` is the mean over the seeds.
    """
    if not jackknife.is_defined(difference):
        return None
    sample_variance, freedom = jackknife.variance(difference, groups)
    interval = interval_over_seeds(by_seed, sample_variance, 0.0, freedom, level)
    return _widen(interval, jackknife.missed_share(difference, groups, level)) if sample_variance == 0 else interval


def interval_over_seeds(
    by_seed: np.ndarray, sample_variance: float, interaction_variance: float, freedom: float, level: float = LEVEL
) -> Interval:
    """Return the interval of a mean over random seeds and random samples that are crossed: every seed is scored on every sample.

    The variance is that between seeds plus that between samples, minus their interaction, which both contain. The degrees of
    freedom follow Satterthwaite, so few seeds or few groups widen the interval. That alone is too short where the seeds differ more than
    the samples (3.9 % of errors at each end for three seeds, 6.3 % for two), so it is never shorter than the interval over the seeds.

    Args:
        by_seed: Shape (S,), S > 1: the mean of each seed.
        sample_variance: Of the overall mean, over samples.
        interaction_variance: The part of ``sample_variance`` that the variance between seeds contains too.
        freedom: The degrees of freedom of ``sample_variance``.
        level: Of the interval.

    Source: two-way random effects (Searle, Casella, McCulloch 1992, chapter 4); Satterthwaite 1946, Biometrics Bulletin 2.
    """
    import numpy as np
    from scipy.stats import t

    seed_variance = float(np.var(by_seed, ddof=1)) / len(by_seed)
    variance = max(seed_variance + sample_variance - interaction_variance, seed_variance, sample_variance)
    value = float(by_seed.mean())
    if variance == 0:
        return Interval(value, value, level)
    spread = seed_variance**2 / (len(by_seed) - 1) + sample_variance**2 / freedom
    both, of_seeds = t.ppf((1 + level) / 2, [(seed_variance + sample_variance) ** 2 / spread, len(by_seed) - 1])
    half_width = max(float(both) * math.sqrt(variance), float(of_seeds) * math.sqrt(seed_variance))
    return Interval(value - half_width, value + half_width, level)


def _widen(interval: Interval, margin: float) -> Interval:
    return Interval(interval.low - margin, interval.high + margin, interval.level)
