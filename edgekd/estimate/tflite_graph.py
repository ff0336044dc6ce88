# SPDX-License-Identifier: Apache-2.0
"""The operators of a TFLite file, whose convolutions have their activation in themselves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from edgekd.estimate.operators import ELEMENTWISE, MATMUL, MOVEMENT, UNFITTED, UNKNOWN, Operator, conv_kind, linear_kind

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_VIEWS = frozenset(["EXPAND_DIMS", "RESHAPE", "SHAPE", "SQUEEZE"])
_ELEMENTWISE = frozenset(
    [
        *("ABS", "ADD", "ADD_N", "ARG_MAX", "AVERAGE_POOL_2D", "CAST", "DEQUANTIZE", "DIV", "ELU", "EQUAL", "EXP", "GREATER", "HARD_SWISH"),
        *(
            "LEAKY_RELU",
            "LESS",
            "LOCAL_RESPONSE_NORMALIZATION",
            "LOG",
            "LOGISTIC",
            "LOG_SOFTMAX",
            "MAXIMUM",
            "MAX_POOL_2D",
            "MEAN",
            "MINIMUM",
        ),
        *("MUL", "NEG", "POW", "PRELU", "QUANTIZE", "REDUCE_MAX", "RELU", "RELU6", "RELU_0_TO_1", "RELU_N1_TO_1", "RESIZE_BILINEAR"),
        *(
            "RESIZE_NEAREST_NEIGHBOR",
            "RSQRT",
            "SELECT",
            "SELECT_V2",
            "SOFTMAX",
            "SQRT",
            "SQUARE",
            "SQUARED_DIFFERENCE",
            "SUB",
            "SUM",
            "TANH",
        ),
    ]
)
_MOVEMENT = frozenset(
    [
        *("BATCH_TO_SPACE_ND", "BROADCAST_TO", "CONCATENATION", "DEPTH_TO_SPACE", "MIRROR_PAD", "PACK", "PAD", "PADV2", "SLICE"),
        *("SPACE_TO_BATCH_ND", "SPACE_TO_DEPTH", "SPLIT", "SPLIT_V", "STRIDED_SLICE", "TILE", "TRANSPOSE", "UNPACK"),
    ]
)
_UNFITTED = frozenset(["EMBEDDING_LOOKUP", "GATHER", "GATHER_ND", "GELU"])
_FILTERS = {"CONV_2D": 1, "DEPTHWISE_CONV_2D": 1, "FULLY_CONNECTED": 1, "TRANSPOSE_CONV": 1, "BATCH_MATMUL": 1}


def read_operators(path: Path) -> tuple[list[Operator], int]:
    """Return the operators of the first subgraph, and the bytes of an activation element."""
    from ai_edge_litert import schema_py_generated as schema

    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(path.read_bytes(), 0))
    graph = model.subgraphs[0]
    codes = [names.get(max(code.builtinCode, code.deprecatedBuiltinCode), "CUSTOM") for code in model.operatorCodes]
    constants = {index for index, tensor in enumerate(graph.tensors) if model.buffers[tensor.buffer].data is not None}
    shapes = [() if tensor.shape is None else tuple(max(int(size), 1) for size in tensor.shape) for tensor in graph.tensors]
    nodes = [(codes[node.opcodeIndex], node) for node in graph.operators]
    operators = [
        _operator(name, node, shapes, constants) for name, node in nodes if name not in _VIEWS and not constants >= set(node.outputs)
    ]
    is_integer = any(tensor.type == schema.TensorType.INT8 for index, tensor in enumerate(graph.tensors) if index not in constants)
    return operators, 1 if is_integer else 4


def _operator(name: str, node: Any, shapes: Sequence[tuple[int, ...]], constants: set[int]) -> Operator:
    inputs, outputs = [int(index) for index in node.inputs if index >= 0], [int(index) for index in node.outputs]
    elements = sum(math.prod(shapes[index]) for index in (*inputs, *outputs) if index not in constants)
    if name in _FILTERS:
        return _weighted(name, node, shapes, constants, elements)
    kinds = {ELEMENTWISE: _ELEMENTWISE, MOVEMENT: _MOVEMENT, UNFITTED: _UNFITTED}
    return Operator(name, next((kind for kind, names in kinds.items() if name in names), UNKNOWN), 0, 0, elements)


def _weighted(name: str, node: Any, shapes: Sequence[tuple[int, ...]], constants: set[int], elements: int) -> Operator:
    """Return a convolution or a product. Filters are output channels x height x width x input channels (of a group)."""
    position = int(node.inputs[_FILTERS[name]])
    weights, output = shapes[position], math.prod(shapes[int(node.outputs[0])])
    parameters = math.prod(weights)
    if name == "TRANSPOSE_CONV":  # inputs: output shape, filter, input
        source = shapes[int(node.inputs[2])]
        return Operator(name, conv_kind(weights[1:3], [2], 1, weights[0]), math.prod(source) * math.prod(weights[:3]), parameters, elements)
    left = shapes[int(node.inputs[0])]
    if name == "BATCH_MATMUL":
        depth = left[-2] if node.builtinOptions.adjX else left[-1]
        kind = linear_kind(output * depth // max(parameters, 1)) if position in constants else MATMUL
        return Operator(name, kind, output * depth, parameters if position in constants else 0, elements)
    if name == "FULLY_CONNECTED":
        vectors = output // max(weights[0], 1)
        if position not in constants:
            return Operator(name, MATMUL, output * weights[-1], 0, elements)
        return Operator(name, linear_kind(vectors), output * weights[-1], parameters, elements)
    strides = [node.builtinOptions.strideH, node.builtinOptions.strideW]
    if name == "DEPTHWISE_CONV_2D":  # 1 x height x width x output channels
        return Operator(
            name, conv_kind(weights[1:3], strides, weights[3], weights[3]), output * math.prod(weights[1:3]), parameters, elements
        )
    groups = max(left[3] // max(weights[3], 1), 1)
    return Operator(name, conv_kind(weights[1:3], strides, groups, weights[0]), output * math.prod(weights[1:]), parameters, elements)
