# SPDX-License-Identifier: Apache-2.0
"""Quantization of a float32 ONNX file to int8 with ONNX Runtime's quantizer.

static: QDQ, weights int8 per channel, activations uint8 (this pair is fast on x86, and as fast as others on ARM), ranges by min and
max. dynamic: weights of MatMul (Gemm becomes one), LSTM and Gather, int8 per channel. A dynamic convolution (ConvInteger) is many
times slower than a float one, so convolutions stay float.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.capture import capture_output, one_line_errors
from edgekd.domain.scheme import DYNAMIC_INT8
from edgekd.errors import StageError
from edgekd.runtimes.onnxruntime import comparison, kernels
from edgekd.runtimes.onnxruntime.convert import strip

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np

    from edgekd.domain.artifact import Json

DYNAMIC_OPS = ("Gather", "LSTM", "MatMul")
_STEPS = 0.02  # of the range of the outputs: a few steps of 1/255
IO_METADATA = "edgekd.edges"  # scales and zero points of integer inputs and outputs, for which ONNX has no field


def quantize(source: Path, path: Path, params: Mapping[str, Json], calibration: Sequence[Sequence[np.ndarray]]) -> Mapping[str, Json]:
    """Write the file.

    Raises:
        StageError: if the quantizer refuses the model, or an input or output cannot be an integer.
    """
    import onnx

    dynamic, integer_io = params["scheme"] == DYNAMIC_INT8, params["io"] == "int8"
    if dynamic and integer_io:
        raise StageError(f'{params["scheme"]} has float inputs and outputs; io = "int8" needs a static scheme')
    with tempfile.TemporaryDirectory() as folder, capture_output():
        quantized = Path(folder) / "quantized.onnx"
        with one_line_errors(f"onnxruntime's quantizer refuses {params['scheme']}"):
            notes = _write_quantized(source, quantized, params, calibration)
            model = onnx.load(str(quantized))
            quantization = _quantize_io(model.graph) if integer_io else {}
            path.write_bytes(strip(model, {IO_METADATA: json.dumps(quantization, sort_keys=True)} if quantization else {}))
            _check_rewrite(quantized, path, calibration, quantization)
            ops = kernels.list_ops(path, dynamic=dynamic)
    return {
        "scheme": params["scheme"],
        "io": params["io"],
        "weights": "int8",
        "weight_bits": 7 if params.get("reduce_range") else 8,
        "activations": "float32" if dynamic else "uint8",
        "calibration_samples": len(calibration),
        "inputs": [_io_tensor(item, quantization) for item in model.graph.input],
        "outputs": [_io_tensor(item, quantization) for item in model.graph.output],
        **ops,
        "notes": notes,
    }


def _check_rewrite(before: Path, path: Path, calibration: Sequence[Sequence[np.ndarray]], quantization: Mapping[str, Any]) -> None:
    """Compare the file with the quantizer's: without metadata, and with integer inputs and outputs, it computes the same.

    Raises:
        StageError: if it does not.
    """
    change = comparison.largest_change(before, path, calibration)
    if change > (_STEPS if quantization else comparison.ROUNDING):
        advice = '; use quantize.io = "float32"' if quantization else ""
        raise StageError(f"its outputs change by {100 * change:.3g} % when what is not needed is removed from the graph{advice}")


def _write_quantized(source: Path, path: Path, params: Mapping[str, Json], calibration: Sequence[Sequence[np.ndarray]]) -> list[str]:
    """Write the quantizer's file, and return notes."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_name("prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)  # shapes are fixed, and symbolic inference supports fewer ops
    notes = []
    change = comparison.largest_change(source, prepared, calibration)
    if change > comparison.ROUNDING:
        notes.append(f"quantized without ONNX Runtime's optimizations, which change the outputs by {100 * change:.3g} %")
        prepared = source
    settings: dict[str, Any] = {"per_channel": True, "reduce_range": bool(params.get("reduce_range")), "weight_type": QuantType.QInt8}
    if params["scheme"] == DYNAMIC_INT8:
        quantize_dynamic(str(prepared), str(path), op_types_to_quantize=list(DYNAMIC_OPS), **settings)
    else:
        quantize_static(
            str(prepared),
            str(path),
            _reader(source, calibration),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            calibrate_method=CalibrationMethod.MinMax,
            **settings,
        )
    return notes


def _reader(source: Path, calibration: Sequence[Sequence[np.ndarray]]) -> Any:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader

    names = [item.name for item in onnx.load(str(source)).graph.input]

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # untyped base
        def __init__(self) -> None:
            self.samples: Iterator[Sequence[np.ndarray]] = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            sample = next(self.samples, None)
            return None if sample is None else dict(zip(names, sample, strict=True))

    return Reader()


def _quantize_io(graph: Any) -> dict[str, dict[str, Json]]:
    """Remove the QuantizeLinear at each float input and the DequantizeLinear at each output; return scales and zero points."""
    from onnx import TensorProto, helper, numpy_helper

    values = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    quantization: dict[str, dict[str, Json]] = {}
    sides = [(item, "QuantizeLinear") for item in graph.input] + [(item, "DequantizeLinear") for item in graph.output]
    for tensor, op in sides:
        if tensor.type.tensor_type.elem_type != TensorProto.FLOAT:  # token ids are integers already
            continue
        is_input = op == "QuantizeLinear"
        neighbours = [node for node in graph.node if tensor.name in (node.input if is_input else node.output)]
        if [node.op_type for node in neighbours] != [op]:
            raise StageError(
                f"'{tensor.name}' stays float: the op that {'reads' if is_input else 'writes'} it is not quantized; "
                'use quantize.io = "float32", or leave onnxruntime out with quantize.runtimes'
            )
        node = neighbours[0]
        inner = node.output[0] if is_input else node.input[0]
        for other in graph.node:
            other.input[:] = [tensor.name if name == inner else name for name in other.input]
            other.output[:] = [tensor.name if name == inner else name for name in other.output]
        zero_point = values[node.input[2]]
        tensor.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(zero_point.dtype)
        quantization[tensor.name] = {"scale": float(values[node.input[1]]), "zero_point": int(zero_point)}
        graph.node.remove(node)
    return quantization


def _io_tensor(item: Any, quantization: Mapping[str, Mapping[str, Json]]) -> dict[str, Json]:
    import onnx

    dtype = onnx.helper.tensor_dtype_to_np_dtype(item.type.tensor_type.elem_type).name
    return {"name": item.name, "dtype": dtype, **quantization.get(item.name, {"scale": None, "zero_point": None})}
