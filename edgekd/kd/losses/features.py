# SPDX-License-Identifier: Apache-2.0
"""Losses of tensors inside the networks: pure functions of one tap of the student and the teacher's beside it.

A new one is one function, one line in ``FEATURES`` and its kind in ``domain.recipe``. Tensors are widened to float32 at least.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekd.kd.losses.logits import mse, to_float32

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

_STILL = 1e-12  # a distance of nothing has no direction


def attention(student: Tensor, teacher: Tensor, over: str = "channels") -> Tensor:
    """Return how differently student and teacher attend.

    ``channels``: ``mean over samples of ||q(student) - q(teacher)||^2``, where ``q`` is the map of squares summed over the
    channels, flattened and scaled to length 1. A larger map is first averaged down to the smaller.
    ``heads``: rows of attention probabilities, averaged over heads: ``mean over samples and queries of KL(teacher || student)``.
    The published code of the first averages over positions too: its weight of 1000 at 8x8 positions is 16 here.

    Shapes:
        channels: (n, channels, ...) each, as many axes in both; heads: (n, heads, queries, keys), both last axes equal; result: ().

    Source:
        Channels: Zagoruyko and Komodakis, arXiv 1612.03928, equation 2. Heads: Wang et al., arXiv 2002.10957, equation 2,
        averaged over heads as these need not be as many.
    """
    from torch.nn.functional import kl_div, normalize

    student, teacher = to_float32(student), to_float32(teacher)
    if over == "heads":
        found, wanted = student.mean(dim=1).clamp(min=_STILL).log(), teacher.mean(dim=1).clamp(min=_STILL).log()
        queries = found.shape[0] * found.shape[1]
        return kl_div(found, wanted, reduction="sum", log_target=True) / queries
    maps = fitted(student.square().sum(dim=1, keepdim=True), teacher.square().sum(dim=1, keepdim=True))
    found, wanted = (normalize(item.flatten(1), dim=1) for item in maps)
    return (found - wanted).square().sum(dim=1).mean()


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of two feature maps, the student's after its adapter.

    A larger map is first averaged down to the smaller.

    Shapes:
        student, teacher: (n, channels) or (n, channels, ...), channels equal; result: ().

    Source:
        Romero et al., arXiv 1412.6550, equation 3.
    """
    return mse(*fitted(student, teacher))


def hidden(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of the hidden states of a sequence, the student's after its adapter.

    Shapes:
        student, teacher: (n, tokens, width), all equal; result: ().

    Source:
        Jiao et al., arXiv 1909.10351, equation 8.
    """
    return mse(student, teacher)


def relation(student: Tensor, teacher: Tensor, distance_weight: float = 1.0, angle_weight: float = 2.0) -> Tensor:
    """Return how differently the samples of a batch lie to each other: their distances, and the angles of all triplets.

    ``distance_weight * H(d_student, d_teacher) + angle_weight * H(a_student, a_teacher)`` with the Huber loss H, distances d
    as multiples of their mean in the batch, cosines a of the angles at each sample. Widths need not be equal. What has more
    axes is averaged over them first.

    Shapes:
        student, teacher: (n, channels, ...) with n > 1; result: ().

    Source:
        Park et al., arXiv 1904.05068, equations 5 to 10 (the weights are those of its section 4, as 25 : 50).
    """
    from torch.nn.functional import smooth_l1_loss

    found, wanted = (item.flatten(2).mean(dim=2) if item.ndim > 2 else item for item in (to_float32(student), to_float32(teacher)))  # noqa: PLR2004  (n, channels)
    distance = smooth_l1_loss(_distances(found), _distances(wanted))
    angle = smooth_l1_loss(_angles(found), _angles(wanted))
    return distance_weight * distance + angle_weight * angle


def block(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of what a block of the student makes of the teacher's input of that block, and the teacher's.

    Shapes:
        student, teacher: equal; result: ().

    Source:
        Koratana et al. (LIT), ICML 2019, equation 2.
    """
    return mse(student, teacher)


FEATURES: Mapping[str, Callable[..., Tensor]] = {
    "attention": attention,
    "block": block,
    "hidden": hidden,
    "hint": hint,
    "relation": relation,
}


def fitted(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return two feature maps (n, channels, ...), each axis of space averaged down to the smaller of both."""
    from torch.nn import functional

    shape = tuple(min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True))
    pool = {1: functional.adaptive_avg_pool1d, 2: functional.adaptive_avg_pool2d}.get(len(shape))
    found, wanted = (item if pool is None or item.shape[2:] == shape else pool(item, shape) for item in (student, teacher))  # type: ignore[arg-type]  # a tuple of its length
    return found, wanted


def _distances(points: Tensor) -> Tensor:
    """Return the Euclidean distance of each pair, as multiples of their mean. Shapes: (n, width) -> (n, n)."""
    square = (points[:, None] - points[None]).square().sum(dim=2)
    apart = square > 0
    distances = square.clamp(min=_STILL).sqrt() * apart  # the root has no gradient at 0
    return distances / (distances.sum() / apart.sum().clamp(min=1)).clamp(min=_STILL)


def _angles(points: Tensor) -> Tensor:
    """Return the cosine of the angle at j between i and k. Shapes: (n, width) -> (n, n, n)."""
    from torch.nn.functional import normalize

    towards = normalize(points[None] - points[:, None], dim=2)
    return towards @ towards.transpose(1, 2)
