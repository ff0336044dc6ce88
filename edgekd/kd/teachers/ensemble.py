# SPDX-License-Identifier: Apache-2.0
"""Several teachers as one: the mean of their answers, which every loss can follow at every temperature."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekd.kd.losses import UNLABELLED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_LEAST = 1e-6  # of a probability, so that one teacher that is surely wrong leaves the others a share


def ensemble_logits(answers: Sequence[Tensor], weights: Sequence[float], labels: Tensor, weighting: str) -> Tensor:
    """Return the weighted mean of several teachers' logits.

    By ``weights`` alone, or by ``confidence``: then a teacher's weight for a sample is multiplied by
    ``(1 - (1 / p) / sum of all teachers' 1 / p) / (teachers - 1)``, where ``p`` is the probability that it gives the label, or
    its own answer where there is none. The mean of logits is the geometric mean of what they say, at any temperature.

    Shapes:
        answers: (n, C) each; labels: (n,) int64, -1 where there is none; result: (n, C).

    Source:
        Zhang et al., arXiv 2201.00007, equation 3 (with ``exp(cross-entropy) = 1 / p``).
    """
    import torch

    stacked = torch.stack(tuple(answers))
    shares = torch.tensor(weights).reshape(-1, 1).repeat(1, len(labels))
    if weighting == "confidence":
        probabilities = stacked.softmax(dim=2)
        classes = torch.where(labels == UNLABELLED, probabilities.argmax(dim=2), labels)
        doubt = 1 / probabilities.gather(2, classes[:, :, None])[:, :, 0].clamp(min=_LEAST)
        shares = shares * (1 - doubt / doubt.sum(dim=0)) / (len(answers) - 1)
    return (shares / shares.sum(dim=0))[:, :, None].mul(stacked).sum(dim=0)
