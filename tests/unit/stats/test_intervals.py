# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest

from edgekd.stats import intervals


def test_wilson_interval_against_the_published_example():
    interval = intervals.proportion_interval(81, 263)  # Newcombe 1998, Statistics in Medicine 17, table I: 0.2553, 0.3662
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.2553, 0.3662)


def test_runs_needed_for_a_percentile():
    assert [intervals.runs_needed(q) for q in (0.9, 0.95, 0.99)] == [29, 59, 299]


@pytest.mark.parametrize(
    ("n", "quantile", "has_interval"), [(58, 0.95, False), (59, 0.95, True), (298, 0.99, False), (299, 0.99, True), (5, 0.5, True)]
)
def test_a_percentile_of_too_few_runs_has_no_interval(n, quantile, has_interval):
    assert (intervals.quantile_interval(list(range(n)), quantile)[1] is not None) == has_interval


def test_quantile_interval_covers_the_true_value():
    generator = np.random.default_rng(4)
    covered = 0
    for _ in range(300):
        value, interval = intervals.quantile_interval(generator.exponential(1000, 400).astype(int).tolist(), 0.95)
        assert interval.low <= value <= interval.high
        covered += interval.low <= -1000 * math.log(0.05) <= interval.high
    assert covered / 300 >= 0.92


def test_ratio_of_medians_detects_two_percent_and_includes_one_for_equal_models():
    generator = np.random.default_rng(5)
    load = generator.normal(1.0, 0.05, 60)  # the same for both blocks of a round

    def blocks(level):
        return [(level * factor * generator.normal(1.0, 0.01, 20)).astype(int).tolist() for factor in load]

    slower = intervals.ratio_of_medians(blocks(102_000), blocks(100_000))[1]
    same = intervals.ratio_of_medians(blocks(100_000), blocks(100_000))[1]
    assert slower.low > 1.0
    assert same.low <= 1.0 <= same.high


def test_one_pair_of_blocks_has_no_interval():
    assert intervals.ratio_of_medians([[2, 2]], [[1, 1]]) == (2, None)
