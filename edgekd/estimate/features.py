# SPDX-License-Identifier: Apache-2.0
"""What a model amounts to, read from its file after fusion: MACs by operator class, parameters, activations, operators.

A convolution with its bias, its batch normalization and the activation after it is one operator, as the runtimes execute it. What only
changes a shape is none. An operator that no row of the fit has is named: without weights it widens an estimate; with weights, or if its
MACs cannot be counted, there is none.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekd.errors import StageError
from edgekd.estimate.operators import CONV, CONV3X3, DEPTHWISE, FULLY_CONNECTED, MATMUL, POINTWISE, UNFITTED, UNKNOWN, Operator

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Features:
    """What a model amounts to. ``macs`` and ``counts`` are by class; ``parameters`` are those of operators with MACs.

    ``unfitted`` are the names of operators that no row of the fit has; ``unknown`` those whose work cannot be counted.
    """

    macs: Mapping[str, int]
    counts: Mapping[str, int]
    parameters: int
    activation_elements: int
    activation_bytes: int
    file_bytes: int
    unfitted: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def operators(self) -> int:
        """Return the number of operators after fusion."""
        return sum(self.counts.values())

    def amounts(self) -> tuple[float, ...]:
        """Return the amounts of :data:`edgekd.estimate.model.AMOUNTS`: in millions, operators as a number."""
        macs = {kind: self.macs.get(kind, 0) / 1e6 for kind in (POINTWISE, CONV3X3, DEPTHWISE, CONV, FULLY_CONNECTED, MATMUL)}
        return (
            macs[POINTWISE] + macs[MATMUL],
            macs[CONV3X3],
            macs[DEPTHWISE],
            macs[CONV] + macs[FULLY_CONNECTED],
            self.activation_elements / 1e6,
            self.parameters / 1e6,
            float(self.operators),
        )


def read_features(path: Path) -> Features:
    """Return the features of an ONNX or TFLite file.

    Raises:
        StageError: if the file is of another format, or has no static shapes.
    """
    if path.suffix == ".onnx":
        from edgekd.estimate import onnx_graph

        operators, element_bytes = onnx_graph.read_operators(path)
    elif path.suffix == ".tflite":
        from edgekd.estimate import tflite_graph

        operators, element_bytes = tflite_graph.read_operators(path)
    else:
        raise StageError(f"{path.name}: features are read from .onnx and .tflite files only")
    return summarize(operators, element_bytes, path.stat().st_size)


def summarize(operators: Sequence[Operator], element_bytes: int, file_bytes: int) -> Features:
    """Return the features of a list of operators whose activations have so many bytes each."""
    elements = sum(operator.elements for operator in operators)
    macs: Counter[str] = Counter()
    for operator in operators:
        macs[operator.kind] += operator.macs
    return Features(
        macs=dict(+macs),
        counts=dict(Counter(operator.kind for operator in operators)),
        parameters=sum(operator.parameters for operator in operators),
        activation_elements=elements,
        activation_bytes=elements * element_bytes,
        file_bytes=file_bytes,
        unfitted=_names(operators, (MATMUL, UNFITTED)),
        unknown=_names(operators, (UNKNOWN,)),
    )


def _names(operators: Iterable[Operator], kinds: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted({operator.name for operator in operators if operator.kind in kinds}))
