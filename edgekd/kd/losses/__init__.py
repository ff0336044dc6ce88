# SPDX-License-Identifier: Apache-2.0
"""The registry of losses: functions of logits by their names in a recipe, and their weighted sum."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from edgekd.domain.losses import TAPPED
from edgekd.kd.losses.logits import UNLABELLED, ce, dist, dkd, hard, kl, mse, mse_labels

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
    "mse_labels": mse_labels,
}


def total_loss(
    losses: Sequence[Loss], student: Tensor, teacher_logits: Mapping[str, Tensor | None], labels: Tensor, epoch: int = 0
) -> Tensor:
    """Return the weighted sum of the losses of logits that are active in an epoch (from 0), 0 if none is.

    ``teacher_logits`` maps the names of ``domain.losses.TEACHERS`` to logits; each loss follows the teacher that it names.

    Shapes:
        student, each of teacher_logits: (n, C) logits; labels: (n,) int64, -1 where there is none; result: ().
    """
    values = []
    for loss in losses:
        if loss.kind in TAPPED or not loss.is_active_in(epoch):
            continue
        tensors = {"student": student, "teacher": teacher_logits[loss.teacher], "labels": labels}
        arguments = {name: tensors[name] for name in loss_inputs(loss.kind)}
        values.append(float(loss.weight) * LOSSES[loss.kind](**arguments, **loss.options))
    return sum(values[1:], start=values[0]) if values else student.new_zeros(())


def loss_inputs(kind: str) -> Iterable[str]:
    """Return which of ``student``, ``teacher`` and ``labels`` a loss takes; one of tapped tensors takes none."""
    return () if kind in TAPPED else inspect.signature(LOSSES[kind]).parameters.keys() & {"student", "teacher", "labels"}


def learns_unlabelled(losses: Iterable[Loss]) -> bool:
    """Return whether one of the losses can learn from samples without labels."""
    return any("labels" not in loss_inputs(loss.kind) for loss in losses)
