# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError
from edgekd.kd.teachers import load
from edgekd.kd.teachers.load import load_exported_module, load_teacher

IMAGES = np.random.default_rng(2).standard_normal((5, 1, 8, 8)).astype(np.float32)


def network():
    torch.manual_seed(5)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    module = nn.Sequential(*layers)
    module(torch.randn(16, 1, 8, 8))  # batch norm gets statistics other than its initial ones
    return module.eval()


def expected():
    with torch.no_grad():
        return network()(torch.tensor(IMAGES)).numpy()


def digest(module):
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in module.state_dict().values())).hexdigest()


def export(path, batch):
    shapes = ({0: torch.export.Dim.DYNAMIC},) if batch is None else None
    torch.export.save(torch.export.export(network(), (torch.zeros(batch or 4, 1, 8, 8),), dynamic_shapes=shapes), path)
    return path


def onnx_file(path, batch="n", outputs=1):
    weight = numpy_helper.from_array(np.arange(64 * 3, dtype=np.float32).reshape(64, 3) / 100, "w")
    names = ["logits", "more"][:outputs]
    nodes = [helper.make_node("Flatten", ["x"], ["flat"]), *[helper.make_node("MatMul", ["flat", "w"], [name]) for name in names]]
    graph = helper.make_graph(
        nodes,
        "teacher",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 1, 8, 8])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 3]) for name in names],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize("starts_in_train_mode", [False, True])
def test_running_a_teacher_does_not_change_parameters_or_buffers(starts_in_train_mode):
    module = network().train(starts_in_train_mode)
    before = digest(module)
    teacher = load.teacher_from_module(module, EntryPoint("a.py", "net"))
    logits = [teacher([IMAGES]) for _ in range(3)]
    assert digest(module) == before
    assert not any(part.training for part in module.modules())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in module.parameters())
    np.testing.assert_array_equal(logits[0], expected())
    np.testing.assert_array_equal(logits[2], logits[0])


def test_a_teacher_whose_code_returns_to_train_mode_still_runs_in_eval_mode():
    class ReturnsToTrainMode(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            output = self.drop(x.flatten(1))
            self.train()
            return output

    teacher = load.teacher_from_module(ReturnsToTrainMode(), EntryPoint("a.py", "net"))
    np.testing.assert_array_equal(teacher([IMAGES]), IMAGES.reshape(5, -1))
    np.testing.assert_array_equal(teacher([IMAGES]), IMAGES.reshape(5, -1))


def test_torchscript_saved_in_train_mode_runs_in_eval_mode(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript; there still are such files
        torch.jit.script(network().train()).save(str(tmp_path / "teacher.ts"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher = load_teacher(tmp_path, None, tmp_path / "teacher.ts")
    np.testing.assert_allclose(teacher([IMAGES]), expected(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(teacher([IMAGES]), teacher([IMAGES]))


@pytest.mark.parametrize("batch", [None, 1])
def test_an_exported_program_takes_any_batch_size(tmp_path, batch):
    teacher = load_teacher(tmp_path, None, export(tmp_path / "teacher.pt2", batch))
    np.testing.assert_allclose(teacher([IMAGES]), expected(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(teacher([IMAGES[:2]]), expected()[:2], rtol=1e-5, atol=1e-6)


def test_an_exported_program_is_not_changed(tmp_path):
    path = export(tmp_path / "teacher.pt2", None)
    before = hashlib.sha256(path.read_bytes()).digest()
    teacher = load_teacher(tmp_path, None, path)
    np.testing.assert_array_equal(teacher([IMAGES]), teacher([IMAGES]))
    assert hashlib.sha256(path.read_bytes()).digest() == before


@pytest.mark.parametrize("batch", [None, 1])
def test_the_module_of_an_exported_program_can_be_exported_again(tmp_path, batch):
    module = load_exported_module(export(tmp_path / "teacher.pt2", batch))
    again = torch.export.export(module, (torch.zeros(1, 1, 8, 8),)).module()
    torch.testing.assert_close(again(torch.tensor(IMAGES[:1])).detach(), torch.tensor(expected()[:1]), rtol=1e-5, atol=1e-6)


def test_any_other_fixed_batch_size_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="fixed batch of 4; export it with a dynamic batch, or with 1"):
        load_teacher(tmp_path, None, export(tmp_path / "teacher.pt2", 4))
    with pytest.raises(RecipeError, match="fixed batch of 2"):
        load_teacher(tmp_path, None, onnx_file(tmp_path / "teacher.onnx", batch=2))


@pytest.mark.parametrize("batch", ["n", 1])
def test_an_onnx_teacher_takes_any_batch_size(tmp_path, batch):
    teacher = load_teacher(tmp_path, None, onnx_file(tmp_path / "teacher.onnx", batch))
    weights = np.arange(64 * 3, dtype=np.float32).reshape(64, 3) / 100
    logits = teacher([IMAGES])
    np.testing.assert_allclose(logits, IMAGES.reshape(5, -1) @ weights, rtol=1e-4, atol=1e-4)
    assert logits.dtype == np.float32


def test_an_onnx_teacher_with_two_outputs_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"has 2 outputs \(logits, more\); a teacher has one"):
        load_teacher(tmp_path, None, onnx_file(tmp_path / "teacher.onnx", outputs=2))


def test_an_onnx_teacher_with_other_inputs_is_refused(tmp_path):
    teacher = load_teacher(tmp_path, None, onnx_file(tmp_path / "teacher.onnx"))
    with pytest.raises(RecipeError, match=r"has 1 inputs; student.inputs names 2"):
        teacher([IMAGES, IMAGES])
    with pytest.raises(RecipeError, match="ONNX Runtime failed"):
        teacher([IMAGES[:, 0]])


@pytest.mark.parametrize("name", ["teacher.ts", "teacher.pt2", "teacher.onnx"])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"not a network")
    with pytest.raises(RecipeError, match=name) as caught:
        load_teacher(tmp_path, None, tmp_path / name)
    assert "\n" not in str(caught.value)


def test_an_error_inside_a_file_is_reported_with_its_name(tmp_path):
    teacher = load_teacher(tmp_path, None, export(tmp_path / "teacher.pt2", None))
    with pytest.raises(RecipeError, match=r"teacher\.pt2"):
        teacher([IMAGES[:, :, :2, :2]])
