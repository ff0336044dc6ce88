# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest

from edgekd.stats import intervals


def test_wilson_interval_against_the_published_example():
    found = intervals.proportion(81, 263)  # Newcombe 1998, Statistics in Medicine 17, table I: 0.2553, 0.3662
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)


def test_paired_difference_is_never_of_zero_width():
    right = np.ones(450)
    found = intervals.paired_difference(right, right, np.arange(450))
    assert found.low < 0 < found.high
    assert found.high == pytest.approx(1.96**2 / (450 + 1.96**2), abs=2e-4)


def test_paired_difference_is_antisymmetric():
    made = np.random.default_rng(0)
    first, second = (made.random((2, 300)) < 0.9).astype(float)
    one, two = intervals.paired_difference(first, second, np.arange(300)), intervals.paired_difference(second, first, np.arange(300))
    assert one.low == pytest.approx(-two.high)


def test_paired_difference_is_narrower_than_two_percentages():
    made = np.random.default_rng(1)
    first = (made.random(2000) < 0.9).astype(float)
    second = np.where(made.random(2000) < 0.02, 1 - first, first)
    paired = intervals.paired_difference(first, second, np.arange(2000))
    alone = intervals.proportion(int(first.sum()), 2000)
    assert paired.high - paired.low < (alone.high - alone.low) * 0.7


@pytest.mark.parametrize("clusters", [False, True])
def test_paired_difference_covers_the_truth_about_as_often_as_it_says(clusters):
    made = np.random.default_rng(2)
    inside, trials, n = 0, 200, 400
    groups = np.repeat(np.arange(n // 4), 4) if clusters else np.arange(n)
    for _ in range(trials):
        first = (made.random(n) < 0.9).astype(float)
        flips = np.repeat(made.random(n // 4) < 0.06, 4) if clusters else made.random(n) < 0.06
        second = np.where(flips, 0.0, first)
        interval = intervals.paired_difference(first, second, groups)
        inside += interval.low <= 0.9 * 0.06 <= interval.high
    assert inside / trials >= 0.90


def test_clusters_widen_the_interval():
    made = np.random.default_rng(3)
    flips = np.repeat(made.random(100) < 0.1, 10)
    first, second = np.ones(1000), 1.0 - flips
    clustered = intervals.paired_difference(first, second, np.repeat(np.arange(100), 10))
    single = intervals.paired_difference(first, second, np.arange(1000))
    assert clustered.high - clustered.low > 1.5 * (single.high - single.low)


def test_mcnemar_is_the_binomial_test():
    assert intervals.mcnemar_p(0, 0) == 1.0
    assert intervals.mcnemar_p(0, 6) == pytest.approx(2 * 0.5**6)


def test_runs_that_a_percentile_needs():
    assert [intervals.runs_needed(q) for q in (0.9, 0.95, 0.99)] == [29, 59, 299]


@pytest.mark.parametrize(
    ("n", "quantile", "carries"), [(58, 0.95, False), (59, 0.95, True), (298, 0.99, False), (299, 0.99, True), (5, 0.5, True)]
)
def test_a_percentile_that_n_cannot_carry_has_no_interval(n, quantile, carries):
    assert (intervals.quantile_interval(list(range(n)), quantile)[1] is not None) == carries


def test_quantile_interval_covers_the_truth():
    made = np.random.default_rng(4)
    inside = 0
    for _ in range(300):
        value, interval = intervals.quantile_interval(made.exponential(1000, 400).astype(int).tolist(), 0.95)
        assert interval.low <= value <= interval.high
        inside += interval.low <= -1000 * math.log(0.05) <= interval.high
    assert inside / 300 >= 0.92


def test_ratio_of_medians_finds_two_percent_and_nothing_where_there_is_nothing():
    made = np.random.default_rng(5)
    weather = made.normal(1.0, 0.05, 60)  # common to both of a round

    def blocks(level):
        return [(level * w * made.normal(1.0, 0.01, 20)).astype(int).tolist() for w in weather]

    slower = intervals.ratio_of_medians(blocks(102_000), blocks(100_000))[1]
    same = intervals.ratio_of_medians(blocks(100_000), blocks(100_000))[1]
    assert slower.low > 1.0
    assert same.low <= 1.0 <= same.high


def test_provable_drop_shrinks_with_samples():
    best, usual = intervals.provable_drop(10_000)
    assert best < usual < intervals.provable_drop(450)[1]
    assert 100 * usual == pytest.approx(0.438, abs=0.01)


def test_a_difference_over_seeds_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(5)
    trials, seeds, samples, truth, covered = 600, 5, 300, 0.02, 0
    for _ in range(trials):
        by_seed, by_sample = generator.normal(0, 0.01, (seeds, 1)), generator.normal(0, 0.15, (1, samples))
        drawn = truth + by_seed + by_sample + generator.normal(0, 0.3, (seeds, samples))
        value, interval = intervals.difference_over_seeds(drawn, np.arange(samples))
        assert value == pytest.approx(drawn.mean())
        covered += interval.low <= truth <= interval.high
    assert covered / trials > 0.93


def test_few_seeds_widen_an_interval_more_than_the_same_spread_over_samples():
    generator = np.random.default_rng(6)
    drawn = generator.normal(0, 0.3, (2, 400)) + np.array([[0.02], [-0.02]])
    many = generator.normal(0, 0.3, (20, 400)) + np.tile([[0.02], [-0.02]], (10, 1))
    widths = [
        interval.high - interval.low for _, interval in (intervals.difference_over_seeds(item, np.arange(400)) for item in (drawn, many))
    ]
    assert widths[0] > 3 * widths[1]


def test_samples_of_one_speaker_count_as_one_in_a_difference_over_seeds():
    generator = np.random.default_rng(7)
    by_speaker = np.repeat(generator.normal(0, 0.3, (1, 20)), 15, axis=1) + generator.normal(0, 0.05, (4, 300))
    alone = intervals.difference_over_seeds(by_speaker, np.arange(300))[1]
    together = intervals.difference_over_seeds(by_speaker, np.repeat(np.arange(20), 15))[1]
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_no_difference_under_any_seed_is_not_proof_of_none():
    value, interval = intervals.difference_over_seeds(np.zeros((3, 200)), np.arange(200))
    assert value == 0
    assert interval.low < 0 < interval.high
