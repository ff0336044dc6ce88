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

CLASSES, LABELS, NUMBERS = "classes", "labels", "numbers"


@dataclass(frozen=True, slots=True)
class Form:
    """The recipe's ``student.answers``, and ``heads``: the widths of several softmaxes side by side, none for one."""

    kind: str = CLASSES
    heads: tuple[int, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Return whether it is one softmax, of which confidence and calibration have a meaning."""
        return self.kind == CLASSES and not self.heads


PLAIN = Form()


def rows(form: Form, answers: Tensor) -> list[Tensor]:
    """Return answers as logits that the losses take: one tensor (m, C) for each width of head.

    Shapes:
        answers: (n, C), (n, sum of heads), (n, labels) or (n, numbers).
    """
    import torch

    if form.kind == LABELS:
        return [torch.stack([torch.zeros_like(answers), answers], dim=-1).reshape(-1, 2)]
    if not form.heads:
        return [answers]
    if len(set(form.heads)) == 1:
        return [answers.reshape(-1, form.heads[0])]
    return list(torch.split(answers, list(form.heads), dim=1))


def label_rows(form: Form, labels: Tensor) -> list[Tensor]:
    """Return labels as :func:`rows` returns answers. Shapes: (n,), (n, heads), (n, labels) or (n, numbers) -> (m,) each."""
    if form.kind == NUMBERS or form.is_plain:
        return [labels]
    if form.kind == LABELS or len(set(form.heads)) == 1:
        return [labels.reshape(-1)]
    return list(labels.unbind(dim=1))


def counted(form: Form, answers: Tensor, labels: Tensor) -> tuple[int, int]:
    """Return how many classes are right, and how many labels there are; numbers have no classes."""
    if form.kind == NUMBERS:
        return 0, 0
    right = labelled = 0
    for found, wanted in zip(rows(form, answers), label_rows(form, labels), strict=True):
        right += int((found.argmax(dim=1) == wanted).sum())
        labelled += int((wanted != UNLABELLED).sum())
    return right, labelled


def read(form: Form, labels: np.ndarray) -> Tensor | None:
    """Return stored labels as training takes them, or None if they are none of this form (a metric's own)."""
    import torch

    axes = 1 if form.is_plain else 2
    if form.kind == NUMBERS and labels.dtype.kind in "iuf":
        found = torch.from_numpy(labels).float()
        return found[:, None] if found.ndim == 1 else found
    if labels.ndim != axes or (labels.dtype.kind not in "iu" and form.kind != LABELS):
        return None
    return torch.from_numpy(labels).long()


def problem(form: Form, labels: np.ndarray, width: int) -> str | None:
    """Return why labels do not fit answers of a width, or None; of one softmax ``inspect`` knows more itself."""
    import numpy as np

    if form.is_plain:
        return None
    given = f"labels are {labels.dtype.name} {list(labels.shape[1:])} each"
    if form.kind == NUMBERS:
        fits = labels.dtype.kind in "iuf" and (labels.shape[1:] == (width,) or (labels.ndim == 1 and width == 1))
        return None if fits else f"{given}; expected {width} numbers for {width} answers"
    if form.kind == LABELS:
        fits = labels.shape[1:] == (width,) and bool(np.isin(labels, (UNLABELLED, 0, 1)).all())
        return None if fits else f"{given}; expected {width} of 0 and 1 (-1: not known) for {width} answers"
    if sum(form.heads) != width:
        return f"student.heads add up to {sum(form.heads)}; the student answers with {width}"
    if labels.dtype.kind not in "iu" or labels.shape[1:] != (len(form.heads),):
        return f"{given}; expected {len(form.heads)} class ids (-1: none), one for each of student.heads"
    above = [index for index, size in enumerate(form.heads) if int(labels[:, index].max()) >= size]
    return f"head {above[0]} has {form.heads[above[0]]} classes and the label {labels[:, above[0]].max()}" if above else None
