# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError
from edgekd.kd import modules
from edgekd.kd.teachers.load import load_teacher

CODE = """
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
    def forward(self, tokens):
        return self.head(self.embed(tokens).mean(1))

def net():
    body = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

def tied():
    return Tied()

def number():
    return 7

class Extra(nn.Linear):
    def get_extra_state(self):
        return {"steps": 3}

def extra():
    return Extra(2, 2)

class Pair(nn.Linear):
    def forward(self, x):
        return x, x

def pair():
    return Pair(2, 2)

class Wide(nn.Linear):
    def forward(self, x):
        return super().forward(x)[:, None]

def wide():
    return Wide(2, 2)
"""
NET = EntryPoint("kd_models_user.py", "net")


def entry(function):
    return EntryPoint("kd_models_user.py", function)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "kd_models_user.py").write_text(CODE)
    yield tmp_path
    sys.modules.pop("kd_models_user", None)


@pytest.fixture
def images():
    return np.random.default_rng(1).standard_normal((5, 1, 8, 8)).astype(np.float32)


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_a_student_is_loaded_from_its_weights_in_eval_mode(folder):
    torch.manual_seed(1)
    module = modules.build_module(folder, NET)
    modules.save_weights(module, folder / "student.safetensors")
    loaded = modules.load_module(folder, NET, folder / "student.safetensors")
    assert not loaded.training
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_equal_weights_give_equal_bytes_in_any_memory_layout(folder):
    module = modules.build_module(folder, NET)
    modules.save_weights(module, folder / "a.safetensors")
    modules.save_weights(module.to(memory_format=torch.channels_last), folder / "b.safetensors")
    assert (folder / "a.safetensors").read_bytes() == (folder / "b.safetensors").read_bytes()


def test_tied_weights_are_written_under_each_name_and_stay_tied(folder):
    module = modules.build_module(folder, entry("tied"))
    modules.save_weights(module, folder / "tied.safetensors")
    assert sorted(load_file(folder / "tied.safetensors")) == ["embed.weight", "head.weight"]
    loaded = modules.load_module(folder, entry("tied"), folder / "tied.safetensors")
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(loaded.head.weight, module.head.weight)
    assert modules.parameter_count(loaded) == 24


def test_state_that_is_not_a_tensor_is_refused(folder):
    with pytest.raises(RecipeError, match="_extra_state"):
        modules.save_weights(modules.build_module(folder, entry("extra")), folder / "x.safetensors")


def test_a_function_that_returns_no_module_is_refused(folder):
    with pytest.raises(RecipeError, match=r"kd_models_user.py:number: returned int; it must return a torch.nn.Module"):
        modules.build_module(folder, entry("number"))


def test_weights_that_do_not_match_are_named(folder):
    module = modules.build_module(folder, NET)
    weights = state(module)
    weights["extra.bias"] = weights.pop("6.bias")
    weights["6.weight"] = torch.zeros(9, 4)
    save_file(weights, folder / "w.safetensors")
    with pytest.raises(RecipeError) as caught:
        modules.load_module(folder, NET, folder / "w.safetensors")
    assert caught.value.problems == (
        "kd_models_user.py:net with w.safetensors: the weights lack 6.bias",
        "kd_models_user.py:net with w.safetensors: the module has no extra.bias",
        "kd_models_user.py:net with w.safetensors: 6.weight has shape [9, 4]; the module's is [3, 4]",
    )


def test_a_teacher_module_is_frozen(folder):
    modules.save_weights(modules.build_module(folder, NET), folder / "w.safetensors")
    module = modules.load_frozen_module(folder, NET, folder / "w.safetensors")
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_module_teacher_returns_its_logits_and_never_changes(folder, images):
    modules.save_weights(modules.build_module(folder, NET), folder / "w.safetensors")
    teacher = load_teacher(folder, NET, folder / "w.safetensors")
    module = modules.load_module(folder, NET, folder / "w.safetensors")
    first = teacher([images])
    with torch.no_grad():
        np.testing.assert_array_equal(first, module(torch.tensor(images)).numpy())
    assert first.dtype == np.float32
    np.testing.assert_array_equal(teacher([images]), first)  # dropout is off, batch norm keeps its statistics


@pytest.mark.parametrize(
    ("function", "message"),
    [("pair", "returned tuple; expected one tensor"), ("wide", r"shape \[5, 1, 2\] for 5 samples; expected logits")],
)
def test_outputs_that_are_not_logits_are_refused(folder, function, message):
    modules.save_weights(modules.build_module(folder, entry(function)), folder / "w.safetensors")
    teacher = load_teacher(folder, entry(function), folder / "w.safetensors")
    with pytest.raises(RecipeError, match=message):
        teacher([np.zeros((5, 2), np.float32)])


def test_a_file_of_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(
        RecipeError, match=r"teacher.file teacher.onx: expected one of .onnx, .pt2, .safetensors, .ts \(did you mean '.onnx'\?\)"
    ):
        load_teacher(tmp_path, None, tmp_path / "teacher.onx")
