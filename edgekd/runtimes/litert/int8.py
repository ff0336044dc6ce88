# SPDX-License-Identifier: Apache-2.0
"""Quantization of a float32 TFLite file to int8 with AI Edge Quantizer, and a list of the ops that compute in int8.

Ranges are the minimum and maximum over all calibration samples. AI Edge Quantizer's default is a moving average of each sample's
minimum and maximum, which clips larger values: on four small networks with 256 samples, its outputs had 10 to 18 times the root
mean square error of min and max, and more samples increased it.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from edgekd.capture import capture_output, one_line_errors
from edgekd.domain.scheme import DYNAMIC_INT8
from edgekd.errors import StageError
from edgekd.harness import runner

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from edgekd.domain.artifact import Json

SIGNATURE = "serving_default"
# ops that only move data or change its type are not counted
_DATA_MOVEMENT = frozenset(
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
    scheme, dynamic, integer_io = str(params["scheme"]), params["scheme"] == DYNAMIC_INT8, params["io"] == "int8"
    if dynamic and integer_io:
        raise StageError(f'{scheme} has float inputs and outputs; io = "int8" needs a static scheme')
    with capture_output(), one_line_errors(f"AI Edge Quantizer refuses {scheme}"):
        _write_quantized(source, path, params, calibration)
        session = runner.open_session("litert", path, 1)
    float_tensors = [item["name"] for item in (*session.inputs, *session.outputs) if item["dtype"] == "float32"]
    if integer_io and float_tensors:
        raise StageError(
            f"'{float_tensors[0]}' stays float: the op at it is not quantized; use quantize.io = \"float32\", "
            "or leave litert out with quantize.runtimes"
        )
    return {
        "scheme": scheme,
        "io": params["io"],
        "weights": "int8",
        "weight_bits": 8,
        "activations": "float32" if dynamic else "int8",
        "calibration_samples": len(calibration),
        "inputs": [_io_tensor(item) for item in session.inputs],
        "outputs": [_io_tensor(item) for item in session.outputs],
        **_ops(path, dynamic=dynamic),
    }


def _write_quantized(source: Path, path: Path, params: Mapping[str, Json], calibration: Sequence[Sequence[np.ndarray]]) -> None:
    from ai_edge_quantizer import calibrator, quantizer, recipe, recipe_manager
    from ai_edge_quantizer.utils.qsv_utils import min_max_update

    rules = list(getattr(recipe, str(params["scheme"]))())
    if params["scheme"] != DYNAMIC_INT8 and params["io"] == "float32":
        rules += [{"regex": ".*", "operation": side, "algorithm_key": "no_quantize", "op_config": {}} for side in ("INPUT", "OUTPUT")]
    model_quantizer = quantizer.Quantizer(str(source))
    model_quantizer.load_quantization_recipe(rules)
    ranges = None
    if model_quantizer.need_calibration:
        manager = recipe_manager.RecipeManager()
        manager.load_quantization_recipe(rules)
        model_calibrator = calibrator.Calibrator(str(source), num_threads=1, qsv_update_func=min_max_update)
        model_calibrator.calibrate({SIGNATURE: _calibration_inputs(source, calibration)}, manager)
        ranges = model_calibrator.get_model_qsvs()
    path.write_bytes(model_quantizer.quantize(ranges).quantized_model)


def _calibration_inputs(source: Path, calibration: Sequence[Sequence[np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """Return samples by argument name, in the types of the model's inputs (int32 for int64)."""
    session = runner.open_session("litert", source, 1)
    types = [item["dtype"] for item in session.inputs]
    return [
        {f"args_{i}": array.astype(dtype) for i, (array, dtype) in enumerate(zip(sample, types, strict=True))} for sample in calibration
    ]


def _io_tensor(item: Mapping[str, Any]) -> dict[str, Json]:
    return {key: item[key] for key in ("name", "dtype", "scale", "zero_point")}


def _ops(path: Path, *, dynamic: bool) -> dict[str, Json]:
    """Return the number of ``ops`` that compute, and ``integer_ops`` and ``float_ops`` with counts, the latter with reasons.

    The types of an op's tensors select its TFLite kernel.
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
            if name in _DATA_MOVEMENT:
                continue
            input_types = [types[index] for index in operator.inputs if index >= 0]
            if schema.TensorType.FLOAT32 not in input_types or (dynamic and schema.TensorType.INT8 in input_types):  # int8 weights
                integer[name] += 1
            else:
                floating[name] += 1
    return {
        "ops": integer.total() + floating.total(),
        "integer_ops": [{"op": op, "count": count} for op, count in sorted(integer.items())],
        "float_ops": [
            {"op": op, "count": count, "reason": _dynamic_reason(op) if dynamic else "AI Edge Quantizer has no int8 version of it"}
            for op, count in sorted(floating.items())
        ],
    }


def _dynamic_reason(op: str) -> str:
    if op in {"BATCH_MATMUL", "FULLY_CONNECTED"}:
        return "it has no constant weights"
    return "activations stay float in a dynamic scheme"
