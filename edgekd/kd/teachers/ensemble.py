# SPDX-License-Identifier: Apache-2.0
"""Several teachers as one: the weighted mean of their logits, which every loss can use at every temperature."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekd.kd.losses import UNLABELLED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_MIN_PROBABILITY = 1e-6  # so that a teacher that is confident and wrong still leaves the others a weight


def ensemble_logits(teacher_logits: Sequence[Tensor], weights: Sequence[float], labels: Tensor, weighting: str) -> Tensor:
    """Return the weighted mean of the logits of several teachers.

    With weighting ``fixed``, ``weights`` are used as they are. With ``confidence``, a teacher's weight for a sample is multiplied by
    ``(1 - (1 / p) / sum of all teachers' 1 / p) / (teachers - 1)``, where ``p`` is its probability for the label, or for the class
    that it predicts itself where there is no label. The mean of logits is the geometric mean of the probabilities, at any
    temperature.

    Shapes:
        teacher_logits: (n, C) each; labels: (n,) int64, -1 where there is none; result: (n, C).

    Source:
        Zhang et al., arXiv 2201.00007, equation 3 (with ``exp(cross-entropy) = 1 / p``).
    """
    import torch

    logits = torch.stack(tuple(teacher_logits))
    sample_weights = torch.tensor(weights).reshape(-1, 1).repeat(1, len(labels))
    if weighting == "confidence":
        probabilities = logits.softmax(dim=2)
        classes = torch.where(labels == UNLABELLED, probabilities.argmax(dim=2), labels)
        doubt = 1 / probabilities.gather(2, classes[:, :, None])[:, :, 0].clamp(min=_MIN_PROBABILITY)
        sample_weights = sample_weights * (1 - doubt / doubt.sum(dim=0)) / (len(teacher_logits) - 1)
    return (sample_weights / sample_weights.sum(dim=0))[:, :, None].mul(logits).sum(dim=0)
