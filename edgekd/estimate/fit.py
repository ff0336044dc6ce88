# SPDX-License-Identifier: Apache-2.0
"""Fit the regression of :mod:`edgekd.estimate.model` to published rows, and its bands to rows of held-out families.

Partial pooling is a ridge penalty on each effect, stronger for effects that fewer rows share, and on what distinguishes the costs of one
class of settings from those of all. A Huber weight bounds the influence of a row. Solved by Gauss-Newton steps.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekd.estimate.model import AMOUNTS, Band, Coefficients, cost_class, covariates, group, terms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import numpy as np

    from edgekd.estimate.model import Row

# Costs relative to a million pointwise MACs where no row says otherwise: Winograd halves 3x3; moving an element costs as much as ten MACs.
# That of an operator cannot be told from the rows, whose models are large: 0.2 fits them as well, but made models of some thousand MACs
# 5 to 10 times slower than they are on this project's x86 machines.
PRIOR_COSTS = (1.0, 0.5, 1.0, 1.0, 10.0, 10.0, 0.02)
HUBER = 0.25  # a residual beyond a factor of 1.28 counts linearly
STEPS, LARGEST_STEP, TOLERANCE = 25, 2.0, 1e-3
STRONGLY_POOLED = 3.0  # effects of more than one part


@dataclass(frozen=True, slots=True)
class Pooling:
    """Ridge penalties: on effects of one part, on effects of several, on costs, on what a class adds to them, and on slopes."""

    single: float = 0.5
    several: float = 3.0
    costs: float = 3.0
    class_costs: float = 3.0
    slopes: float = 10.0


POOLING = Pooling()


class Problem:
    """The design of a regression: which coefficients each row has. Coefficients are effects, costs, costs of classes, slopes."""

    def __init__(self, rows: Sequence[Row], pooling: Pooling) -> None:
        import numpy as np

        names: dict[str, int] = {}
        per_row = [[names.setdefault(term, len(names)) for term in terms(row.setting)] for row in rows]
        self.names = names
        self.classes = {name: index for index, name in enumerate(sorted({cost_class(row.setting) for row in rows}))}
        self.class_of_row = np.array([self.classes[cost_class(row.setting)] for row in rows])
        self.amounts = np.array([row.amounts for row in rows], float)
        self.covariates = np.array([covariates(row.amounts) for row in rows])
        self.log_ghz = np.log([row.setting.mhz / 1000 for row in rows])
        self.log_ms = np.log([row.ms for row in rows])
        self.counts = np.array([len(indices) for indices in per_row])
        self.columns = np.concatenate([np.array(indices) for indices in per_row])
        effects, costs = len(names), len(AMOUNTS)
        self.costs, self.by_class = effects, effects + costs
        self.slopes = self.by_class + costs * len(self.classes)
        self.size = self.slopes + self.covariates.shape[1]
        self.penalty = np.empty(self.size)
        self.penalty[:effects] = [pooling.several if "|" in name else pooling.single for name in names]
        self.penalty[names["all"]] = 1e-4
        self.penalty[effects : self.by_class] = pooling.costs
        self.penalty[self.by_class : self.slopes] = pooling.class_costs
        self.penalty[self.slopes :] = pooling.slopes
        self.prior = np.zeros(self.size)
        self.prior[effects : self.by_class] = np.log(PRIOR_COSTS)

    def start(self, warm: Coefficients | None) -> np.ndarray:
        """Return coefficients to start from: those of another fit, or the prior."""
        import numpy as np

        start = self.prior.copy()
        if warm is None:
            total = self.amounts @ np.exp(self.prior[self.costs : self.by_class])
            start[self.names["all"]] = np.median(self.log_ms + self.log_ghz - np.log(total))
            return start
        start[: self.costs] = [warm.effects.get(name, 0.0) for name in self.names]
        start[self.costs : self.by_class] = warm.costs["all"]
        for name, index in self.classes.items():
            difference = np.subtract(warm.costs.get(name, warm.costs["all"]), warm.costs["all"])
            start[self.by_class + index * len(AMOUNTS) :][: len(AMOUNTS)] = difference
        start[self.slopes :] = warm.slopes
        return start

    def linearize(self, values: np.ndarray) -> tuple[np.ndarray, Any]:
        """Return the residuals (n) of the logarithm and the Jacobian (n x coefficients, sparse) at some coefficients."""
        import numpy as np
        from scipy import sparse

        n, k = self.amounts.shape
        by_class = values[self.by_class : self.slopes].reshape(-1, k)[self.class_of_row]
        parts = np.exp(values[self.costs : self.by_class] + by_class) * self.amounts
        total = parts.sum(1)
        effects = np.add.reduceat(values[self.columns], np.concatenate([[0], np.cumsum(self.counts)[:-1]]))
        predicted = effects - self.log_ghz + np.log(total) + self.covariates @ values[self.slopes :]
        shares = (parts / total[:, None]).ravel()
        row, class_row = np.repeat(np.arange(n), k), np.repeat(self.class_of_row, k)
        cost = np.tile(np.arange(k), n)
        data = [np.ones(len(self.columns)), shares, shares, self.covariates.ravel()]
        width = self.covariates.shape[1]
        rows = [np.repeat(np.arange(n), self.counts), row, row, np.repeat(np.arange(n), width)]
        columns = [self.columns, self.costs + cost, self.by_class + class_row * k + cost, self.slopes + np.tile(np.arange(width), n)]
        matrix = sparse.csr_matrix((np.concatenate(data), (np.concatenate(rows), np.concatenate(columns))), shape=(n, self.size))
        return self.log_ms - predicted, matrix


def fit(rows: Sequence[Row], pooling: Pooling = POOLING, warm: Coefficients | None = None) -> Coefficients:
    """Return the coefficients for rows, without bands; ``warm`` are coefficients to start from, which only saves steps."""
    import numpy as np
    from scipy import linalg

    problem = Problem(rows, pooling)
    values = problem.start(warm)
    for step in range(STEPS):
        residuals, jacobian = problem.linearize(values)
        weights = np.ones(len(rows))
        if step > 2 or warm is not None:  # noqa: PLR2004  (the first residuals are those of the prior)
            weights = np.minimum(1.0, HUBER / np.maximum(np.abs(residuals), 1e-9))
        hessian = (jacobian.T @ jacobian.multiply(weights[:, None]).tocsr()).toarray() + np.diag(problem.penalty)
        gradient = jacobian.T @ (weights * residuals) - problem.penalty * (values - problem.prior)
        change = linalg.cho_solve(linalg.cho_factor(hessian, check_finite=False), gradient, check_finite=False)
        largest = float(np.abs(change).max())
        values = values + change * min(1.0, LARGEST_STEP / largest)
        if largest < TOLERANCE:
            break
    return _coefficients(problem, rows, values)


def held_out(rows: Sequence[Row], omit: Callable[[Row, Row], bool], pooling: Pooling = POOLING) -> list[tuple[Row, str, float]]:
    """Return each row with how its setting is known and its residual (log of the ratio to its estimate) from a fit without its family.

    ``omit(row, other)`` says which further rows a row is held out with, as those of its device; rows that omit the same are one fit.
    """
    whole = fit(rows, pooling)
    folds: dict[frozenset[int], list[Row]] = {}
    for row in rows:
        omitted = frozenset(index for index, other in enumerate(rows) if other.family == row.family or omit(row, other))
        folds.setdefault(omitted, []).append(row)
    results = []
    for omitted, members in folds.items():
        coefficients = fit([row for index, row in enumerate(rows) if index not in omitted], pooling, whole)
        results += [(row, coefficients.known(row.setting), residual(coefficients, row)) for row in members]
    return results


def residual(coefficients: Coefficients, row: Row) -> float:
    """Return the logarithm of the ratio of a row's latency to its estimate."""
    return math.log(row.ms) - coefficients.log_ms(row.setting, row.amounts)


