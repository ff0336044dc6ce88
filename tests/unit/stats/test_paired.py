# SPDX-License-Identifier: Apache-2.0
"""Intervals of paired differences: known values, coverage at their level, and what few groups and few differences can show."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import multinomial

from benchmarks import intervals as simulation
from edgekd.stats import paired

ONE_EACH = np.arange(450)


def _differences(gains, losses, n):
    return np.repeat([1.0, -1.0, 0.0], [gains, losses, n - gains - losses])


def _score_statistic(gains, losses, n, difference):
    """Return Tango's statistic, with the restricted maximum likelihood estimate from a search over a grid."""
    shares = np.linspace(max(0, -difference), (1 - difference) / 2, 400_001)[1:-1]  # of losses; gains are that and the difference
    likelihood = gains * np.log(shares + difference) + losses * np.log(shares) + (n - gains - losses) * np.log(1 - 2 * shares - difference)
    share = shares[likelihood.argmax()]
    return (gains - losses - n * difference) / math.sqrt(n * (2 * share + difference - difference**2))


@pytest.mark.parametrize(("gains", "losses", "n"), [(12, 2, 44), (3, 1, 200), (40, 60, 500)])
def test_both_ends_of_tangos_interval_have_its_score(gains, losses, n):
    interval = paired.tango_interval(gains, losses, n)
    assert _score_statistic(gains, losses, n, interval.low) == pytest.approx(1.96, abs=2e-3)
    assert _score_statistic(gains, losses, n, interval.high) == pytest.approx(-1.96, abs=2e-3)


def test_without_groups_it_is_tangos_interval():
    interval = paired.difference_interval(_differences(30, 10, 450), ONE_EACH)
    assert interval == paired.tango_interval(30, 10, 450)


@pytest.mark.parametrize(("n", "groups"), [(1, 1), (2, 2), (450, 450), (450, 225), (600, 6)])
def test_no_difference_still_has_a_width(n, groups):
    interval = paired.difference_interval(np.zeros(n), np.arange(n) % groups)
    assert interval.high == -interval.low
    assert interval.high >= 3.6 / (n + 3.7)


def test_no_difference_in_few_groups_proves_less_than_in_independent_samples_and_more_than_in_as_many_samples_as_groups():
    independent, grouped, groups = (
        paired.difference_interval(np.zeros(n), index).high
        for n, index in ((600, np.arange(600)), (600, np.arange(600) % 6), (6, np.arange(6)))
    )
    assert 2 * independent < grouped < groups / 10


def test_constant_differences_of_numbers_have_a_width():
    interval = paired.difference_interval(np.full(100, 0.25), np.arange(100))
    assert interval.low < 0.2
    assert interval.high > 0.3
    tiny = paired.difference_interval(np.full(100, 1e-7), np.arange(100) % 10)
    assert tiny.high > 0.03


def test_one_group_says_nothing_about_others():
    assert paired.difference_interval(_differences(30, 10, 450), np.zeros(450)) is None
    assert paired.difference_interval(np.array([0.3]), np.zeros(1)) is None
    assert paired.difference_interval(np.array([0.3, 0.1]), np.arange(2)).high > 0.7


def test_the_interval_is_antisymmetric():
    differences, groups = simulation.binary(0.1, 0.7, 0.05)(np.arange(400) % 10, np.random.default_rng(0))[0], np.arange(400) % 10
    forward, backward = (paired.difference_interval(item, groups) for item in (differences, -differences))
    assert (forward.low, forward.high) == pytest.approx((-backward.high, -backward.low))


def test_one_more_loss_never_lowers_the_upper_end_while_few_samples_differ():
    groups = np.arange(400) % 10
    ends = [paired.difference_interval(_differences(count, 0, 400), groups).high for count in range(paired.FEW + 1)]
    assert ends == sorted(ends)


def test_numbers_in_groups_of_one_size_have_the_t_interval_of_group_means():
    generator = np.random.default_rng(3)
    means = generator.normal(0.1, 0.05, 6)
    means += 0.1 - means.mean()
    means = np.r_[means, 0.2 - means]  # no skewness
    interval = paired.difference_interval(np.repeat(means, 20), np.repeat(np.arange(12), 20))
    half_width = 2.200985 * means.std(ddof=1) / math.sqrt(12)
    assert (interval.low, interval.high) == pytest.approx((0.1 - half_width, 0.1 + half_width))


