# SPDX-License-Identifier: Apache-2.0
"""A list of the ops of a quantized ONNX model that compute in int8, and of those that do not, with reasons.

A QDQ file shows where tensors are rounded, not which kernels run: when ONNX Runtime loads it, it replaces ``DequantizeLinear -> op
-> QuantizeLinear`` by an integer kernel if it has one, and runs the op in float otherwise. So the list is made from the loaded graph.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgekd.domain.artifact import Json

# ops that only move data or change its type are not counted
_DATA_MOVEMENT = frozenset(
    [
        "Cast",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "DepthToSpace",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "Identity",
        "Pad",
        "QLinearConcat",
        "QuantizeLinear",
        "Range",
        "Reshape",
        "Shape",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    ]
)
_INTEGER_OUT = frozenset(("ArgMax", "ArgMin", "DynamicQuantizeLinear", "QuantizeLinear", "Shape"))
_FLOAT_OUT = frozenset(("DequantizeLinear", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QAttention"))
# integer kernels whose names do not start with QLinear, and the op that each computes
_INTEGER_KERNELS = {
    "ConvInteger": "Conv",
    "DynamicQuantizeLSTM": "LSTM",
    "DynamicQuantizeMatMul": "MatMul",
    "MatMulInteger": "MatMul",
    "MatMulIntegerToFloat": "MatMul",
    "QAttention": "Attention",
    "QGemm": "Gemm",
}


def list_ops(path: Path, *, dynamic: bool) -> dict[str, Json]:
    """Return the number of ``ops`` that compute, and ``integer_ops`` and ``float_ops`` with counts, the latter with reasons."""
    graph = _optimize(path).graph
    float_tensors = _float_tensors(graph)
    integer, floating = Counter[str](), Counter[str]()
    for node in graph.node:
        if node.op_type in _DATA_MOVEMENT:
            continue
        if _is_integer(node.op_type) or not any(name in float_tensors for name in node.input):
            integer[_op_name(node.op_type)] += 1
        else:
            floating[_op_name(node.op_type)] += 1
    return {
        "ops": integer.total() + floating.total(),
        "integer_ops": [{"op": op, "count": count} for op, count in sorted(integer.items())],
        "float_ops": [
            {"op": op, "count": count, "reason": _dynamic_reason(op) if dynamic else _static_reason(op)}
            for op, count in sorted(floating.items())
        ],
    }


def _optimize(path: Path) -> Any:
    """Return the model as ONNX Runtime runs it, except for optimizations that depend on the CPU (layouts)."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(optimized)
        options.intra_op_num_threads = 1  # nothing runs
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return onnx.load(str(optimized))


def _float_tensors(graph: Any) -> set[str]:
    from onnx import TensorProto

    floats = {item.name for item in graph.initializer if item.data_type == TensorProto.FLOAT}
    floats |= {item.name for item in graph.input if item.type.tensor_type.elem_type == TensorProto.FLOAT}
    for node in graph.node:
        if node.op_type == "Cast":
            is_float = any(attribute.name == "to" and attribute.i == TensorProto.FLOAT for attribute in node.attribute)
        elif node.op_type in _INTEGER_OUT or _is_integer(node.op_type):
            is_float = node.op_type in _FLOAT_OUT
        else:
            is_float = node.op_type in _FLOAT_OUT or any(name in floats for name in node.input)
        if is_float:
            floats.update(node.output)
    return floats


def _is_integer(op: str) -> bool:
    return op.startswith("QLinear") or op in _INTEGER_KERNELS


def _op_name(op: str) -> str:
    return _INTEGER_KERNELS.get(op, op.removeprefix("QLinear").removeprefix("Fused"))


def _static_reason(op: str) -> str:
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    if op in QLinearOpsRegistry or op in QDQRegistry:
        return "onnxruntime has no int8 kernel for it in this graph"
    return "onnxruntime's quantizer has no int8 version of it"


def _dynamic_reason(op: str) -> str:
    if op == "Conv":
        return "a dynamic convolution is many times slower than float in onnxruntime"
    if op in {"Gemm", "MatMul"}:
        return "it has no constant weights"
    return "activations stay float in a dynamic scheme"
