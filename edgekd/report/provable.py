# SPDX-License-Identifier: Apache-2.0
"""What an evaluation set can prove about a drop of accuracy, and warnings about budgets that ask for more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekd.domain.units import fraction_to_pp

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from edgekd.plan import Plan
    from edgekd.ports import CompletedStep


def budget_warnings(plan: Plan, completed: Mapping[str, CompletedStep]) -> list[str]:
    """Return a warning for each target whose accuracy budget is tighter than the evaluation set can prove.

    How much a metric or a score of the user varies is not known before training, so there is no warning for these.
    """
    import numpy as np

    from edgekd.stats import paired

    evaluate = plan.recipe.evaluate
    limits = {target.name: plan.recipe.overrides_for(target.name).budget.max_accuracy_drop_pp for target in plan.targets}
    if evaluate.metric != "top1" or evaluate.score is not None or all(limit is None for limit in limits.values()):
        return []
    groups = np.load(completed["inspect"].entry.artifacts["evaluation.groups.npy"].path, allow_pickle=False)
    sizes = np.unique(groups, return_counts=True)[1]
    best, usual = map(fraction_to_pp, paired.provable_drop(sizes))
    return [
        f"{name}: {_provable(sizes, best, usual)}; the budget is max_accuracy_drop_pp = {limit:g}: {_prediction(sizes, limit, best)}"
        for name, limit in limits.items()
        if limit is not None and limit < usual
    ]


def _provable(sizes: np.ndarray, best: float, usual: float) -> str:
    """Return what an evaluation set with groups of these sizes (G,) can prove, in points."""
    from edgekd.stats.paired import ASSUMED_CORRELATION

    samples, groups = int(sizes.sum()), len(sizes)
    if groups == 1 and samples > 1:
        return f"with {samples} evaluation samples in one group, no drop can be proved"
    if groups == samples:
        size, assumption = f"{samples} evaluation samples", "if 5 % of predictions differ"
    else:
        size = f"{samples} evaluation samples in {groups} groups"
        assumption = f"if 5 % of predictions differ and those of a group correlate by {ASSUMED_CORRELATION:g}"
    return f"with {size}, a drop of less than {usual:.2f} pp cannot be proved {assumption} ({best:.2f} pp if none differs)"


def _prediction(sizes: np.ndarray, limit: float, best: float) -> str:
    if limit < best and sizes.max() == 1:
        return "only a student that is better than its teacher can PASS"
    return "the verdict may be INCONCLUSIVE"
