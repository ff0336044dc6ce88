# SPDX-License-Identifier: Apache-2.0
"""Losses by their names in a recipe, and their weighted sum."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from edgekd.domain.losses import TAPPED
from edgekd.kd.losses.logits import UNLABELLED, ce, dist, dkd, hard, kl, mse, squared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from edgekd.domain.losses import Loss

__all__ = ["LOSSES", "UNLABELLED", "ce", "learns_unlabelled", "loss_inputs", "total_loss"]

LOSSES: Mapping[str, Callable[..., Tensor]] = {
    "ce": ce,
    "dist": dist,
    "dkd": dkd,
    "hard": hard,
    "kl": kl,
    "mse": mse,
    "squared": squared,
}


def total_loss(losses: Sequence[Loss], student: Tensor, answers: Mapping[str, Tensor | None], labels: Tensor, epoch: int = 0) -> Tensor:
    """Return the weighted sum of the losses of answers that count in an epoch, 0 if none does.

    A loss follows the answers of its own teacher.

    Shapes:
        student, each of answers: (n, C) logits; labels: (n,) int64, -1 where there is none; result: ().
    """
    terms = []
    for loss in losses:
        if loss.kind in TAPPED or not loss.counts_in(epoch):
            continue
        known = {"student": student, "teacher": answers[loss.teacher], "labels": labels}
        needed = {name: known[name] for name in loss_inputs(loss.kind)}
        terms.append(float(loss.weight) * LOSSES[loss.kind](**needed, **loss.options))
    return sum(terms[1:], start=terms[0]) if terms else student.new_zeros(())


def loss_inputs(kind: str) -> Iterable[str]:
    """Return which of ``student``, ``teacher`` and ``labels`` a loss takes; one of tapped tensors takes none."""
    return () if kind in TAPPED else inspect.signature(LOSSES[kind]).parameters.keys() & {"student", "teacher", "labels"}


def learns_unlabelled(terms: Iterable[Loss]) -> bool:
    """Return whether a loss can learn from samples without labels."""
    return any("labels" not in loss_inputs(term.kind) for term in terms)
