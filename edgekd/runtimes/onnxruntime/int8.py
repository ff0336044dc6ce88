# SPDX-License-Identifier: Apache-2.0
"""Float32 ONNX -> int8 ONNX by ONNX Runtime's quantizer, and the list of ops that stay float.

static: QDQ, weights int8 a channel, activations uint8 (the fast pair on x86 and fine on ARM), ranges by min and max.
dynamic: MatMul, Gemm, LSTM, GRU and Gather only; a dynamic convolution (ConvInteger) is many times slower than float.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.domain.scheme import DYNAMIC_INT8
from edgekd.errors import StageError
from edgekd.quiet import quiet
from edgekd.runtimes.onnxruntime.convert import stripped

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np

    from edgekd.domain.artifact import Json

DYNAMIC_OPS = ("MatMul", "Gemm", "LSTM", "GRU", "Gather")
# ops that only move data compute nothing, in whatever type
_MOVES = frozenset(
    [
        "Cast",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "DequantizeLinear",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "QuantizeLinear",
        "DynamicQuantizeLinear",
        "Pad",
        "Range",
        "Reshape",
        "Shape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    ]
)
_INTEGER_OPS = frozenset(("ConvInteger", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat"))


def quantize(source: Path, path: Path, params: Mapping[str, Json], calibration: Sequence[Sequence[np.ndarray]]) -> Mapping[str, Json]:
    """Write the file.

    Raises:
        StageError: if the quantizer refuses the model.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    reduce_range = bool(params.get("reduce_range"))
    with tempfile.TemporaryDirectory() as folder, quiet():
        prepared, made = Path(folder) / "prepared.onnx", Path(folder) / "made.onnx"
        try:
            quant_pre_process(str(source), str(prepared))
            if params["scheme"] == DYNAMIC_INT8:
                quantize_dynamic(
                    str(prepared),
                    str(made),
                    op_types_to_quantize=list(DYNAMIC_OPS),
                    per_channel=True,
                    reduce_range=reduce_range,
                    weight_type=QuantType.QInt8,
                )
            else:
                quantize_static(
                    str(prepared),
                    str(made),
                    _reader(source, calibration),
                    quant_format=QuantFormat.QDQ,
                    per_channel=True,
                    reduce_range=reduce_range,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                )
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
            text = (str(error).splitlines() or [type(error).__name__])[0]
            raise StageError(f"quantize: onnxruntime refuses {params['scheme']}: {text}; leave it out with quantize.schemes") from error
        model = onnx.load(str(made))
    edges = _integer_edges(model.graph) if params["io"] == "int8" else {}
    path.write_bytes(stripped(model))
    computing = [node for node in model.graph.node if node.op_type not in _MOVES]
    return {
        "scheme": params["scheme"],
        "io": params["io"],
        "weights": "int8 a channel" + (", 7 bits" if params.get("reduce_range") else ""),
        "activations": "float32" if params["scheme"] == DYNAMIC_INT8 else "uint8",
        "inputs": [_edge(item, edges) for item in model.graph.input],
        "outputs": [_edge(item, edges) for item in model.graph.output],
        "ops": len(computing),
        "float_ops": _float_ops(model.graph, computing, dynamic=params["scheme"] == DYNAMIC_INT8),
    }


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


def _float_ops(graph: Any, computing: Sequence[Any], *, dynamic: bool) -> list[dict[str, Json]]:
    """Return the computing ops that work in float, with how many and why."""
    produced = {name: node for node in graph.node for name in node.output}

    def is_integer(node: Any) -> bool:
        if node.op_type in _INTEGER_OPS or node.op_type.startswith("QLinear"):
            return True
        first = produced.get(node.input[0]) if node.input else None
        return first is not None and first.op_type == "DequantizeLinear"

    found = Counter(node.op_type for node in computing if not is_integer(node))
    if dynamic:  # the arithmetic around an integer product belongs to it
        found = Counter({op: count for op, count in found.items() if op not in {"Add", "Mul"}})
    return [{"op": op, "count": count, "reason": _reason(op, dynamic=dynamic)} for op, count in sorted(found.items())]


def _reason(op: str, *, dynamic: bool) -> str:
    if dynamic and op == "Conv":
        return "a dynamic convolution is many times slower than float in onnxruntime"
    if dynamic:
        return "dynamic quantization keeps activations in float"
    return "onnxruntime's quantizer has no int8 form of it"


def _integer_edges(graph: Any) -> dict[str, tuple[float, int, int]]:
    """Take out the QuantizeLinear at each input and the DequantizeLinear at each output; return their scales and zero points."""
    from onnx import numpy_helper

    values = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    edges = {}
    for edge, op, side in [(item, "QuantizeLinear", "in") for item in graph.input] + [
        (item, "DequantizeLinear", "out") for item in graph.output
    ]:
        nodes = [n for n in graph.node if n.op_type == op and edge.name in (n.input[:1] if side == "in" else n.output)]
        users = [n for n in graph.node if edge.name in n.input]
        if len(nodes) != 1 or (side == "in" and len(users) != 1):
            raise StageError(
                f'quantize: io = "int8": \'{edge.name}\' is not quantized at the edge of the model; expected io = "float32" for it'
            )
        node = nodes[0]
        inner = node.output[0] if side == "in" else node.input[0]
        for other in graph.node:
            names = other.input if side == "in" else other.output
            names[:] = [edge.name if name == inner else name for name in names]
            if side == "out":
                other.input[:] = [edge.name if name == inner else name for name in other.input]
        zero_point = values[node.input[2]]
        edge.type.tensor_type.elem_type = {"uint8": 2, "int8": 3}[zero_point.dtype.name]
        edges[edge.name] = (float(values[node.input[1]]), int(zero_point), edge.type.tensor_type.elem_type)
        graph.node.remove(node)
    return edges


def _edge(item: Any, edges: Mapping[str, tuple[float, int, int]]) -> dict[str, Json]:
    import onnx

    scale, zero_point, _ = edges.get(item.name, (None, None, None))
    dtype = onnx.helper.tensor_dtype_to_np_dtype(item.type.tensor_type.elem_type).name
    return {"name": item.name, "dtype": dtype, "scale": scale, "zero_point": zero_point}
