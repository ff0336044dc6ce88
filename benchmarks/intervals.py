# SPDX-License-Identifier: Apache-2.0
"""Coverage and false PASS of the intervals that verdicts rest on, by simulation, beside the percentile bootstrap over groups.

A false PASS is an interval whose upper end is below the true drop, so that a budget of exactly that end would be passed. 95 % and 2.5 %
are meant. Prints coverage and false PASS in percent, at 4, 6, 10 and 30 groups.

    python benchmarks/intervals.py [SIMULATIONS]
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np

from edgekd.stats import jackknife, paired, seeds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from edgekd.domain.verdict import Interval

    Sample = tuple[np.ndarray, ...]  # paired differences; for AUC: labels, scores of the teacher, scores of the student
    Draw = Callable[[np.ndarray, np.random.Generator], Sample]  # from the index of each sample's group

SIMULATIONS = 2000
GROUPS = (4, 6, 10, 30)
SAMPLES_OF_GROUP = 40  # on average
RESAMPLES = 500
NEAR_ONE = "binary, correlation 0.02, near 1: 2 % differ"  # covered more often: few or no samples differ
SEEDS = 4
SHARED_HARDNESS = 0.7  # of the samples, among seeds


def sizes(groups: int, *, equal: bool) -> np.ndarray:
    """Return the number of samples of each group: 40 each, or log-normal around that (the largest of 4 groups has half)."""
    if equal:
        return np.full(groups, SAMPLES_OF_GROUP)
    quantiles = np.random.default_rng(0).permutation((np.arange(groups) + 0.5) / groups)
    weights = np.exp(0.8 * np.sqrt(2) * _erfinv(2 * quantiles - 1))
    return np.maximum((weights / weights.mean() * SAMPLES_OF_GROUP).round().astype(int), 2)


def binary(share: float, worse: float, correlation: float) -> Draw:
    """Return differences of right and wrong: this share differs, and of these this share to the teacher's advantage."""

    def draw(index: np.ndarray, generator: np.random.Generator) -> Sample:
        groups, spread = index.max() + 1, 1 / correlation - 1 if correlation else 0
        shares = generator.beta(share * spread, (1 - share) * spread, groups) if correlation else np.full(groups, share)
        differs = generator.random(len(index)) < shares[index]
        return (differs * np.where(generator.random(len(index)) < worse, 1.0, -1.0),)

    return draw


def real(correlation: float, *, skewed: bool = False) -> Draw:
    """Return differences around 0.02 of scores that are numbers; ``skewed``: few groups lose much."""

    def draw(index: np.ndarray, generator: np.random.Generator) -> Sample:
        groups = index.max() + 1
        of_group = generator.gamma(4, 0.5, groups) - 2 if skewed else generator.normal(size=groups)
        noise = generator.normal(size=len(index))
        return (0.02 + 0.05 * (np.sqrt(correlation) * of_group[index] + np.sqrt(1 - correlation) * noise),)

    return draw


def crossed(index: np.ndarray, generator: np.random.Generator) -> Sample:
    """Return differences of right and wrong of several seeds (S, n), around 0.03: seeds, groups and samples vary.

    Most samples are as hard for one seed as for another.
    """
    by_seed, by_group = generator.normal(0, 0.01, (SEEDS, 1)), generator.normal(0, 0.02, index.max() + 1)[index]
    of_seed, shared = generator.random((SEEDS, len(index))), generator.random(len(index))
    hardness = np.where(generator.random((SEEDS, len(index))) < SHARED_HARDNESS, shared, of_seed)
    gains, losses = hardness < (0.06 + by_seed + by_group).clip(0, 1), hardness > 1 - 0.03
    return (gains.astype(float) - losses,)


