# SPDX-License-Identifier: Apache-2.0
"""Which ops of a quantized TFLite model compute in int8, and why the others do not: its kernels follow the tensors' types."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from edgekd.domain.artifact import Json

# ops that only move data, or change its type, compute nothing
_MOVES = frozenset(
    [
        "BROADCAST_TO",
        "CAST",
        "CONCATENATION",
        "DEPTH_TO_SPACE",
        "DEQUANTIZE",
        "EMBEDDING_LOOKUP",
        "EXPAND_DIMS",
        "GATHER",
        "GATHER_ND",
        "MIRROR_PAD",
        "PACK",
        "PAD",
        "PADV2",
        "QUANTIZE",
        "RESHAPE",
        "REVERSE_V2",
        "SHAPE",
        "SLICE",
        "SPACE_TO_DEPTH",
        "SPLIT",
        "SPLIT_V",
        "SQUEEZE",
        "STRIDED_SLICE",
        "TILE",
        "TRANSPOSE",
        "UNPACK",
    ]
)


def of_ops(path: Path, *, dynamic: bool) -> dict[str, Json]:
    """Return ``ops`` (how many compute), ``integer_ops`` and ``float_ops`` (each with its count, the latter with a reason)."""
    from ai_edge_litert import schema_py_generated as schema

    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(path.read_bytes(), 0))
    integer, floating = Counter[str](), Counter[str]()
    for graph in model.subgraphs:
        types = [tensor.type for tensor in graph.tensors]
        for operator in graph.operators:
            code = model.operatorCodes[operator.opcodeIndex]
            name = names.get(max(code.builtinCode, code.deprecatedBuiltinCode), "CUSTOM")
            if name in _MOVES:
                continue
            read = [types[index] for index in operator.inputs if index >= 0]
            if schema.TensorType.FLOAT32 not in read or (dynamic and schema.TensorType.INT8 in read):  # int8 weights
                integer[name] += 1
            else:
                floating[name] += 1
    return {
        "ops": integer.total() + floating.total(),
        "integer_ops": [{"op": op, "count": count} for op, count in sorted(integer.items())],
        "float_ops": [
            {"op": op, "count": count, "reason": _dynamic_reason(op) if dynamic else "AI Edge Quantizer has no int8 form of it"}
            for op, count in sorted(floating.items())
        ],
    }


def _dynamic_reason(op: str) -> str:
    if op in {"BATCH_MATMUL", "FULLY_CONNECTED"}:
        return "it has no constant weights"
    return "activations stay float in a dynamic scheme"
