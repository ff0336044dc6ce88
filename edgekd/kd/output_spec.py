# SPDX-License-Identifier: Apache-2.0
"""What a network's answers are: one softmax, several, a yes or no for each label, or numbers; each is told to the losses as rows.

A loss sees (m, C) logits and (m,) labels. Several heads, or the tokens of a sequence, are rows below each other; a label of a
multi-label answer is a softmax over two classes, ``softmax([0, z]) = [1 - sigmoid(z), sigmoid(z)]``, so that every loss of classes
has its meaning there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekd.kd.losses import UNLABELLED

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

MULTICLASS, MULTILABEL, REGRESSION = "multiclass", "multilabel", "regression"


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """The recipe's ``student.task``, and ``heads``: the widths of several softmaxes side by side, none for one."""

    task: str = MULTICLASS
    heads: tuple[int, ...] = ()

    @property
    def is_single_softmax(self) -> bool:
        """Return whether it is one softmax, of which confidence and calibration have a meaning."""
        return self.task == MULTICLASS and not self.heads


MULTICLASS_OUTPUT = OutputSpec()


def logit_rows(spec: OutputSpec, answers: Tensor) -> list[Tensor]:
    """Return answers as logits that the losses take: one tensor (m, C) for each width of head.

    Shapes:
        answers: (n, C), (n, sum of heads), (n, labels) or (n, numbers).
    """
    import torch

    if spec.task == MULTILABEL:
        return [torch.stack([torch.zeros_like(answers), answers], dim=-1).reshape(-1, 2)]
    if not spec.heads:
        return [answers]
    if len(set(spec.heads)) == 1:
        return [answers.reshape(-1, spec.heads[0])]
    return list(torch.split(answers, list(spec.heads), dim=1))


def label_rows(spec: OutputSpec, labels: Tensor) -> list[Tensor]:
    """Return labels as :func:`rows` returns answers. Shapes: (n,), (n, heads), (n, labels) or (n, numbers) -> (m,) each."""
    if spec.task == REGRESSION or spec.is_single_softmax:
        return [labels]
    if spec.task == MULTILABEL or len(set(spec.heads)) == 1:
        return [labels.reshape(-1)]
    return list(labels.unbind(dim=1))


def count_correct(spec: OutputSpec, answers: Tensor, labels: Tensor) -> tuple[int, int]:
    """Return how many classes are right, and how many labels there are; numbers have no classes."""
    if spec.task == REGRESSION:
        return 0, 0
    right = labelled = 0
    for found, wanted in zip(logit_rows(spec, answers), label_rows(spec, labels), strict=True):
        right += int((found.argmax(dim=1) == wanted).sum())
        labelled += int((wanted != UNLABELLED).sum())
    return right, labelled


def parse_labels(spec: OutputSpec, labels: np.ndarray) -> Tensor | None:
    """Return stored labels as training takes them, or None if they are none of this spec (a metric's own)."""
    import torch

    axes = 1 if spec.is_single_softmax else 2
    if spec.task == REGRESSION and labels.dtype.kind in "iuf":
        found = torch.from_numpy(labels).float()
        return found[:, None] if found.ndim == 1 else found
    if labels.ndim != axes or (labels.dtype.kind not in "iu" and spec.task != MULTILABEL):
        return None
    return torch.from_numpy(labels).long()


def label_problem(spec: OutputSpec, labels: np.ndarray, width: int) -> str | None:
    """Return why labels do not fit answers of a width, or None; of one softmax ``inspect`` knows more itself."""
    import numpy as np

    if spec.is_single_softmax:
        return None
    given = f"labels are {labels.dtype.name} {list(labels.shape[1:])} each"
    if spec.task == REGRESSION:
        fits = labels.dtype.kind in "iuf" and (labels.shape[1:] == (width,) or (labels.ndim == 1 and width == 1))
        return None if fits else f"{given}; expected {width} numbers for {width} answers"
    if spec.task == MULTILABEL:
        fits = labels.shape[1:] == (width,) and bool(np.isin(labels, (UNLABELLED, 0, 1)).all())
        return None if fits else f"{given}; expected {width} of 0 and 1 (-1: not known) for {width} answers"
    if sum(spec.heads) != width:
        return f"student.heads add up to {sum(spec.heads)}; the student answers with {width}"
    if labels.dtype.kind not in "iu" or labels.shape[1:] != (len(spec.heads),):
        return f"{given}; expected {len(spec.heads)} class ids (-1: none), one for each of student.heads"
    above = [index for index, size in enumerate(spec.heads) if int(labels[:, index].max()) >= size]
    return f"head {above[0]} has {spec.heads[above[0]]} classes and the label {labels[:, above[0]].max()}" if above else None
