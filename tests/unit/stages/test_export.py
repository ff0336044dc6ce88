# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
import torch

from edgekd import registry
from edgekd.domain.artifact import Artifact
from edgekd.domain.recipe import Data, Distill, EntryPoint, Recipe, Student, Teacher, TensorSpec
from edgekd.domain.target import Cpu, DeviceEntry, Limits, Protocol, RuntimeEntry, Target
from edgekd.errors import StageError
from edgekd.kd import modules
from edgekd.ports import Context
from edgekd.stages import export
from edgekd.store.digests import file_digest

CODE = """
import torch
from torch import nn

def student():
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(28, 3))

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(18, 3)

    def forward(self, x):
        y = self.out(x.flatten(1))
        if y.sum() > 0:
            return y
        return -y

class Noisy(Branches):
    def forward(self, x):
        return self.out(x.flatten(1)) + torch.rand(3)
"""
RUNTIMES = ("litert", "onnxruntime")
SAMPLES = np.random.default_rng(0).standard_normal((80, 2, 9)).astype(np.float32)


def entry(function):
    return EntryPoint("export_user.py", function)


SPECS = (TensorSpec("x", (1, 2, 9)),)


def recipe(student="student", **teacher):
    return Recipe(
        schema=1,
        name="t",
        data=Data(entry("splits")),
        teacher=Teacher(**(teacher or {"model": entry("student"), "weights": "w.safetensors"})),
        student=Student(entry(student), SPECS),
        distill=Distill(epochs=1),
    )


def target(*runtimes):
    return Target(
        schema=1,
        name="board",
        title="A board",
        cpu=Cpu("armv8-a", "cortex-a72", 4, 1800, ("asimd",)),
        limits=Limits(1024, 1024),
        runtimes=tuple(RuntimeEntry(name, registry.runtime(name).PACKAGE, (1,)) for name in runtimes),
        schemes=("float32",),
        device=DeviceEntry(("ssh",), "aarch64"),
        protocol=Protocol(1, 1, 1),
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "export_user.py").write_text(CODE)
    np.save(tmp_path / "x.npy", SAMPLES)
    yield tmp_path
    sys.modules.pop("export_user", None)


def weights(folder, function="student"):
    torch.manual_seed(0)
    module = modules.build_module(folder, entry(function))
    with torch.no_grad():
        module(torch.from_numpy(SAMPLES))  # so that batch norm has statistics
    modules.save_weights(module, folder / f"{function}.safetensors")
    return folder / f"{function}.safetensors"


def run(folder, step, path, out="out"):
    for name in (out, "work"):
        (folder / name).mkdir()
    inputs = {"weights": Artifact(path, "", 0), "inputs.0": Artifact(folder / "x.npy", "", 0)}
    result = export.run(step, inputs, Context(folder, folder / out, folder / "work", lambda *_: None))
    (folder / "work").rmdir()
    return result, folder / out


def find_step(recipe, name):
    return next(step for step in export.steps(recipe, [target(*RUNTIMES)]) if step.id == name)


def test_targets_share_a_step_for_student_and_teacher_and_a_dry_run_on_each_runtime():
    steps = export.steps(recipe(), [target("litert"), target("onnxruntime", "litert")])
    assert [step.id for step in steps] == [f"export/{network}/{name}" for name in RUNTIMES for network in ("dry_run", "student", "teacher")]
    dry_run, student, teacher = steps[:3]
    assert dry_run.inputs == {**student.inputs, "weights": "inspect:student.fresh.safetensors"}
    assert student.inputs == {
        "weights": "distill:student.safetensors",
        "code": "inspect:student.code.json",
        "inputs.0": "inspect:evaluation.inputs.0.npy",
    }
    assert teacher.inputs["weights"] == "inspect:teacher.safetensors"
    assert teacher.inputs["code"] == "inspect:teacher.code.json"
    assert (student.params.runtime, student.params.model, student.params.inputs) == ("litert", "export_user.py:student", SPECS)
    assert student.tools == ("torch", "litert-torch", "litert-converter", "jax", "ai-edge-litert")


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_student_is_exported_with_its_parity(folder, name):
    result, out = run(folder, find_step(recipe(), f"export/student/{name}"), weights(folder))
    parity = json.loads((out / "parity.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == [f"model.{registry.runtime(name).FORMAT}", "parity.json"]
    assert (parity["samples"], parity["agreement"], parity["ok"]) == (64, 1.0, True)
    assert 0 < parity["max_abs_error"] < parity["tolerance"] / 50
    assert parity["psnr_db"] > 100
    assert result.metrics["parity"] == parity


@pytest.mark.parametrize("name", RUNTIMES)
def test_different_outputs_are_recorded_with_the_reason_why_they_cannot_ship(folder, name):
    result, out = run(folder, find_step(recipe("Noisy"), f"export/student/{name}"), weights(folder, "Noisy"))
    parity = json.loads((out / "parity.json").read_text())
    assert parity["ok"] is False
    assert parity["max_abs_error"] > parity["tolerance"]
    assert re.fullmatch(
        r"its outputs differ from PyTorch's by \S+ on 64 samples; allowed is \S+: an op was converted wrongly", result.metrics["why_not"]
    )


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_student_that_cannot_be_exported_is_reported_with_its_line(folder, name):
    with pytest.raises(StageError) as caught:
        run(folder, find_step(recipe("Branches"), f"export/student/{name}"), weights(folder, "Branches"))
    text = str(caught.value)
    assert text.startswith(f"export/student/{name}: ")
    assert "data-dependent" in text
    assert text.endswith("(export_user.py:15)")
    assert "\n" not in text


def whole_model(folder, suffix):
    """Write the student as a whole-model file and return its path."""
    module = modules.load_module(folder, entry("student"), weights(folder))
    path, sample = folder / f"teacher{suffix}", torch.zeros(1, 2, 9)
    if suffix == ".ts":
        torch.jit.trace(module, sample).save(path)
    elif suffix == ".pt2":
        torch.export.save(torch.export.export(module, (sample,)), path)
    else:
        registry.runtime("onnxruntime").export(module, recipe().student.inputs, path)
    return path


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize(
    ("suffix", "name", "why_not"),
    [
        (".onnx", "onnxruntime", None),
        (".onnx", "litert", "an ONNX file cannot be converted to tflite"),
        (".ts", "onnxruntime", None),
        (".ts", "litert", "litert-torch cannot convert TorchScript; save the model with torch.export.save, or as weights"),
        (".pt2", "onnxruntime", None),
        (".pt2", "litert", None),
    ],
)
def test_a_teacher_that_is_a_whole_model(folder, suffix, name, why_not):
    path = whole_model(folder, suffix)
    step = find_step(recipe(file=path.name), f"export/teacher/{name}")
    assert (step.inputs["weights"], step.params.model) == (f"inspect:teacher{suffix}", None)
    if why_not is not None:
        with pytest.raises(StageError, match=re.escape(why_not)):
            run(folder, step, path)
        return
    _, out = run(folder, step, path)
    assert json.loads((out / "parity.json").read_text())["ok"]
    if suffix == ".onnx":
        assert file_digest(out / "model.onnx") == file_digest(path)
