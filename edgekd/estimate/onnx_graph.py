# SPDX-License-Identifier: Apache-2.0
"""The operators of an ONNX file, as a runtime fuses them."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from edgekd.errors import StageError
from edgekd.estimate.operators import ELEMENTWISE, MATMUL, MOVEMENT, UNFITTED, UNKNOWN, Operator, conv_kind, linear_kind

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

# position of the weights among the inputs
_CONVOLUTIONS = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3, "ConvTranspose": 1}
_PRODUCTS = {"Gemm": 1, "MatMul": 1, "MatMulInteger": 1, "QLinearMatMul": 3}
_VIEWS = frozenset(["Constant", "Dropout", "Flatten", "Identity", "Reshape", "Shape", "Squeeze", "Unsqueeze"])
_ROUNDING = frozenset(["DequantizeLinear", "QuantizeLinear"])  # part of the integer operators beside them
_FUSED_ACTIVATIONS = frozenset(["BatchNormalization", "Clip", "HardSigmoid", "HardSwish", "LeakyRelu", "Relu", "Sigmoid", "Tanh"])
_ELEMENTWISE = frozenset(
    [
        *(
            "Abs",
            "Add",
            "And",
            "ArgMax",
            "AveragePool",
            "BatchNormalization",
            "Cast",
            "Clip",
            "Div",
            "DynamicQuantizeLinear",
            "Elu",
            "Equal",
        ),
        *(
            "Exp",
            "GlobalAveragePool",
            "GlobalMaxPool",
            "Greater",
            "HardSigmoid",
            "HardSwish",
            "LRN",
            "LeakyRelu",
            "Less",
            "Log",
            "LogSoftmax",
        ),
        *(
            "Max",
            "MaxPool",
            "Mean",
            "Min",
            "Mul",
            "Neg",
            "Not",
            "PRelu",
            "Pow",
            "QLinearAdd",
            "QLinearAveragePool",
            "QLinearGlobalAveragePool",
        ),
        *(
            "QLinearMul",
            "QLinearSigmoid",
            "Reciprocal",
            "ReduceMax",
            "ReduceMean",
            "ReduceSum",
            "Relu",
            "Resize",
            "Sigmoid",
            "Softmax",
            "Sqrt",
        ),
        *("Sub", "Tanh", "Upsample", "Where"),
    ]
)
_MOVEMENT = frozenset(["Concat", "DepthToSpace", "Expand", "Pad", "QLinearConcat", "Slice", "SpaceToDepth", "Split", "Tile", "Transpose"])
_UNFITTED = frozenset(
    ["Erf", "Gather", "GatherElements", "Gelu", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "Mish"]
)


def read_operators(path: Path) -> tuple[list[Operator], int]:
    """Return the operators of the graph, and the bytes of an activation element.

    Raises:
        StageError: if the shape of a tensor is not known.
    """
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
    graph = _Graph(path.name, model.graph)
    operators = [operator for node in model.graph.node if (operator := graph.operator(node)) is not None]
    is_integer = any(node.op_type == "QuantizeLinear" or node.op_type.startswith("QLinear") for node in model.graph.node)
    return operators, 1 if is_integer else 4


class _Graph:
    def __init__(self, name: str, graph: Any) -> None:
        self.name = name
        values = [*graph.value_info, *graph.input, *graph.output]
        self.shapes = {item.name: _shape(item.type.tensor_type) for item in values if item.type.tensor_type.HasField("shape")}
        self.shapes |= {item.name: tuple(item.dims) for item in graph.initializer}
        self.constants = {item.name for item in graph.initializer}
        self.producers: dict[str, Any] = {}
        self.uses = Counter(name for node in graph.node for name in node.input)
        self.uses.update(item.name for item in graph.output)
        for node in graph.node:
            self.producers |= dict.fromkeys(node.output, node)
            if node.op_type in {"Constant", "Shape"} or (
                node.op_type in _ROUNDING | _VIEWS and node.input and node.input[0] in self.constants
            ):
                self.constants.update(node.output)

    def operator(self, node: Any) -> Operator | None:
        """Return a node as an operator, or None if it is part of another one or only a view."""
        op = node.op_type
        if op in _VIEWS or op in _ROUNDING or node.output[0] in self.constants or self._is_fused(node):
            return None
        elements = sum(self._elements(name) for name in (*node.input, *node.output) if name and name not in self.constants)
        if op in _CONVOLUTIONS:
            return self._convolution(node, elements)
        if op in _PRODUCTS:
            return self._product(node, elements)
        kinds = {ELEMENTWISE: _ELEMENTWISE, MOVEMENT: _MOVEMENT, UNFITTED: _UNFITTED}
        return Operator(op, next((kind for kind, names in kinds.items() if op in names), UNKNOWN), 0, 0, elements)

    def _convolution(self, node: Any, elements: int) -> Operator:
        weights = self._shape(node.input[_CONVOLUTIONS[node.op_type]])
        attributes = _attributes(node)
        groups = int(attributes.get("group", 1))
        is_transposed = node.op_type == "ConvTranspose"
        places = self._shape(node.input[0] if is_transposed else node.output[0])[2:]
        channels = weights[1] * groups if is_transposed else weights[0]
        kind = conv_kind(weights[2:], attributes.get("strides", [2 if is_transposed else 1]), groups, channels)
        return Operator(node.op_type, kind, math.prod(weights) * math.prod(places), math.prod(weights), elements)

    def _product(self, node: Any, elements: int) -> Operator:
        weights = node.input[_PRODUCTS[node.op_type]]
        output = math.prod(self._shape(node.output[0]))
        shape, left = self._shape(weights), self._shape(node.input[0])
        depth = left[0] if _attributes(node).get("transA") else left[-1]
        if weights not in self.constants:
            return Operator(node.op_type, MATMUL, output * depth, 0, elements)
        columns = math.prod(shape) // depth
        return Operator(node.op_type, linear_kind(output // max(columns, 1)), output * depth, math.prod(shape), elements)

    def _is_fused(self, node: Any) -> bool:
        """Return whether a node is computed by the convolution or product before it, which nothing else reads."""
        inputs = [name for name in node.input if name and name not in self.constants]
        if len(inputs) != 1:
            return False
        producer = self._producer(inputs[0])
        if producer is None:
            return False
        if node.op_type == "Add":
            return producer.op_type in {"MatMul", "ConvTranspose"}  # a bias
        return node.op_type in _FUSED_ACTIVATIONS and producer.op_type in {*_CONVOLUTIONS, *_PRODUCTS}

    def _producer(self, name: str) -> Any:
        """Return the node that computes a tensor which one node reads, through rounding; None if others read it too."""
        producer = self.producers.get(name)
        while producer is not None and self.uses[name] == 1 and producer.op_type in _ROUNDING:
            name = producer.input[0]
            producer = self.producers.get(name)
        return producer if self.uses[name] == 1 else None

    def _elements(self, name: str) -> int:
        return math.prod(self._shape(name))

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self.shapes.get(name)
        if shape is None or any(size < 0 for size in shape):
            raise StageError(f"{self.name}: the shape of tensor {name!r} is not known; an estimate needs static shapes")
        return shape


def _shape(tensor: Any) -> tuple[int, ...]:
    """Return a shape: an unknown first axis is a batch of 1, another unknown axis is -1."""
    sizes = [item.dim_value if item.HasField("dim_value") else -1 for item in tensor.shape.dim]
    return tuple(1 if index == 0 and size < 0 else size for index, size in enumerate(sizes))


def _attributes(node: Any) -> Mapping[str, Any]:
    return {item.name: list(item.ints) if item.ints else item.i for item in node.attribute}
