# SPDX-License-Identifier: Apache-2.0
"""Float32 TFLite -> int8 TFLite by AI Edge Quantizer, and the list of ops that stay float."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from edgekd.domain.scheme import DYNAMIC_INT8, needs_calibration
from edgekd.errors import StageError
from edgekd.harness import runner
from edgekd.quiet import quiet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from edgekd.domain.artifact import Json

SIGNATURE = "serving_default"
# ops that only move data, or change its type, compute nothing
_MOVES = frozenset(
    [
        "BROADCAST_TO",
        "CAST",
        "CONCATENATION",
        "DEQUANTIZE",
        "EXPAND_DIMS",
        "GATHER",
        "PACK",
        "PAD",
        "PADV2",
        "QUANTIZE",
        "RESHAPE",
        "SHAPE",
        "SLICE",
        "SPLIT",
        "SPLIT_V",
        "SQUEEZE",
        "STRIDED_SLICE",
        "TILE",
        "TRANSPOSE",
        "UNPACK",
    ]
)


def quantize(source: Path, path: Path, params: Mapping[str, Json], calibration: Sequence[Sequence[np.ndarray]]) -> Mapping[str, Json]:
    """Write the file.

    Raises:
        StageError: if the quantizer refuses the model.
    """
    scheme = str(params["scheme"])
    with quiet():
        from ai_edge_quantizer import quantizer, recipe

        rules = list(getattr(recipe, scheme)())
        if needs_calibration(scheme) and params["io"] == "float32":
            rules += [{"regex": ".*", "operation": edge, "algorithm_key": "no_quantize", "op_config": {}} for edge in ("INPUT", "OUTPUT")]
        try:
            working = quantizer.Quantizer(str(source))
            working.load_quantization_recipe(rules)
            wanted = [item["dtype"] for item in runner.open_session("litert", source, 1).inputs]
            feeds = {SIGNATURE: [{f"args_{i}": array.astype(wanted[i]) for i, array in enumerate(sample)} for sample in calibration]}
            ranges = working.calibrate(feeds) if working.need_calibration else None
            working.quantize(ranges).export_model(str(path), overwrite=True)
        except (RuntimeError, ValueError, TypeError, KeyError, NotImplementedError) as error:
            text = (str(error).splitlines() or [type(error).__name__])[0]
            raise StageError(f"quantize: AI Edge Quantizer refuses {scheme}: {text}; leave it out with quantize.schemes") from error
        session = runner.open_session("litert", path, 1)
    computing, floating = _ops(path, dynamic=scheme == DYNAMIC_INT8)
    return {
        "scheme": scheme,
        "io": params["io"],
        "weights": "int8 a channel",
        "activations": "float32" if scheme == DYNAMIC_INT8 else "int8",
        "inputs": [_edge(item) for item in session.inputs],
        "outputs": [_edge(item) for item in session.outputs],
        "ops": computing,
        "float_ops": floating,
    }


def _ops(path: Path, *, dynamic: bool) -> tuple[int, list[dict[str, Json]]]:
    """Return how many ops compute, and those that work in float with how many and why."""
    from ai_edge_litert import schema_py_generated as schema

    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(path.read_bytes(), 0))
    computing, floating = 0, Counter[str]()
    for graph in model.subgraphs:
        types = [tensor.type for tensor in graph.tensors]
        for operator in graph.operators:
            code = model.operatorCodes[operator.opcodeIndex]
            name = names.get(max(code.builtinCode, code.deprecatedBuiltinCode), "CUSTOM")
            if name in _MOVES:
                continue
            computing += 1
            read = [types[index] for index in operator.inputs if index >= 0]
            has_integer_weights = schema.TensorType.INT8 in read
            if types[operator.outputs[0]] == schema.TensorType.FLOAT32 and not (dynamic and has_integer_weights):
                floating[name] += 1
    reason = "dynamic quantization reaches only ops with weights" if dynamic else "AI Edge Quantizer has no int8 form of it"
    return computing, [{"op": op, "count": count, "reason": reason} for op, count in sorted(floating.items())]


def _edge(item: Mapping[str, Any]) -> dict[str, Json]:
    return {key: item[key] for key in ("name", "dtype", "scale", "zero_point")}