def conformal_quantile(scores: Iterable[float], level: float) -> float:
    """Return the bound that a further score does not exceed with the probability of the level; infinite if there are too few scores.

    >>> conformal_quantile([1.0, 2.0, 3.0, 4.0], 0.8)
    4.0

    Source: Vovk, Gammerman, Shafer 2005; Lei et al. 2018, "Distribution-free predictive inference for regression", section 2.2: the
    ceil((n + 1) * level)-th smallest score.
    """
    ordered = sorted(scores)
    rank = math.ceil((len(ordered) + 1) * level - 1e-9)
    return math.inf if rank > len(ordered) else ordered[rank - 1]


def band(residuals: Sequence[tuple[Row, float]], level: float) -> Band:
    """Return the band of held-out residuals."""
    factor = math.exp(conformal_quantile((abs(value) for _, value in residuals), level))
    return Band(factor, len(residuals), len({row.family for row, _ in residuals}))


def _coefficients(problem: Problem, rows: Sequence[Row], values: np.ndarray) -> Coefficients:
    k = len(AMOUNTS)
    costs = values[problem.costs : problem.by_class]
    by_class = {name: costs + values[problem.by_class + index * k :][:k] for name, index in problem.classes.items()}
    settings = {row.setting.device: row.setting for row in rows}
    devices: Mapping[str, Mapping[str, Any]] = {
        str(name): {"core": item.core, "simd": item.simd, "mhz": item.mhz, "targets": item.targets}
        for name, item in sorted(settings.items(), key=lambda pair: str(pair[0]))
    }
    amounts = problem.amounts
    return Coefficients(
        effects={name: float(values[index]) for name, index in problem.names.items()},
        costs={"all": costs.tolist(), **{name: item.tolist() for name, item in by_class.items()}},
        slopes=values[problem.slopes :].tolist(),
        groups=dict(sorted(Counter(group(row.setting) for row in rows).items())),
        devices=devices,
        ranges={"macs": (float(amounts[:, :4].sum(1).min()), float(amounts[:, :4].sum(1).max()))},
        bands={},
        runtimes={},
        sources=dict(sorted(Counter(row.source for row in rows).items())),
    )
