# SPDX-License-Identifier: Apache-2.0
"""Metrics of the whole set: parts, support, and intervals from the values without each part."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks import intervals as simulation
from edgekd.stats import jackknife
from edgekd.stats.jackknife import Jackknife

GROUPS = np.arange(60) % 20


def _of_mean(scores, groups, limit=100):
    parts = jackknife.assign_parts(groups, limit)
    return Jackknife(np.array([scores[parts != part].mean() for part in range(parts.max() + 1)]), int(parts.max()) + 1)


def test_a_group_is_never_split():
    groups = np.array([5, -3, 5, 90, 7, 7])
    assert jackknife.assign_parts(groups, 10).tolist() == [1, 0, 1, 3, 2, 2]
    many = np.arange(1000) // 2
    parts = jackknife.assign_parts(many, 20)
    assert sorted(np.bincount(parts)) == [50] * 20
    assert all(len(set(parts[many == group])) == 1 for group in range(500))
    assert (parts == jackknife.assign_parts(many, 20)).all()


def test_the_support_is_that_of_the_rarer_of_two_classes():
    parts = np.arange(60) % 20
    rare = np.isin(np.arange(60), (3, 23, 7)).astype(int)  # parts 3, 3 and 7
    assert jackknife.support(rare, parts) == 2
    assert jackknife.support(np.arange(60) % 3, parts) == 20
    assert jackknife.support(np.zeros((60, 4)), parts) == 20
    assert jackknife.support(rare.astype(float), parts) == 20


def test_the_interval_of_a_mean_is_the_t_interval():
    scores = np.random.default_rng(0).normal(0.7, 0.1, 40)
    interval = jackknife.metric_interval(scores.mean(), _of_mean(scores, np.arange(40)), np.arange(40))
    half_width = 2.02269 * scores.std(ddof=1) / math.sqrt(40)
    assert (interval.low, interval.high) == pytest.approx((scores.mean() - half_width, scores.mean() + half_width), rel=1e-4)


@pytest.mark.parametrize(
    "values", [np.full(20, 1.0), 1.0 + 1e-9 * np.arange(20)], ids=["the same without any part", "the same up to rounding"]
)
def test_no_spread_still_has_a_width(values):
    wide = jackknife.metric_interval(1.0, Jackknife(values, 20), GROUPS)
    assert wide.high - 1 == pytest.approx(1 - wide.low)
    assert wide.high - 1 > 3.8 / 64
    rare = jackknife.metric_interval(1.0, Jackknife(values, 2), GROUPS)  # the rarer class is in two parts only
    assert rare.high - 1 > 0.35


@pytest.mark.parametrize(
    ("values", "support"),
    [([0.9], 1), ([0.9, 0.8, math.nan], 3), ([0.9, math.inf, 0.8], 3), ([0.9, 0.7, 0.8], 1), ([0.9, -1e300, 0.8], 3)],
    ids=["one part", "undefined without a part", "infinite without a part", "a class in one part", "out of all bounds"],
)
def test_there_is_no_telling(values, support):
    assert jackknife.metric_interval(0.9, Jackknife(np.array(values), support), np.arange(len(values))) is None


def test_few_positives_widen_the_interval():
    values = np.r_[0.9, 0.95, np.full(18, 0.93)]
    few, many = (jackknife.metric_interval(0.93, Jackknife(values, support), GROUPS) for support in (2, 20))
    assert few.high - few.low > 5 * (many.high - many.low)


AUC = next(scenario for scenario in simulation.SCENARIOS if scenario[0].startswith("AUC"))


@pytest.mark.parametrize("groups", [4, 10])
def test_coverage_and_false_pass_of_a_difference_of_aucs(groups):
    generator = np.random.default_rng(groups)
    covered, false_pass, *_ = simulation.simulate(AUC, groups, equal=True, simulations=400, generator=generator)
    assert 92 <= covered <= 99  # within the noise of 400 simulations of 93 to 98
    assert false_pass <= 4 + 2
