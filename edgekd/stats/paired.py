# SPDX-License-Identifier: Apache-2.0
"""Intervals of mean differences that are paired by sample, where samples may share a group (a speaker, a patient, a session)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgekd.domain.verdict import Interval
from edgekd.stats.intervals import LEVEL

if TYPE_CHECKING:
    import numpy as np

FEW = 4  # so few samples that differ do not show how much groups vary
ASSUMED_CORRELATION = 0.1  # of two samples of a group (intraclass), where the samples cannot show it
SAME = 1e-5  # scores that differ by less do not differ
DISCORDANT_SHARE = 0.05  # assumed share of samples on which only one of student and teacher is right
MAX_GAIN = 3.0  # groups may vary less than independent samples by chance; they count as at most so many samples each


def difference_interval(differences: np.ndarray, groups: np.ndarray, level: float = LEVEL) -> Interval | None:
    """Return the interval of the mean of paired differences from -1 to 1; None if one group or one number says nothing about others.

    - Numbers: Student's t with the cluster-robust variance and degrees of freedom of :func:`cluster_variance`.
    - Right or wrong (-1, 0, 1): Tango's score interval, for as many samples as have that variance and that t quantile. Like the
      Korn-Graubard interval it is asymmetric where few samples differ. Without groups it is Tango's interval itself.
    - Where groups are skewed (a few lose much), the interval reaches further to that side (:func:`_skewness_shift`).
    - At most :data:`FEW` samples differ: the same, for no more samples than :func:`effective_samples`, so there always is a width.

    Shapes: both (n,).
    Source: Tango 1998, Statistics in Medicine 17; Korn, Graubard 1998, Survey Methodology 24; Dean, Pagano 2015, J. Surv. Stat.
    Methodol. 3. Chosen by simulation: docs/decisions/0015-intervals.md.
    """
    import numpy as np
    from scipy.stats import norm, t

    sizes = np.unique(groups, return_counts=True)[1]
    count, mean = len(differences), float(differences.mean())
    if len(sizes) == 1 and count > 1:
        return None
    are_few = np.count_nonzero(np.abs(differences) > SAME) <= FEW
    is_binary = bool(np.isin(differences, (-1, 0, 1)).all())
    variance, freedom = cluster_variance(differences, groups)
    quantile = float(t.ppf((1 + level) / 2, freedom)) if freedom > 0 else math.inf
    if not (are_few or is_binary or variance == 0):
        half_width = quantile * math.sqrt(variance)
        return _extend(Interval(mean - half_width, mean + half_width, level), _skewness_shift(differences, groups, quantile))
    if count == 1 and not is_binary:
        return None
    share, shift = 1.0, 0.0
    if len(sizes) < count:
        shift = 0.0 if are_few else _skewness_shift(differences, groups, quantile)
        independent = max(float((differences**2).mean()) - mean**2, 0.0) / count
        share = min(independent / variance * (float(norm.ppf((1 + level) / 2)) / quantile) ** 2, MAX_GAIN) if variance > 0 else MAX_GAIN
        if are_few or variance == 0:
            share = min(share, effective_samples(sizes, level) / count)
    gains, losses = share * float(differences.clip(min=0).sum()), share * float((-differences).clip(min=0).sum())
    return _extend(tango_interval(gains, losses, share * count, level), shift)


def cluster_variance(differences: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """Return the variance of a mean whose samples are correlated within groups (CR2), and its degrees of freedom; 0 for one group.

    Shapes: both (n,), groups of any sizes.
    Source: Bell, McCaffrey 2002, Survey Methodology 28; Pustejovsky, Tipton 2018, J. Bus. Econ. Stat. 36: for a mean, with shares w
    of the samples, the variance is sum(w^2 / (1 - w) * (group mean - mean)^2). Few clusters: Cameron, Gelbach, Miller 2008. The
    degrees of freedom are for the correlation that the samples show: Imbens, Kolesar 2016, Rev. Econ. Stat. 98.
    """
    import numpy as np

    index, sizes = np.unique(groups, return_inverse=True, return_counts=True)[1:]
    if len(sizes) == 1:
        return 0.0, 0.0
    weights = sizes / len(differences)
    centered = differences - differences.mean()
    deviations = np.bincount(index, weights=centered) / sizes
    deviations[np.abs(deviations) < np.finfo(float).eps] = 0.0  # rounding is not variation
    within = float(((centered - deviations[index]) ** 2).sum())
    correlation = _correlation(float((sizes * deviations**2).sum()), within, sizes)
    return float((weights**2 / (1 - weights) * deviations**2).sum()), degrees_of_freedom(sizes, correlation)


def _skewness_shift(differences: np.ndarray, groups: np.ndarray, quantile: float) -> float:
    """Return how far skewed groups shift an interval of their mean that uses this quantile of Student's t.

    Source: Johnson 1978, J. Am. Stat. Assoc. 73, 536-544, with the third moment of the groups' shares of the mean.
    """
    import numpy as np

    index = np.unique(groups, return_inverse=True)[1]
    shares = np.bincount(index, weights=differences - differences.mean()) / len(differences)
    count, second, third = len(shares), float((shares**2).sum()), float((shares**3).sum())
    if count < 3 or second == 0:  # noqa: PLR2004  (two have no skewness)
        return 0.0
    return third / second * count / (count - 2) * (1 / 6 + quantile**2 / 3)


def _extend(interval: Interval, shift: float) -> Interval:
    """Return an interval within -1 and 1 that reaches further on one side, by at most a quarter of its width."""
    limit = (interval.high - interval.low) / 4
    low, high = interval.low + max(min(shift, 0.0), -limit), interval.high + min(max(shift, 0.0), limit)
    return Interval(max(low, -1.0), min(high, 1.0), interval.level)


def _correlation(between: float, within: float, sizes: np.ndarray) -> float:
    """Return the correlation of two samples of a group, from sums of squares between and within groups of these sizes (G,).

    Source: the analysis of variance estimator (Donner 1986, Int. Stat. Rev. 54), from 0 to 1.
    """
    count, groups = int(sizes.sum()), len(sizes)
    if count == groups or between == 0:
        return 0.0
    between, within = between / (groups - 1), within / (count - groups)
    typical_size = (count - float((sizes**2).sum()) / count) / (groups - 1)
    return max((between - within) / (between + (typical_size - 1) * within), 0.0)


def degrees_of_freedom(sizes: np.ndarray, correlation: float) -> float:
    """Return the degrees of freedom of :func:`cluster_variance` for groups of these sizes (G,), whose samples correlate so much.

    They are G - 1 for groups of one size, and fewer otherwise.
    Source: Satterthwaite's approximation 2 E(V)^2 / Var(V) for V = sum(k * (group mean - mean)^2) (Bell, McCaffrey 2002).
    """
    import numpy as np

    if len(sizes) == 1:
        return 0.0
    weights = sizes / sizes.sum()
    factors = weights**2 / (1 - weights)
    variances = correlation + (1 - correlation) / sizes  # of the group means; their covariance after centering is -a_g - a_h + c
    a = weights * variances
    c = float((weights * a).sum())
    total, first, second = factors.sum(), (factors * a).sum(), (factors * a**2).sum()
    all_pairs = (c * total) ** 2 + 2 * total * second + 2 * first**2 - 4 * c * total * first
    diagonal = (factors**2 * ((variances - 2 * a + c) ** 2 - (c - 2 * a) ** 2)).sum()
    return float((factors * (variances - 2 * a + c)).sum() ** 2 / np.maximum(all_pairs + diagonal, np.finfo(float).tiny))


def effective_samples(sizes: np.ndarray, level: float = LEVEL) -> float:
    """Return how many independent samples are as likely to show no event as groups of these sizes (G,).

    Samples of a group are assumed to correlate by :data:`ASSUMED_CORRELATION`, with shares of events that are beta-distributed.
    Source: Skellam 1948 (beta-binomial); the rule of three (Hanley, Lippman-Hand 1983) is its limit for independent samples.
    """
    import numpy as np
    from scipy.optimize import brentq
    from scipy.special import betaln

    if sizes.max() == 1:
        return float(len(sizes))
    spread, log_missed = 1 / ASSUMED_CORRELATION - 1, math.log((1 - level) / 2)
    sizes, counts = np.unique(sizes, return_counts=True)

    def log_no_event(share: float) -> float:
        a, b = share * spread, (1 - share) * spread
        return float((counts * (betaln(a, b + sizes) - betaln(a, b))).sum())

    share = brentq(lambda share: log_no_event(share) - log_missed, 1e-9, 1 - 1e-9)
    return min(log_missed / math.log1p(-share), float((sizes * counts).sum()))


def missed_share(samples: float, level: float = LEVEL) -> float:
    """Return the largest share of events that this many independent samples may have missed altogether.

    Source: the score interval of zero events (Wilson 1927).
    """
    from scipy.stats import norm

    z = float(norm.ppf((1 + level) / 2))
    return z**2 / (samples + z**2)


def tango_interval(gains: float, losses: float, n: float, level: float = LEVEL) -> Interval:
    """Return the score interval of (gains - losses) / n, where n pairs have this many gains (+1) and losses (-1), not only whole numbers.

    Source: Tango 1998, Statistics in Medicine 17, 891-908; by bisection.
    """
    from scipy.stats import norm

    z = float(norm.ppf((1 + level) / 2))
    return Interval(-_tango_end(losses, gains, n, z), _tango_end(gains, losses, n, z), level)


def _tango_end(gains: float, losses: float, n: float, z: float) -> float:
    """Return the upper end of the interval."""
    low, high = (gains - losses) / n, 1.0
    for _ in range(50):
        value = (low + high) / 2
        b = (2 * n - gains + losses) * value - gains - losses
        root = math.sqrt(max(b**2 + 8 * n * losses * value * (1 - value), 0.0))
        loss_share = (root - b) / (4 * n)  # the most likely one, if this is the true difference
        variance = n * (2 * loss_share + value * (1 - value))
        low, high = (value, high) if (gains - losses - n * value) ** 2 <= z**2 * variance else (low, value)
    return high


def difference_p(differences: np.ndarray, groups: np.ndarray) -> float | None:
    """Return the two-sided p value of paired differences that are -1, 0 or 1; None for one group.

    Without groups it is McNemar's exact test. McNemar's test takes samples of a group as independent, so with groups it is the t test
    of :func:`cluster_variance`.

    Source: McNemar 1947, exact binomial form; Eliasziw, Donner 1991, Statistics in Medicine 10, on clustered pairs.
    """
    import numpy as np
    from scipy.stats import binomtest, t

    gains, losses = int((differences > 0).sum()), int((differences < 0).sum())
    count = len(np.unique(groups))
    if gains + losses == 0:
        return 1.0
    if count == len(groups):
        return float(binomtest(gains, gains + losses).pvalue)
    variance, freedom = cluster_variance(differences, groups)
    if count == 1 or variance == 0:
        return None
    return float(2 * t.sf(abs(float(differences.mean())) / math.sqrt(variance), freedom))


def provable_drop(sizes: np.ndarray) -> tuple[float, float]:
    """Return the smallest drop of accuracy that groups of these sizes (G,) can rule out at 95 %.

    Returns:
        The drop if no sample differs, and if a share of :data:`DISCORDANT_SHARE` differs, as many gains as losses; infinite for one
        group. Samples of a group are assumed to correlate by :data:`ASSUMED_CORRELATION`.

    Source: :func:`missed_share` of :func:`effective_samples`; the t interval of :func:`cluster_variance`, with the variance of an
    unbalanced one-way layout (Kish 1965, Survey Sampling, section 5.6).
    """
    from scipy.stats import norm, t

    count = int(sizes.sum())
    if sizes.max() == 1:
        return missed_share(count), float(norm.ppf((1 + LEVEL) / 2)) * math.sqrt(DISCORDANT_SHARE / count)
    if len(sizes) == 1:
        return math.inf, math.inf
    inflation = 1 + (float((sizes**2).sum()) / count - 1) * ASSUMED_CORRELATION
    quantile = float(t.ppf((1 + LEVEL) / 2, degrees_of_freedom(sizes, ASSUMED_CORRELATION)))
    return missed_share(effective_samples(sizes)), quantile * math.sqrt(inflation * DISCORDANT_SHARE / count)
