# SPDX-License-Identifier: Apache-2.0
"""Losses: pure functions of logits. A new one is one function, one line in ``LOSSES`` and its kind in ``domain.recipe``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from edgekd.domain.recipe import Loss

UNLABELLED = -1  # the label of a sample that has none


def ce(student: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of the labels: ``mean over labelled samples of -log softmax(student)[label]``.

    With smoothing s, the label's share becomes ``1 - s + s / C`` and every other class's ``s / C``.
    A batch without a label gives 0.

    Shapes:
        student: (n, C) logits; labels: (n,) int64, -1 where there is none; result: ().

    Source:
        Smoothing: Szegedy et al., arXiv 1512.00567, section 7.
    """
    from torch.nn.functional import cross_entropy

    summed = cross_entropy(_wide(student), labels, ignore_index=UNLABELLED, reduction="sum", label_smoothing=label_smoothing)
    return summed / (labels != UNLABELLED).sum().clamp(min=1)


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the softened divergence of student from teacher.

    ``T^2 * mean over samples of KL(softmax(teacher / T) || softmax(student / T))``: summed over classes, so that the
    number of classes does not weaken it, and times T^2, so that its gradient keeps its size as T grows. At T = 1 its
    gradient is that of cross-entropy to the teacher's soft labels. ``kl(p, p, T) = 0``.

    Shapes:
        student, teacher: (n, C) logits; result: ().

    Source:
        Hinton, Vinyals, Dean, arXiv 1503.02531, section 2.
    """
    from torch.nn.functional import kl_div, log_softmax

    found = log_softmax(_wide(student) / temperature, dim=1)
    wanted = log_softmax(_wide(teacher) / temperature, dim=1)
    return kl_div(found, wanted, reduction="batchmean", log_target=True) * temperature**2


LOSSES: Mapping[str, Callable[[Loss, Tensor, Tensor, Tensor], Tensor]] = {
    "ce": lambda _, student, __, labels: ce(student, labels),
    "kl": lambda loss, student, teacher, _: kl(student, teacher, _temperature(loss)),
}


def total(losses: Sequence[Loss], student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Return the weighted sum of losses.

    Shapes:
        student, teacher: (n, C) logits; labels: (n,) int64, -1 where there is none; result: ().
    """
    terms = [loss.weight * LOSSES[loss.kind](loss, student, teacher, labels) for loss in losses]
    return sum(terms[1:], start=terms[0])


def _temperature(loss: Loss) -> float:
    if loss.temperature is None:
        raise ValueError(f"a loss of kind '{loss.kind}' needs a temperature")  # the stage refuses such a recipe before
    return loss.temperature


def _wide(logits: Tensor) -> Tensor:
    """Return logits in float32 at least: softmax and its logarithm lose too much in half precision."""
    import torch

    return logits.to(torch.promote_types(logits.dtype, torch.float32))
