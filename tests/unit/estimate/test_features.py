# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import onnx
import pytest
from ai_edge_litert import schema_py_generated as schema
from onnx import TensorProto, helper, numpy_helper

from edgekd.errors import StageError
from edgekd.estimate import features, operators

# 8x8x3 -> 3x3 -> 8x8x16 -> depthwise 3x3, stride 2 -> 4x4x16 -> pointwise -> 4x4x32 -> mean -> 32 -> 10
MACS = {"conv3x3": 64 * 16 * 27, "depthwise": 16 * 16 * 9, "pointwise": 16 * 16 * 32, "fully_connected": 320}
PARAMETERS = 16 * 27 + 16 * 9 + 16 * 32 + 320
# inputs and outputs of the convolutions, of the mean, and of the last layer
ELEMENTS = (192 + 1024) + (1024 + 256) + (256 + 512) + (512 + 32) + (32 + 10)


def _weights(name, *shape):
    return numpy_helper.from_array(np.ones(shape, np.float32), name)


def _save(path, nodes, weights, inputs, outputs):
    def value(name, shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(nodes, "g", [value(*item) for item in inputs], [value(*item) for item in outputs], weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("custom", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), str(path))
    return path


def _network(path, *, rounding=False):
    weights = [
        _weights("w0", 16, 3, 3, 3),
        _weights("w1", 16, 1, 3, 3),
        _weights("w2", 32, 16, 1, 1),
        _weights("w3", 32, 10),
        _weights("b", 10),
    ]
    nodes = []
    if rounding:
        weights += [numpy_helper.from_array(np.float32(0.1), "scale"), numpy_helper.from_array(np.int8(0), "zero")]

    def rounded(name):
        if not rounding:
            return name
        nodes.append(helper.make_node("QuantizeLinear", [name, "scale", "zero"], [f"{name}.q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}.q", "scale", "zero"], [f"{name}.r"]))
        return f"{name}.r"

    def add(op, inputs, output, **attributes):
        nodes.append(helper.make_node(op, inputs, [output], **attributes))

    add("Conv", [rounded("x"), rounded("w0")], "c0", pads=[1, 1, 1, 1], strides=[1, 1])
    add("Relu", [rounded("c0")], "r0")
    add("Conv", [rounded("r0"), rounded("w1")], "c1", pads=[1, 1, 1, 1], strides=[2, 2], group=16)
    add("Clip", ["c1"], "r1")
    add("Conv", [rounded("r1"), rounded("w2")], "c2")
    add("GlobalAveragePool", [rounded("c2")], "p")
    add("Flatten", ["p"], "f")
    add("MatMul", [rounded("f"), rounded("w3")], "m")
    add("Add", ["m", "b"], "y")
    return _save(path, nodes, weights, [("x", (1, 3, 8, 8))], [("y", (1, 10))])


def test_macs_parameters_and_activations_of_an_onnx_file_are_exact(tmp_path):
    counts = features.read_features(_network(tmp_path / "m.onnx"))
    assert counts.macs == MACS
    assert (counts.parameters, counts.activation_elements, counts.activation_bytes) == (PARAMETERS, ELEMENTS, 4 * ELEMENTS)
    assert counts.counts == {"conv3x3": 1, "depthwise": 1, "pointwise": 1, "elementwise": 1, "fully_connected": 1}  # activations are fused
    assert (counts.unfitted, counts.unknown) == ((), ())
    assert counts.amounts() == pytest.approx((0.008192, 0.027648, 0.002304, 0.00032, ELEMENTS / 1e6, PARAMETERS / 1e6, 5))


def test_rounding_in_a_quantized_onnx_file_is_no_operator(tmp_path):
    quantized = features.read_features(_network(tmp_path / "q.onnx", rounding=True))
    assert quantized.macs == MACS
    assert quantized.operators == 5
    assert quantized.activation_bytes == ELEMENTS


def test_operators_outside_of_the_fitted_set_are_named(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "t"], ["a"]),
        helper.make_node("Gelu", ["a"], ["b"], domain="custom"),
        helper.make_node("Mystery", ["x"], ["z"], domain="custom"),
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]),
    ]
    nodes = [nodes[3], nodes[0], nodes[1], nodes[2]]
    path = _save(tmp_path / "m.onnx", nodes, [], [("x", (4, 8))], [("b", (4, 4)), ("z", (4, 8))])
    counts = features.read_features(path)
    assert counts.macs == {"matmul": 4 * 4 * 8}
    assert counts.unfitted == ("Gelu", "MatMul")
    assert counts.unknown == ("Mystery",)