def auc_samples(index: np.ndarray, generator: np.random.Generator) -> Sample:
    """Return labels (a third is positive), and scores of teacher and student, whose quality varies among groups."""
    labels = generator.random(len(index)) < 1 / 3
    groups = index.max() + 1
    shared = generator.normal(size=len(index))
    shifts = generator.normal(0, 0.3, (2, groups)) + generator.normal(0, 0.5, groups)
    return labels, *(quality * labels + shared + 0.5 * generator.normal(size=len(index)) + shift[index] * labels
                     for quality, shift in zip((2.2, 2.0), shifts, strict=True))  # fmt: skip


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Return the area under the ROC curve (no ties)."""
    positives = int(labels.sum())
    if positives in {0, len(labels)}:
        return float("nan")
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores)] = np.arange(1, len(scores) + 1)
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / positives / (len(labels) - positives))


def interval_of_mean(sample: Sample, groups: np.ndarray) -> Interval | None:
    """Return the interval of paired differences, of one seed or of several."""
    (differences,) = sample
    return paired.difference_interval(differences, groups) if differences.ndim == 1 else seeds.difference_over_seeds(differences, groups)[1]


def interval_of_auc(sample: Sample, groups: np.ndarray) -> Interval | None:
    """Return the interval of a difference of two AUCs."""
    parts = jackknife.assign_parts(groups, 100)
    masks = [parts != part for part in range(parts.max() + 1)]
    values = np.array([_auc_difference(sample, mask) for mask in masks])
    whole = jackknife.Jackknife(values, jackknife.support(sample[0].astype(int), parts))
    return jackknife.metric_interval(_auc_difference(sample, slice(None)), whole, groups)


def percentile_of_mean(sample: Sample, groups: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    """Return the interval that a percentile bootstrap over groups would give."""
    counts = np.bincount(groups)
    sums = np.bincount(groups, weights=sample[0])
    resamples = generator.integers(0, len(counts), (RESAMPLES, len(counts)))
    low, high = np.quantile(sums[resamples].sum(1) / counts[resamples].sum(1), [0.025, 0.975])
    return float(low), float(high)


# name, draw, interval, true difference; None: from a large sample
SCENARIOS = (
    ("binary, independent, 10 % differ", binary(0.1, 0.6, 0), interval_of_mean, 0.02),
    ("binary, correlation 0.05, 10 % differ", binary(0.1, 0.6, 0.05), interval_of_mean, 0.02),
    ("binary, correlation 0.05, the student is only worse", binary(0.1, 1.0, 0.05), interval_of_mean, 0.1),
    ("binary, correlation 0.15, 30 % differ", binary(0.3, 0.7, 0.15), interval_of_mean, 0.12),
    (NEAR_ONE, binary(0.02, 0.8, 0.02), interval_of_mean, 0.012),
    ("real, independent", real(0), interval_of_mean, 0.02),
    ("real, correlation 0.3", real(0.3), interval_of_mean, 0.02),
    ("real, correlation 0.2, skewed", real(0.2, skewed=True), interval_of_mean, 0.02),
    ("distillation, 4 seeds, binary", crossed, interval_of_mean, None),
    ("AUC, correlated", auc_samples, interval_of_auc, None),
)


def true_value(draw: Draw) -> float:
    """Return the difference in a large sample."""
    index = np.repeat(np.arange(20_000), 10)
    sample = draw(index, np.random.default_rng(1))
    return float(sample[0].mean()) if len(sample) == 1 else _auc_difference(sample, slice(None))


def simulate(scenario: tuple[str, Draw, Callable[..., Interval | None], float | None], groups: int, *, equal: bool, simulations: int,
             generator: np.random.Generator) -> tuple[float, float, float, float]:  # fmt: skip
    """Return coverage and false PASS of the interval, and of the percentile bootstrap (nan where there is none), in percent."""
    _, draw, interval_of, value = scenario
    value = true_value(draw) if value is None else value
    index = np.repeat(np.arange(groups), sizes(groups, equal=equal))
    ends = np.full((2, simulations, 2), np.nan)
    for number in range(simulations):
        sample = draw(index, generator)
        interval = interval_of(sample, index)
        ends[0, number] = (-np.inf, np.inf) if interval is None else (interval.low, interval.high)
        if sample[0].ndim == 1 and len(sample) == 1:
            ends[1, number] = percentile_of_mean(sample, index, generator)
    covered = 100 * ((ends[..., 0] <= value) & (value <= ends[..., 1])).mean(1)
    false_pass = 100 * (ends[..., 1] < value).mean(1)
    covered[np.isnan(ends[..., 0]).all(1)] = np.nan
    return covered[0], false_pass[0], covered[1], false_pass[1]


def rows(simulations: int, scenarios: tuple[object, ...] = SCENARIOS) -> Iterator[tuple[str, bool, int, tuple[float, ...]]]:
    """Yield the name of each scenario, whether groups are of one size, their number, and what was simulated."""
    for scenario in scenarios:
        for equal in (True, False):
            for groups in GROUPS:
                generator = np.random.default_rng(groups)
                yield scenario[0], equal, groups, simulate(scenario, groups, equal=equal, simulations=simulations, generator=generator)


def main(arguments: list[str]) -> None:
    """Print a table."""
    simulations = int(arguments[0]) if arguments else SIMULATIONS
    print(f"{simulations} simulations: coverage / false PASS in %, and in brackets those of the percentile bootstrap")
    print("scenario | sizes | " + " | ".join(f"{groups} groups" for groups in GROUPS))
    cells: list[str] = []
    for name, equal, groups, (covered, false_pass, covered_before, false_pass_before) in rows(simulations):
        before = "" if np.isnan(covered_before) else f" ({covered_before:.1f} / {false_pass_before:.1f})"
        cells.append(f"{covered:.1f} / {false_pass:.1f}{before}")
        if groups == GROUPS[-1]:
            print(" | ".join((name, "equal" if equal else "unequal", *cells)), flush=True)
            cells = []


def _auc_difference(sample: Sample, rows: np.ndarray | slice) -> float:
    labels, first, second = sample
    return auc(labels[rows], first[rows]) - auc(labels[rows], second[rows])


def _erfinv(values: np.ndarray) -> np.ndarray:
    from scipy.special import erfinv

    inverse: np.ndarray = erfinv(values)
    return inverse


if __name__ == "__main__":
    main(sys.argv[1:])
