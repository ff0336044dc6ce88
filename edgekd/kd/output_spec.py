# SPDX-License-Identifier: Apache-2.0
"""What the outputs of a network mean: one softmax, several, independent labels, or numbers. The losses get each as rows of logits.

A loss takes (m, C) logits and (m,) labels. Several heads of equal width, or the tokens of a sequence, become further rows. Each
label of a multi-label output becomes a softmax over two classes, ``softmax([0, z]) = [1 - sigmoid(z), sigmoid(z)]``, so that every
loss of classes applies to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekd.kd.losses import UNLABELLED

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

TORCH_IGNORED = -100  # the label that torch's cross-entropy ignores
MULTICLASS, MULTILABEL, REGRESSION = "multiclass", "multilabel", "regression"


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """The recipe's ``student.task``, and ``heads``: the widths of several softmaxes side by side (empty for a single one)."""

    task: str = MULTICLASS
    heads: tuple[int, ...] = ()

    @property
    def is_single_softmax(self) -> bool:
        """Return whether the output is one softmax, for which confidence and calibration are defined."""
        return self.task == MULTICLASS and not self.heads


MULTICLASS_OUTPUT = OutputSpec()


def logit_rows(spec: OutputSpec, outputs: Tensor) -> list[Tensor]:
    """Return outputs as logits that the losses take: one tensor (m, C), or one per head if their widths differ.

    Shapes:
        outputs: (n, C), (n, sum of heads), (n, labels) or (n, numbers).
    """
    import torch

    if spec.task == MULTILABEL:
        return [torch.stack([torch.zeros_like(outputs), outputs], dim=-1).reshape(-1, 2)]
    if not spec.heads:
        return [outputs]
    if len(set(spec.heads)) == 1:
        return [outputs.reshape(-1, spec.heads[0])]
    return list(torch.split(outputs, list(spec.heads), dim=1))


def label_rows(spec: OutputSpec, labels: Tensor) -> list[Tensor]:
    """Return labels in the order of :func:`logit_rows`. Shapes: (n,), (n, heads), (n, labels) or (n, numbers) -> (m,) each."""
    if spec.task == REGRESSION or spec.is_single_softmax:
        return [labels]
    if spec.task == MULTILABEL or len(set(spec.heads)) == 1:
        return [labels.reshape(-1)]
    return list(labels.unbind(dim=1))


def count_correct(spec: OutputSpec, outputs: Tensor, labels: Tensor) -> tuple[int, int]:
    """Return the number of correct predictions and the number of labels; (0, 0) for regression."""
    if spec.task == REGRESSION:
        return 0, 0
    correct = labelled = 0
    for logits, targets in zip(logit_rows(spec, outputs), label_rows(spec, labels), strict=True):
        correct += int((logits.argmax(dim=1) == targets).sum())
        labelled += int((targets != UNLABELLED).sum())
    return correct, labelled


def sample_scores(spec: OutputSpec, outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the share of each sample's labels that are predicted, (n,) float64; nan for a sample without one, and for regression."""
    import torch

    hits = torch.zeros(len(outputs), dtype=torch.float64)
    labelled = torch.zeros_like(hits)
    if spec.task != REGRESSION:
        for logits, targets in zip(logit_rows(spec, outputs), label_rows(spec, labels), strict=True):
            hits += (logits.argmax(dim=1) == targets).reshape(len(outputs), -1).sum(dim=1)
            labelled += (targets != UNLABELLED).reshape(len(outputs), -1).sum(dim=1)
    return hits / labelled


def parse_labels(spec: OutputSpec, labels: np.ndarray) -> Tensor | None:
    """Return stored labels as training takes them, or None if they do not fit the spec (they are for a metric of the user's)."""
    import torch

    axes = 1 if spec.is_single_softmax else 2
    if spec.task == REGRESSION and labels.dtype.kind in "iuf":
        numbers = torch.from_numpy(labels).float()
        return numbers[:, None] if numbers.ndim == 1 else numbers
    if labels.ndim != axes or (labels.dtype.kind not in "iu" and spec.task != MULTILABEL):
        return None
    return torch.from_numpy(labels).long()


def below_range_problem(spec: OutputSpec, labels: np.ndarray) -> str | None:
    """Return why labels that mean no class are not marked as edgekd reads them, or None.

    There is one word for it, -1. Others, as torch's ``ignore_index = -100``, would count as labels in scores of the user's.
    """
    if spec.task == REGRESSION or labels.dtype.kind not in "if" or not len(labels) or labels.min() >= UNLABELLED:
        return None
    count, lowest = int((labels < UNLABELLED).sum()), labels.min()
    more = f" ({count} labels are below -1)" if count > 1 else ""
    hint = "; replace torch's -100: labels[labels == -100] = -1" if lowest == TORCH_IGNORED else ""
    return f"has the label {lowest}{more}; expected class ids from 0, or -1 where there is none{hint}"


def label_problem(spec: OutputSpec, labels: np.ndarray, width: int) -> str | None:
    """Return why labels do not fit outputs of a width, or None; ``inspect`` itself checks those of a single softmax."""
    import numpy as np

    if spec.is_single_softmax:
        return None
    description = f"labels are {labels.dtype.name} {list(labels.shape[1:])} each"
    if spec.task == REGRESSION:
        largest = float(np.abs(labels).max(initial=0)) if labels.dtype.kind in "iuf" else 0.0
        if largest > float(np.finfo(np.float32).max):
            return f"has the number {largest:g}; expected numbers in the range of float32, which training computes in"
        fits = labels.dtype.kind in "iuf" and (labels.shape[1:] == (width,) or (labels.ndim == 1 and width == 1))
        return None if fits else f"{description}; expected {width} numbers for {width} outputs"
    if spec.task == MULTILABEL:
        others = labels[~np.isin(labels, (UNLABELLED, 0, 1))]
        if labels.shape[1:] == (width,) and not len(others):
            return None
        value = f", {others[0]:g} among them" if len(others) else ""
        return f"{description}{value}; expected {width} of 0 and 1 (-1: unknown) for {width} outputs"
    if sum(spec.heads) != width:
        return f"student.heads add up to {sum(spec.heads)}; the student has {width} outputs"
    if labels.dtype.kind not in "iu" or labels.shape[1:] != (len(spec.heads),):
        return f"{description}; expected {len(spec.heads)} class ids (-1: none), one for each of student.heads"
    above = [index for index, size in enumerate(spec.heads) if int(labels[:, index].max()) >= size]
    return f"head {above[0]} has {spec.heads[above[0]]} classes and the label {labels[:, above[0]].max()}" if above else None
