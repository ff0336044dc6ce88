# SPDX-License-Identifier: Apache-2.0
"""Losses of tensors inside the networks: pure functions of a tapped tensor of the student and the matching one of the teacher.

A new one is one function here, one line in ``FEATURES``, and its kind with its options in ``edgekd.domain.losses``.
Tensors are converted to float32 at least.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekd.kd.losses.logits import mse, to_float32

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

_EPSILON = 1e-12  # keeps quotients, roots and logarithms finite at 0


def attention(student: Tensor, teacher: Tensor, over: str = "channels") -> Tensor:
    """Return the difference of the attention maps of student and teacher.

    ``channels``: ``mean over samples of ||q(student) - q(teacher)||^2``, where ``q`` is the map of squares summed over the
    channels, flattened and scaled to length 1. The larger map is first averaged to the size of the smaller one.
    ``heads``: rows of attention probabilities, averaged over heads: ``mean over samples and queries of KL(teacher || student)``.
    The published code for ``channels`` averages over positions too: its weight of 1000 at 8x8 positions is 16 here.

    Shapes:
        channels: (n, channels, ...) each, with the same number of axes; heads: (n, heads, queries, keys) each, with the same last
        two axes; result: ().

    Source:
        Channels: Zagoruyko and Komodakis, arXiv 1612.03928, equation 2. Heads: Wang et al., arXiv 2002.10957, equation 2,
        averaged over heads, whose numbers may differ.
    """
    from torch.nn.functional import kl_div, normalize

    student, teacher = to_float32(student), to_float32(teacher)
    if over == "heads":
        student, teacher = (heads.mean(dim=1).clamp(min=_EPSILON).log() for heads in (student, teacher))
        queries = student.shape[0] * student.shape[1]
        return kl_div(student, teacher, reduction="sum", log_target=True) / queries
    maps = match_resolution(student.square().sum(dim=1, keepdim=True), teacher.square().sum(dim=1, keepdim=True))
    student, teacher = (normalize(attention_map.flatten(1), dim=1) for attention_map in maps)
    return (student - teacher).square().sum(dim=1).mean()


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of two feature maps, the student's after its adapter.

    The larger map is first averaged to the size of the smaller one.

    Shapes:
        student, teacher: (n, channels) or (n, channels, ...), channels equal; result: ().

    Source:
        Romero et al., arXiv 1412.6550, equation 3.
    """
    return mse(*match_resolution(student, teacher))


def hidden(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of the hidden states of a sequence, the student's after its adapter.

    Shapes:
        student, teacher: (n, tokens, width), all equal; result: ().

    Source:
        Jiao et al., arXiv 1909.10351, equation 8.
    """
    return mse(student, teacher)


def relation(student: Tensor, teacher: Tensor, distance_weight: float = 1.0, angle_weight: float = 2.0) -> Tensor:
    """Return the difference of the relations between the samples of a batch: pairwise distances, and the angles of all triplets.

    ``distance_weight * H(d_student, d_teacher) + angle_weight * H(a_student, a_teacher)`` with the Huber loss H, distances d
    as multiples of their mean in the batch, and cosines a of the angles at each sample. Widths need not be equal. Tensors with
    more than two axes are averaged over the further ones first.

    Shapes:
        student, teacher: (n, channels, ...) with n > 1; result: ().

    Source:
        Park et al., arXiv 1904.05068, equations 5 to 10 (the weights are those of its section 4, as 25 : 50).
    """
    from torch.nn.functional import smooth_l1_loss

    student, teacher = _points(student), _points(teacher)
    distance = smooth_l1_loss(_distances(student), _distances(teacher))
    angle = smooth_l1_loss(_angles(student), _angles(teacher))
    return distance_weight * distance + angle_weight * angle


def block(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference between the outputs of a block of the student and of the teacher, both for the teacher's input.

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


def match_resolution(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return two feature maps (n, channels, ...), each spatial axis averaged to the smaller of the two sizes."""
    from torch.nn import functional

    shape = tuple(min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True))
    pool = {1: functional.adaptive_avg_pool1d, 2: functional.adaptive_avg_pool2d}.get(len(shape))
    student, teacher = (item if pool is None or item.shape[2:] == shape else pool(item, shape) for item in (student, teacher))  # type: ignore[arg-type]  # a tuple of its length
    return student, teacher


def _points(features: Tensor) -> Tensor:
    """Return features in float32 at least, averaged over all axes behind the channels. Shapes: (n, channels, ...) -> (n, channels)."""
    features = to_float32(features)
    return features.flatten(2).mean(dim=2) if features.ndim > 2 else features  # noqa: PLR2004  (n, channels)


def _distances(points: Tensor) -> Tensor:
    """Return the Euclidean distance of each pair, as multiples of their mean. Shapes: (n, width) -> (n, n)."""
    squares = (points[:, None] - points[None]).square().sum(dim=2)
    is_apart = squares > 0
    distances = squares.clamp(min=_EPSILON).sqrt() * is_apart  # the root has no gradient at 0
    return distances / (distances.sum() / is_apart.sum().clamp(min=1)).clamp(min=_EPSILON)


def _angles(points: Tensor) -> Tensor:
    """Return the cosine of the angle at j between i and k. Shapes: (n, width) -> (n, n, n)."""
    from torch.nn.functional import normalize

    directions = normalize(points[None] - points[:, None], dim=2)
    return directions @ directions.transpose(1, 2)
