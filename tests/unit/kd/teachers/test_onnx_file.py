# SPDX-License-Identifier: Apache-2.0
"""ONNX teachers that cannot be read, or that are more than one file."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.errors import RecipeError
from edgekd.kd.teachers.load import teacher_from_onnx
from edgekd.kd.teachers.onnx_file import read_onnx

BATCH = [np.ones((2, 3), np.float32)]


def model(weight=None, domain="", opset=18, name="x", dtype=TensorProto.FLOAT, shape=("n", 3), nodes=None):
    weight = numpy_helper.from_array(np.ones((3, 2), np.float32), "w") if weight is None else weight
    graph = helper.make_graph(
        nodes or [helper.make_node("MatMul", [name, "w"], ["y"], domain=domain)],
        "g",
        [helper.make_tensor_value_info(name, dtype, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("n", 2))],
        [weight],
    )
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def external(location):
    tensor = numpy_helper.from_array(np.ones((3, 2), np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def write(folder, content):
    path = folder / "teacher.onnx"
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    return path


def test_a_sound_file_is_read(tmp_path):
    assert teacher_from_onnx(write(tmp_path, model()))(BATCH).tolist() == [[3, 3], [3, 3]]


@pytest.mark.parametrize("location", ["teacher.onnx.data", "../secret", "/etc/hostname", ""])
def test_external_data_is_refused_with_the_command_that_merges_it(tmp_path, monkeypatch, location):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher.onnx.data").write_bytes(np.ones((3, 2), np.float32).tobytes())
    with pytest.raises(RecipeError, match="teacher.onnx: has external data: 'w' is in .*; expected one file .* python -c \"import onnx; "):
        teacher_from_onnx(write(tmp_path, model(external(location))))


def test_the_command_merges_the_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    onnx.save(model(), "teacher.onnx", save_as_external_data=True, size_threshold=0)
    with pytest.raises(RecipeError, match="external data") as caught:
        read_onnx(tmp_path / "teacher.onnx")
    code = str(caught.value).partition('python -c "')[2].rstrip('"')
    exec(code, {})  # noqa: S102  (the command of the message)
    assert teacher_from_onnx(tmp_path / "teacher_merged.onnx")(BATCH).tolist() == [[3, 3], [3, 3]]


def test_external_data_in_a_constant_of_a_branch_is_refused(tmp_path):
    constant = helper.make_node("Constant", [], ["c"], value=external("elsewhere"))
    branch = helper.make_graph([constant], "branch", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, (3, 2))])
    nodes = [
        helper.make_node("If", ["condition"], ["v"], then_branch=branch, else_branch=branch),
        helper.make_node("MatMul", ["x", "v"], ["y"]),
    ]
    with pytest.raises(RecipeError, match="external data: 'w' is in 'elsewhere'"):
        read_onnx(write(tmp_path, model(nodes=nodes)))


def test_a_tensor_that_declares_more_than_it_holds_is_refused(tmp_path):
    for dims in ([2**40, 2**20], [3, 1000], [-1, 3]):
        weight = numpy_helper.from_array(np.ones((3, 2), np.float32), "w")
        weight.dims[:] = dims
        with pytest.raises(RecipeError, match="teacher.onnx: 'w' has the shape"):
            read_onnx(write(tmp_path, model(weight)))


@pytest.mark.parametrize("content", [b"", b"\x00", b"not an onnx file", b"\x08\x0a" * 500])
def test_a_file_that_is_not_onnx_is_refused(tmp_path, content):
    with pytest.raises(RecipeError, match="teacher.onnx: is not a"):
        read_onnx(write(tmp_path, content))


def test_a_truncated_file_is_refused(tmp_path):
    content = model().SerializeToString()
    for size in range(0, len(content) - 1, 7):
        with pytest.raises(RecipeError, match="teacher.onnx: "):
            teacher_from_onnx(write(tmp_path, content[:size]))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (model(domain="com.example"), "ONNX Runtime cannot load it: .*com.example"),
        (model(opset=99), "ONNX Runtime cannot load it: .*(99|opset)"),
        (model(shape=("n", 4)), "ONNX Runtime"),
        (model(dtype=TensorProto.DOUBLE), "ONNX Runtime"),
        (model(shape=(5, 3)), "has a fixed batch of 5"),
        (model(nodes=[helper.make_node("MatMul", ["nowhere", "w"], ["y"])]), "ONNX Runtime cannot load it"),
    ],
)
def test_a_model_that_onnxruntime_cannot_run_is_refused_in_one_line(tmp_path, changed, message):
    with pytest.raises(RecipeError, match=f"teacher.onnx: {message}") as caught:
        teacher_from_onnx(write(tmp_path, changed))(BATCH)
    assert "\n" not in str(caught.value)