@pytest.mark.parametrize("correlation", [0, 0.1, 1])
def test_degrees_of_freedom_against_the_matrix_formula(correlation):
    sizes = np.array([42, 13, 25, 81])
    weights = sizes / sizes.sum()
    centering = np.eye(4) - np.outer(np.ones(4), weights)
    form = centering.T @ np.diag(weights**2 / (1 - weights)) @ centering @ np.diag(correlation + (1 - correlation) / sizes)
    expected = np.trace(form) ** 2 / np.trace(form @ form)
    assert paired.degrees_of_freedom(sizes, correlation) == pytest.approx(expected)
    assert paired.degrees_of_freedom(np.full(7, 10), correlation) == pytest.approx(6)


def test_effective_samples_are_between_groups_and_samples():
    assert paired.effective_samples(np.ones(50, int)) == 50
    assert 6 < paired.effective_samples(np.full(6, 100)) < 200
    assert paired.effective_samples(np.full(300, 2)) == pytest.approx(600, rel=0.1)


def test_skewed_groups_extend_the_interval_to_their_side():
    differences = np.repeat([0.0, 0.01, 0.0, 0.01, 0.02, 0.0, 0.01, 0.4], 10) + np.tile([0.001, -0.001], 40)
    groups = np.repeat(np.arange(8), 10)
    interval = paired.difference_interval(differences, groups)
    assert interval.high - differences.mean() > 1.2 * (differences.mean() - interval.low)


def test_mcnemar_is_the_binomial_test_without_groups_and_respects_them():
    assert paired.difference_p(np.zeros(9), np.arange(9)) == 1.0
    assert paired.difference_p(_differences(0, 6, 9), np.arange(9)) == pytest.approx(2 * 0.5**6)
    in_one_group = np.repeat([[1.0, 0, 0, 0]], 20, axis=0).T.ravel()  # all 20 losses are of one speaker
    assert paired.difference_p(in_one_group, np.arange(80)) < 1e-5
    assert paired.difference_p(in_one_group, np.repeat(np.arange(4), 20)) == pytest.approx(0.391, abs=1e-3)
    assert paired.difference_p(in_one_group, np.zeros(80)) is None


def test_provable_drop_shrinks_with_samples_and_grows_with_groups():
    def drops(samples, groups):
        return paired.provable_drop(np.bincount(np.arange(samples) % groups))

    best, usual = drops(10_000, 10_000)
    assert best < usual < drops(450, 450)[1]
    assert 100 * usual == pytest.approx(0.438, abs=0.01)
    assert drops(600, 600)[1] < drops(600, 60)[1] < drops(600, 6)[1] < 0.1
    assert drops(600, 600)[0] < drops(600, 6)[0]
    assert drops(600, 1) == (math.inf, math.inf)


@pytest.mark.parametrize("n", [10, 30, 100, 300])
@pytest.mark.parametrize("drop", [0.002, 0.01, 0.05])
def test_without_groups_false_pass_is_rare_at_any_size(n, drop):
    """A sum over all outcomes, no simulation: a share of 1.5 drops is lost, half a drop is won."""
    loss, gain = 1.5 * drop, 0.5 * drop
    probability = 0.0
    for losses in range(min(n, 5 + int(5 * n * loss)) + 1):
        for gains in range(min(n - losses, 5 + int(5 * n * gain)) + 1):
            if paired.tango_interval(losses, gains, n).high < drop:
                counts = (losses, gains, n - losses - gains)
                probability += multinomial.pmf(counts, n, (loss, gain, 1 - loss - gain))
    assert probability <= 0.04


SMALL = [scenario for scenario in simulation.SCENARIOS if scenario[0] in {"binary, correlation 0.05, 10 % differ", "real, correlation 0.3"}]


@pytest.mark.parametrize("groups", [4, 6, 10, 30])
@pytest.mark.parametrize("scenario", SMALL, ids=lambda scenario: scenario[0])
def test_coverage_and_false_pass(scenario, groups):
    generator = np.random.default_rng(groups)
    covered, false_pass, *_ = simulation.simulate(scenario, groups, equal=False, simulations=600, generator=generator)
    assert 92 <= covered <= 99  # within the noise of 600 simulations of 93 to 98
    assert false_pass <= 4 + 1.6


@pytest.mark.long
@pytest.mark.parametrize("scenario", simulation.SCENARIOS, ids=lambda scenario: scenario[0])
def test_coverage_and_false_pass_of_all_scenarios(scenario):
    for _, equal, groups, (covered, false_pass, *_) in simulation.rows(2000, (scenario,)):
        assert covered >= 93 - 1, (equal, groups)
        assert covered <= 98 + 0.6 or scenario[0] == simulation.NEAR_ONE, (equal, groups)
        assert false_pass <= 4 + 0.9, (equal, groups)
