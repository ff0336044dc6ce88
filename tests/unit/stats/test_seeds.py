# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest

from edgekd.stats import seeds


@pytest.mark.parametrize("groups", [4, 10, 300])
def test_difference_over_seeds_covers_the_true_value_at_its_level(groups):
    generator = np.random.default_rng(5)
    simulations, count, samples, true_value, covered = 500, 5, 300, 0.02, 0
    index = np.arange(samples) % groups
    for _ in range(simulations):
        by_seed, by_sample = generator.normal(0, 0.01, (count, 1)), generator.normal(0, 0.15, (1, samples))
        by_group = generator.normal(0, 0.03, groups)[index] if groups < samples else 0
        differences = true_value + by_seed + by_sample + by_group + generator.normal(0, 0.3, (count, samples))
        value, interval = seeds.difference_over_seeds(differences, index)
        assert value == pytest.approx(differences.mean())
        covered += interval.low <= true_value <= interval.high
    assert 0.93 <= covered / simulations <= 0.985


def test_few_seeds_widen_the_interval():
    generator = np.random.default_rng(6)
    two_seeds = generator.normal(0, 0.3, (2, 400)) + np.array([[0.02], [-0.02]])
    twenty_seeds = generator.normal(0, 0.3, (20, 400)) + np.tile([[0.02], [-0.02]], (10, 1))
    widths = [
        interval.high - interval.low
        for _, interval in (seeds.difference_over_seeds(item, np.arange(400)) for item in (two_seeds, twenty_seeds))
    ]
    assert widths[0] > 3 * widths[1]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_ends_err_as_seldom_where_seeds_differ_more_than_samples(count):
    generator = np.random.default_rng(8)
    simulations, variances, missed = 2000, (0.8, 0.2), 0
    for _ in range(simulations):
        by_seed = generator.normal(generator.normal(0, math.sqrt(variances[1])), math.sqrt(variances[0] * count), count)
        sample_variance = variances[1] * generator.chisquare(1000) / 1000
        missed += seeds.interval_over_seeds(by_seed, sample_variance, 0.0, 1000).low > 0
    assert missed / simulations <= 0.035  # 2.5 %, and three standard errors; the degrees of freedom alone: 5, 4 and 3 %


def test_difference_over_seeds_counts_a_speaker_as_one_sample():
    generator = np.random.default_rng(7)
    by_speaker = np.repeat(generator.normal(0, 0.3, (1, 20)), 15, axis=1) + generator.normal(0, 0.05, (4, 300))
    by_sample = seeds.difference_over_seeds(by_speaker, np.arange(300))[1]
    grouped = seeds.difference_over_seeds(by_speaker, np.repeat(np.arange(20), 15))[1]
    assert grouped.high - grouped.low > 2 * (by_sample.high - by_sample.low)


def test_few_differences_still_have_a_width():
    differences = np.zeros((3, 200))
    value, interval = seeds.difference_over_seeds(differences, np.arange(200))
    assert value == 0
    assert interval.high == -interval.low == pytest.approx(1.96**2 / (200 + 1.96**2), abs=1e-4)
    differences[:, :2] = 1  # the same two samples with every seed: no spread between seeds, and little between samples
    interval = seeds.difference_over_seeds(differences, np.arange(200))[1]
    assert interval.low < 0 < interval.high


def test_one_group_says_nothing_about_others():
    assert seeds.difference_over_seeds(np.ones((3, 20)), np.zeros(20)) == (1.0, None)