def test_a_first_axis_without_a_size_is_a_batch_of_one_and_another_is_refused(tmp_path):
    node, weights = helper.make_node("Conv", ["x", "w"], ["y"]), [_weights("w", 4, 3, 1, 1)]
    path = _save(tmp_path / "m.onnx", [node], weights, [("x", ("n", 3, 8, 8))], [("y", ("n", 4, 8, 8))])
    assert features.read_features(path).macs == {"pointwise": 64 * 12}
    path = _save(tmp_path / "d.onnx", [node], weights, [("x", ("n", 3, "h", 8))], [("y", ("n", 4, "h", 8))])
    with pytest.raises(StageError, match=r"d.onnx: the shape of tensor 'x' is not known; an estimate needs static shapes"):
        features.read_features(path)


def _tflite(path, tensors, operators):
    """Write a TFLite file: tensors are (shape, is constant), operators (name, inputs, outputs, options)."""
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version, model.description = 3, "test"
    empty, full = schema.BufferT(), schema.BufferT()
    full.data = [0, 0, 0, 0]
    model.buffers, model.subgraphs, model.operatorCodes = [empty, full], [graph], []
    graph.tensors, graph.operators, graph.inputs, graph.outputs = [], [], [0], [operators[-1][2][0]]
    for shape, constant in tensors:
        tensor = schema.TensorT()
        tensor.shape, tensor.type, tensor.buffer, tensor.name = list(shape), schema.TensorType.INT8, int(constant), f"t{len(graph.tensors)}"
        graph.tensors.append(tensor)
    for name, inputs, outputs, options in operators:
        code, operator = schema.OperatorCodeT(), schema.OperatorT()
        code.builtinCode = getattr(schema.BuiltinOperator, name)
        operator.opcodeIndex, operator.inputs, operator.outputs = len(model.operatorCodes), inputs, outputs
        if options is not None:
            operator.builtinOptionsType, operator.builtinOptions = getattr(schema.BuiltinOptions, type(options).__name__[:-1]), options
        model.operatorCodes.append(code)
        graph.operators.append(operator)
    import flatbuffers

    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return path


def _options(kind, stride):
    options = getattr(schema, kind)()
    options.strideH = options.strideW = stride
    return options


def test_a_tflite_file_has_the_features_of_the_same_network_in_onnx(tmp_path):
    tensors = [
        *[((1, 8, 8, 3), False), ((16, 3, 3, 3), True), ((1, 8, 8, 16), False), ((1, 3, 3, 16), True), ((1, 4, 4, 16), False)],
        *[((32, 1, 1, 16), True), ((1, 4, 4, 32), False), ((2,), True), ((1, 32), False), ((10, 32), True), ((1, 10), False)],
    ]
    nodes = [
        ("CONV_2D", [0, 1], [2], _options("Conv2DOptionsT", 1)),
        ("DEPTHWISE_CONV_2D", [2, 3], [4], _options("DepthwiseConv2DOptionsT", 2)),
        ("CONV_2D", [4, 5], [6], _options("Conv2DOptionsT", 1)),
        ("MEAN", [6, 7], [8], schema.ReducerOptionsT()),
        ("FULLY_CONNECTED", [8, 9], [10], schema.FullyConnectedOptionsT()),
    ]
    counts = features.read_features(_tflite(tmp_path / "m.tflite", tensors, nodes))
    reference = features.read_features(_network(tmp_path / "m.onnx"))
    assert counts.macs == reference.macs == MACS
    assert counts.amounts() == reference.amounts()
    assert counts.activation_bytes == ELEMENTS  # int8


def test_tflite_operators_outside_of_the_fitted_set_are_named(tmp_path):
    tensors = [((1, 4, 8), False), ((1, 8, 4), False), ((1, 4, 4), False), ((1, 4, 4), False)]
    product = ("BATCH_MATMUL", [0, 1], [2], schema.BatchMatMulOptionsT())
    recurrent = ("UNIDIRECTIONAL_SEQUENCE_LSTM", [2], [3], None)
    counts = features.read_features(_tflite(tmp_path / "m.tflite", tensors, [product, recurrent]))
    assert counts.macs == {"matmul": 16 * 8}
    assert (counts.unfitted, counts.unknown) == (("BATCH_MATMUL",), ("UNIDIRECTIONAL_SEQUENCE_LSTM",))


def test_another_format_is_refused(tmp_path):
    with pytest.raises(StageError, match=r"m.bin: features are read from .onnx and .tflite files only"):
        features.read_features(tmp_path / "m.bin")


def test_kinds_of_convolutions():
    kinds = [operators.conv_kind(*item) for item in (([3, 3], [1, 1], 1, 8), ([3, 3], [2, 2], 1, 8), ([3], [1], 1, 8), ([1], [1], 1, 8))]
    assert kinds == ["conv3x3", "conv", "conv", "pointwise"]
    assert [operators.conv_kind([3, 3], [1, 1], groups, 8) for groups in (8, 2)] == ["depthwise", "conv"]
    assert [operators.linear_kind(vectors) for vectors in (1, 16)] == ["fully_connected", "pointwise"]
