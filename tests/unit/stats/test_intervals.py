# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest

from edgekd.stats import intervals


def test_wilson_interval_against_the_published_example():
    interval = intervals.proportion_interval(81, 263)  # Newcombe 1998, Statistics in Medicine 17, table I: 0.2553, 0.3662
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.2553, 0.3662)


def test_paired_difference_always_has_a_width():
    scores = np.ones(450)
    interval = intervals.paired_difference_interval(scores, scores, np.arange(450))
    assert interval.low < 0 < interval.high
    assert interval.high == pytest.approx(1.96**2 / (450 + 1.96**2), abs=2e-4)


def test_paired_difference_is_antisymmetric():
    generator = np.random.default_rng(0)
    first, second = (generator.random((2, 300)) < 0.9).astype(float)
    forward = intervals.paired_difference_interval(first, second, np.arange(300))
    backward = intervals.paired_difference_interval(second, first, np.arange(300))
    assert forward.low == pytest.approx(-backward.high)


def test_paired_difference_is_narrower_than_two_percentages():
    generator = np.random.default_rng(1)
    first = (generator.random(2000) < 0.9).astype(float)
    second = np.where(generator.random(2000) < 0.02, 1 - first, first)
    paired = intervals.paired_difference_interval(first, second, np.arange(2000))
    unpaired = intervals.proportion_interval(int(first.sum()), 2000)
    assert paired.high - paired.low < (unpaired.high - unpaired.low) * 0.7


@pytest.mark.parametrize("clusters", [False, True])
def test_paired_difference_covers_the_true_value_at_its_level(clusters):
    generator = np.random.default_rng(2)
    covered, simulations, n = 0, 200, 400
    groups = np.repeat(np.arange(n // 4), 4) if clusters else np.arange(n)
    for _ in range(simulations):
        first = (generator.random(n) < 0.9).astype(float)
        flips = np.repeat(generator.random(n // 4) < 0.06, 4) if clusters else generator.random(n) < 0.06
        second = np.where(flips, 0.0, first)
        interval = intervals.paired_difference_interval(first, second, groups)
        covered += interval.low <= 0.9 * 0.06 <= interval.high
    assert covered / simulations >= 0.90


def test_clusters_widen_the_interval():
    generator = np.random.default_rng(3)
    flips = np.repeat(generator.random(100) < 0.1, 10)
    first, second = np.ones(1000), 1.0 - flips
    clustered = intervals.paired_difference_interval(first, second, np.repeat(np.arange(100), 10))
    single = intervals.paired_difference_interval(first, second, np.arange(1000))
    assert clustered.high - clustered.low > 1.5 * (single.high - single.low)


def test_mcnemar_is_the_binomial_test():
    assert intervals.mcnemar_p(0, 0) == 1.0
    assert intervals.mcnemar_p(0, 6) == pytest.approx(2 * 0.5**6)


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


def test_provable_drop_shrinks_with_samples():
    best, usual = intervals.provable_drop(10_000)
    assert best < usual < intervals.provable_drop(450)[1]
    assert 100 * usual == pytest.approx(0.438, abs=0.01)


def test_difference_over_seeds_covers_the_true_value_at_its_level():
    generator = np.random.default_rng(5)
    simulations, seeds, samples, true_value, covered = 600, 5, 300, 0.02, 0
    for _ in range(simulations):
        by_seed, by_sample = generator.normal(0, 0.01, (seeds, 1)), generator.normal(0, 0.15, (1, samples))
        differences = true_value + by_seed + by_sample + generator.normal(0, 0.3, (seeds, samples))
        value, interval = intervals.difference_over_seeds(differences, np.arange(samples))
        assert value == pytest.approx(differences.mean())
        covered += interval.low <= true_value <= interval.high
    assert covered / simulations > 0.93


def test_few_seeds_widen_the_interval():
    generator = np.random.default_rng(6)
    two_seeds = generator.normal(0, 0.3, (2, 400)) + np.array([[0.02], [-0.02]])
    twenty_seeds = generator.normal(0, 0.3, (20, 400)) + np.tile([[0.02], [-0.02]], (10, 1))
    widths = [
        interval.high - interval.low
        for _, interval in (intervals.difference_over_seeds(item, np.arange(400)) for item in (two_seeds, twenty_seeds))
    ]
    assert widths[0] > 3 * widths[1]


def test_difference_over_seeds_counts_a_speaker_as_one_sample():
    generator = np.random.default_rng(7)
    by_speaker = np.repeat(generator.normal(0, 0.3, (1, 20)), 15, axis=1) + generator.normal(0, 0.05, (4, 300))
    by_sample = intervals.difference_over_seeds(by_speaker, np.arange(300))[1]
    grouped = intervals.difference_over_seeds(by_speaker, np.repeat(np.arange(20), 15))[1]
    assert grouped.high - grouped.low > 2 * (by_sample.high - by_sample.low)


def test_difference_over_seeds_has_a_width_without_any_difference():
    value, interval = intervals.difference_over_seeds(np.zeros((3, 200)), np.arange(200))
    assert value == 0
    assert interval.low < 0 < interval.high


def test_one_group_or_one_pair_of_blocks_is_no_error():
    interval = intervals.paired_difference_interval(np.array([0.5, 0.7]), np.array([0.4, 0.5]), np.zeros(2))
    assert interval.low < 0.15 < interval.high
    assert intervals.ratio_of_medians([[2, 2]], [[1, 1]])[0] == 2
