# SPDX-License-Identifier: Apache-2.0
"""Operators of a model file and their classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# classes of operators with MACs; the fit has no rows of "matmul", a product of two activations
POINTWISE, CONV3X3, DEPTHWISE, CONV, FULLY_CONNECTED, MATMUL = (
    "pointwise",
    "conv3x3",
    "depthwise",
    "conv",
    "fully_connected",
    "matmul",
)
ELEMENTWISE, MOVEMENT, UNFITTED, UNKNOWN = "elementwise", "movement", "unfitted", "unknown"


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator: its name in the file, its class, MACs, parameters, and the activation elements that it reads and writes."""

    name: str
    kind: str
    macs: int
    parameters: int
    elements: int


def conv_kind(kernel: Sequence[int], strides: Sequence[int], groups: int, channels: int) -> str:
    """Return the class of a convolution with weights: a stride of 1 lets a 3x3 kernel use Winograd's algorithm."""
    if groups > 1:
        return DEPTHWISE if groups == channels else CONV
    if all(size == 1 for size in kernel):
        return POINTWISE
    is_winograd = len(kernel) == 2 and all(size == 3 for size in kernel) and all(stride == 1 for stride in strides)  # noqa: PLR2004  (3x3, in 2D)
    return CONV3X3 if is_winograd else CONV


def linear_kind(vectors: int) -> str:
    """Return the class of a product with constant weights: of many vectors it is a pointwise convolution."""
    return FULLY_CONNECTED if vectors <= 1 else POINTWISE
