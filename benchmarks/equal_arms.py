# SPDX-License-Identifier: Apache-2.0
"""How often the verdict on distillation errs where there is nothing to see: distilled students and both baselines are equally good.

Each simulation draws speakers (or samples without groups), samples and seeds. A method has its own strengths: it is better or worse on
single samples, on single speakers, and with single seeds, but over all of them the methods are equal. The baseline is chosen on a
validation split with the same seeds, and ``judge_distillation`` judges, as in a build. Prints the share of HELPS and of HURTS in percent,
with the standard error of the former. Exits with 1 if HELPS is above the bar.

    python benchmarks/equal_arms.py [simulations]
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import numpy as np

from edgekd.domain.recipe import BASELINES, DISTILLED
from edgekd.stats.distillation import HELPS, HURTS, judge_distillation
from edgekd.stats.scores import ModelScores

SIMULATIONS, BAR = 2000, 0.04
METHODS = (DISTILLED, *BASELINES)
# standard deviations of a logistic score, whose own noise is 1: speakers, a method's of a speaker, of a sample, of a seed
OF_GROUP, OF_METHOD_AND_GROUP, OF_METHOD_AND_SAMPLE, OF_SEED = 0.5, 0.2, 0.5, 0.15
HARDNESS = 1.5  # of samples, for all methods alike


@dataclass(frozen=True, slots=True)
class Scenario:
    """The sizes of an experiment; without groups each sample is one of its own. ``mean`` is the score of a sample of mean hardness."""

    seeds: int
    samples: int
    groups: int | None
    validation: int
    mean: float


SCENARIOS = (
    Scenario(3, 720, 6, 720, 4.0),
    Scenario(5, 720, 6, 720, 4.0),
    Scenario(10, 720, 6, 720, 4.0),
    Scenario(5, 900, 30, 300, 4.0),
    Scenario(3, 3000, None, 385, 3.0),
    Scenario(5, 3000, None, 385, 3.0),
    Scenario(5, 300, None, 100, 2.0),
    Scenario(3, 2000, None, 2000, 7.0),
)


def draw_scores(scenario: Scenario, generator: np.random.Generator) -> tuple[dict[str, np.ndarray], dict[str, list[float]], np.ndarray]:
    """Return right and wrong (S, n) and the validation accuracies (S) of each method, and the groups (n,)."""
    groups = np.arange(scenario.samples) if scenario.groups is None else np.arange(scenario.samples) % scenario.groups
    of_seed = {method: generator.normal(0, OF_SEED, (scenario.seeds, 1)) for method in METHODS}

    def correct(samples: int, index: np.ndarray) -> dict[str, np.ndarray]:
        count = index.max() + 1
        shared = scenario.mean + generator.normal(0, HARDNESS, samples) + generator.normal(0, OF_GROUP, count)[index]
        result = {}
        for method in METHODS:
            of_method = generator.normal(0, OF_METHOD_AND_SAMPLE, samples) + generator.normal(0, OF_METHOD_AND_GROUP, count)[index]
            result[method] = shared + of_method + of_seed[method] + generator.logistic(size=(scenario.seeds, samples)) > 0
        return result

    validation = correct(scenario.validation, np.arange(scenario.validation) % (scenario.groups or scenario.validation))
    return correct(scenario.samples, groups), {method: hits.mean(1).tolist() for method, hits in validation.items()}, groups


def judge(scenario: Scenario, generator: np.random.Generator) -> str:
    """Return the verdict of one experiment."""
    correct, validation, groups = draw_scores(scenario, generator)
    outputs = np.zeros((scenario.samples, 1))
    scores = {
        method: [ModelScores(float(row.mean()), outputs, row.astype(float), None, "any") for row in rows]
        for method, rows in correct.items()
    }
    teacher = scores[DISTILLED][0]
    labels = np.zeros((scenario.samples, 1))  # of no classes: those have notes only
    return str(judge_distillation(scores, validation, teacher, labels, groups, calibrated=False)["outcome"])


def shares(scenario: Scenario, simulations: int, seed: int = 0) -> tuple[float, float]:
    """Return how often HELPS and HURTS are said."""
    generator = np.random.default_rng(seed)
    verdicts = [judge(scenario, generator) for _ in range(simulations)]
    return verdicts.count(HELPS) / simulations, verdicts.count(HURTS) / simulations


def main() -> int:
    """Simulate, print, and return the exit code."""
    simulations = int(sys.argv[1]) if len(sys.argv) > 1 else SIMULATIONS
    is_missed = False
    print("seeds  samples  groups  validation  accuracy   HELPS         HURTS")
    for scenario in SCENARIOS:
        accuracy = np.mean([draw_scores(scenario, np.random.default_rng(seed))[0][DISTILLED].mean() for seed in range(20)])
        helps, hurts = shares(scenario, simulations)
        error = math.sqrt(helps * (1 - helps) / simulations)
        groups = scenario.groups or "none"
        sizes = f"{scenario.seeds:5}  {scenario.samples:7}  {groups:>6}  {scenario.validation:10}  {100 * accuracy:6.1f} %"
        print(f"{sizes}   {100 * helps:.1f} +- {100 * error:.1f}   {100 * hurts:.1f}", flush=True)
        is_missed |= helps > BAR
    return int(is_missed)


if __name__ == "__main__":
    sys.exit(main())
