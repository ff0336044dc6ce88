# SPDX-License-Identifier: Apache-2.0
"""Float32 TFLite -> int8 TFLite by AI Edge Quantizer; ranges by min and max; and which ops compute in int8.

AI Edge Quantizer's own rule is a moving average of each sample's smallest and largest value. It cuts off what is larger
than in an average sample: on four small nets its outputs had 10 to 18 times the root mean square error that min and
max gave with 256 samples, and more samples made it worse.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from edgekd.capture import capture_output
from edgekd.domain.scheme import DYNAMIC_INT8
from edgekd.errors import StageError
from edgekd.harness import runner

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


def quantize(source: Path, path: Path, params: Mapping[str, Json], calibration: Sequence[Sequence[np.ndarray]]) -> Mapping[str, Json]:
    """Write the file.

    Raises:
        StageError: if the quantizer refuses the model, or an input or output cannot be an integer.
    """
    scheme, dynamic, integer_edges = str(params["scheme"]), params["scheme"] == DYNAMIC_INT8, params["io"] == "int8"
    if dynamic and integer_edges:
        raise StageError(f'{scheme} has float inputs and outputs; io = "int8" needs a static scheme')
    with capture_output():
        try:
            _quantized(source, path, params, calibration)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError, AssertionError) as error:
            text = (str(error).splitlines() or [type(error).__name__])[0]
            raise StageError(f"AI Edge Quantizer refuses {scheme}: {text}; leave it out with quantize.schemes") from error
        session = runner.open_session("litert", path, 1)
    floats = [item["name"] for item in (*session.inputs, *session.outputs) if item["dtype"] == "float32"]
    if integer_edges and floats:
        raise StageError(
            f"'{floats[0]}' stays float: what is at it is not quantized; use quantize.io = \"float32\", "
            "or leave litert out with quantize.runtimes"
        )
    return {
        "scheme": scheme,
        "io": params["io"],
        "weights": "int8",
        "weight_bits": 8,
        "activations": "float32" if dynamic else "int8",
        "calibration_samples": len(calibration),
        "inputs": [_edge(item) for item in session.inputs],
        "outputs": [_edge(item) for item in session.outputs],
        **_ops(path, dynamic=dynamic),
    }


def _quantized(source: Path, path: Path, params: Mapping[str, Json], calibration: Sequence[Sequence[np.ndarray]]) -> None:
    from ai_edge_quantizer import calibrator, quantizer, recipe, recipe_manager
    from ai_edge_quantizer.utils.qsv_utils import min_max_update

    rules = list(getattr(recipe, str(params["scheme"]))())
    if params["scheme"] != DYNAMIC_INT8 and params["io"] == "float32":
        rules += [{"regex": ".*", "operation": edge, "algorithm_key": "no_quantize", "op_config": {}} for edge in ("INPUT", "OUTPUT")]
    working = quantizer.Quantizer(str(source))
    working.load_quantization_recipe(rules)
    ranges = None
    if working.need_calibration:
        manager = recipe_manager.RecipeManager()
        manager.load_quantization_recipe(rules)
        seen = calibrator.Calibrator(str(source), num_threads=1, qsv_update_func=min_max_update)
        seen.calibrate({SIGNATURE: _feeds(source, calibration)}, manager)
        ranges = seen.get_model_qsvs()
    path.write_bytes(working.quantize(ranges).quantized_model)


def _feeds(source: Path, calibration: Sequence[Sequence[np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """Return samples by argument, in the types that the model takes (int32 for int64)."""
    session = runner.open_session("litert", source, 1)
    types = [item["dtype"] for item in session.inputs]
    return [
        {f"args_{i}": array.astype(dtype) for i, (array, dtype) in enumerate(zip(sample, types, strict=True))} for sample in calibration
    ]


def _edge(item: Mapping[str, Any]) -> dict[str, Json]:
    return {key: item[key] for key in ("name", "dtype", "scale", "zero_point")}


def _ops(path: Path, *, dynamic: bool) -> dict[str, Json]:
    """Return ``ops`` (how many compute), ``integer_ops`` and ``float_ops`` (each with its count, the latter with a reason).

    TFLite kernels follow the types of the tensors.
    """
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
