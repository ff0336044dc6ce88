# SPDX-License-Identifier: Apache-2.0
"""Evaluation: its steps, and the outputs and scores of modules and of model files."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from edgekd import registry, usercode
from edgekd.domain.artifact import Artifact
from edgekd.domain.recipe import Baselines, Data, Distill, EntryPoint, Evaluate, Recipe, Student, Teacher, TensorSpec
from edgekd.domain.target import Cpu, DeviceEntry, Limits, Protocol, RuntimeEntry, Target
from edgekd.errors import RecipeError, StageError
from edgekd.kd import modules
from edgekd.ports import Context
from edgekd.stages import evaluate

CODE = """
import numpy as np
from torch import nn

def net():
    return nn.Linear(4, 3)

def half(outputs, labels):
    return np.full(len(labels), 0.5)

def percent(outputs, labels):
    return np.full(len(labels), 50.0)

def accuracy(outputs, labels):
    return (outputs.argmax(1) == labels).mean()

def undefined_without_sample_0(outputs, labels):
    return 0.5 if abs(outputs[:, 0] - FIRST).min() < 1e-6 else float("nan")

def raises_without_sample_0(outputs, labels):
    return 0.5 if abs(outputs[:, 0] - FIRST).min() < 1e-6 else None

def spoils(outputs, labels):
    value = (outputs.argmax(1) == labels).mean()
    labels[:], outputs[:] = 0, 0
    return value
"""
CODE += "\nFIRST = %r\n"
SPECS = (TensorSpec("x", (1, 4)),)
SAMPLES = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32)
WEIGHT = np.eye(4, dtype=np.float32)[:3]
LABELS = SAMPLES[:, :3].argmax(1)
LABELS[:10] = (LABELS[:10] + 1) % 3  # a quarter is wrong


def entry(function):
    return EntryPoint("evaluate_user.py", function)


def recipe(**changes):
    plain = Recipe(
        schema=1,
        name="t",
        data=Data(entry("splits")),
        teacher=Teacher(entry("net"), "w.safetensors"),
        student=Student(entry("net"), SPECS),
        distill=Distill(epochs=1),
    )
    return replace(plain, **changes)


TARGET = Target(
    schema=1,
    name="board",
    title="A board",
    cpu=Cpu("armv8-a", "cortex-a72", 4, 1800, ("asimd",)),
    limits=Limits(1024, 1024),
    runtimes=(RuntimeEntry("onnxruntime", "onnxruntime", (1,)),),
    schemes=("float32", "static_wi8_ai8"),
    device=DeviceEntry(("ssh",), "aarch64"),
    protocol=Protocol(1, 1, 1),
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "evaluate_user.py").write_text(CODE % float(SAMPLES[0, 0]))
    np.save(tmp_path / "inputs.0", SAMPLES)
    np.save(tmp_path / "labels", LABELS)
    np.save(tmp_path / "groups", np.arange(40) % 20)
    (tmp_path / "parts.npy").write_text('{"parts": 100}')
    yield tmp_path
    usercode.forget_modules()


def linear(weight=WEIGHT):
    module = nn.Linear(4, 3)
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(weight))
        module.bias.zero_()
    return module.eval()


def find_step(name, changed=None):
    return next(step for step in evaluate.steps(changed or recipe(), [TARGET]) if step.id == name)


def run(folder, step, model):
    for name in ("out", "work"):
        (folder / name).mkdir()
    inputs = {name: Artifact(folder / f"{name}.npy", "", 0) for name in ("inputs.0", "labels", "groups", "parts")}
    context = Context(folder, folder / "out", folder / "work", lambda *_: None)
    result = evaluate.run(step, {"model": Artifact(model, "", 0), **inputs}, context)
    return result, json.loads((folder / "out" / "summary.json").read_text())


def weights(folder, weight=WEIGHT):
    modules.save_weights(linear(weight), folder / "student.safetensors")
    return folder / "student.safetensors"


def test_a_step_for_each_network_and_each_model_file():
    steps = {step.id: step for step in evaluate.steps(recipe(distill=Distill(epochs=1, baselines=Baselines(seeds=2))), [TARGET])}
    baselines = [
        f"evaluate/distill/{name}"
        for name in ("distilled/1", *(f"{method}/{n}" for method in ("no_teacher", "label_smoothing") for n in (0, 1)))
    ]
    model_files = ["evaluate/export/student/onnxruntime", "evaluate/quantize/onnxruntime/static_wi8_ai8/ptq"]
    assert list(steps) == ["evaluate/teacher", "evaluate/student", *baselines, *model_files]
    student, model_file = steps["evaluate/student"], steps["evaluate/export/student/onnxruntime"]
    assert (student.params.model, student.params.runtime) == ("evaluate_user.py:net", None)
    assert (model_file.params.model, model_file.params.runtime, model_file.params.threads) == (None, "onnxruntime", 1)
    assert student.inputs["model"] == "distill:student.safetensors"
    assert model_file.inputs["model"] == "export/student/onnxruntime:model.onnx"
    assert "code" not in model_file.inputs


def test_a_module_is_scored_by_top1(folder):
    result, summary = run(folder, find_step("evaluate/student"), weights(folder))
    assert np.allclose(np.load(folder / "out" / "outputs.npy"), SAMPLES[:, :3], atol=1e-6)
    assert np.load(folder / "out" / "scores.npy").tolist() == [0.0] * 10 + [1.0] * 30
    assert summary["accuracy"] == result.metrics["accuracy"] == 0.75
    assert (summary["samples"], summary["groups"]) == (40, 20)
    assert sum(item["samples"] for item in summary["classes"].values()) == 40


def test_a_model_file_has_the_scores_of_its_module(folder):
    registry.runtime("onnxruntime").export(linear(), SPECS, folder / "model.onnx")
    _, summary = run(folder, find_step("evaluate/export/student/onnxruntime"), folder / "model.onnx")
    assert np.allclose(np.load(folder / "out" / "outputs.npy"), SAMPLES[:, :3], atol=1e-6)
    assert summary["accuracy"] == 0.75


def test_a_user_score_replaces_top1(folder):
    _, summary = run(folder, find_step("evaluate/student", recipe(evaluate=Evaluate(score=entry("half")))), weights(folder))
    assert np.load(folder / "out" / "scores.npy").tolist() == [0.5] * 40
    assert summary["accuracy"] == 0.5


def test_a_user_metric_is_computed_without_each_group(folder):
    result, summary = run(folder, find_step("evaluate/student", recipe(evaluate=Evaluate(metric=entry("accuracy")))), weights(folder))
    is_correct = SAMPLES[:, :3].argmax(1) == LABELS
    without_group = np.load(folder / "out" / "jackknife.npy")
    assert summary["accuracy"] == 0.75
    assert "classes" not in summary
    assert without_group == pytest.approx([is_correct[np.arange(40) % 20 != group].mean() for group in range(20)])
    assert (summary["parts"], summary["undefined"], summary["support"]) == (20, 0, 20)
    assert result.metrics == {"accuracy": 0.75, "undefined": 0, "parts": 20}


def test_a_slow_metric_is_computed_without_fewer_parts(folder):
    (folder / "parts.npy").write_text('{"parts": 5}')
    run(folder, find_step("evaluate/student", recipe(evaluate=Evaluate(metric=entry("accuracy")))), weights(folder))
    assert len(np.load(folder / "out" / "jackknife.npy")) == 5


@pytest.mark.parametrize("metric", ["undefined_without_sample_0", "raises_without_sample_0"])
def test_a_metric_that_is_undefined_without_a_group_is_counted(folder, metric):
    result, _ = run(folder, find_step("evaluate/student", recipe(evaluate=Evaluate(metric=entry(metric)))), weights(folder))
    assert np.flatnonzero(np.isnan(np.load(folder / "out" / "jackknife.npy"))).tolist() == [0]
    assert result.metrics == {"accuracy": 0.5, "undefined": 1, "parts": 20}


def test_a_metric_cannot_change_outputs_and_labels(folder):
    _, summary = run(folder, find_step("evaluate/student", recipe(evaluate=Evaluate(metric=entry("spoils")))), weights(folder))
    assert summary["accuracy"] == 0.75
    assert np.load(folder / "out" / "jackknife.npy").mean() == pytest.approx(0.75)


def test_invalid_scores_are_refused(folder):
    with pytest.raises(RecipeError, match=r"percent: returned ndarray of shape \[40\] for 40 samples; expected 40 scores from 0 to 1"):
        run(folder, find_step("evaluate/student", recipe(evaluate=Evaluate(score=entry("percent")))), weights(folder))


def test_a_metric_that_is_undefined_for_a_model_file_is_about_that_file(folder):
    registry.runtime("onnxruntime").export(linear(), SPECS, folder / "model.onnx")
    changed = recipe(evaluate=Evaluate(metric=entry("undefined_without_sample_0")))
    (folder / "evaluate_user.py").write_text(CODE % 99.0)
    with pytest.raises(StageError, match="evaluate/export/student/onnxruntime: .*returned float nan; expected one finite number"):
        run(folder, find_step("evaluate/export/student/onnxruntime", changed), folder / "model.onnx")


def test_outputs_that_are_not_finite_are_refused(folder):
    with pytest.raises(StageError, match=r"evaluate/student: the output for sample 0 is not finite \(40 of 40 samples\)"):
        run(folder, find_step("evaluate/student"), weights(folder, np.full_like(WEIGHT, np.inf)))


@pytest.mark.parametrize(
    ("array", "tensor", "expected"),
    [
        (np.float32([0.5, -9.0]), {"dtype": "int8", "scale": 0.25, "zero_point": 1}, [3, -35]),
        (np.float32([99.0, -99.0]), {"dtype": "int8", "scale": 0.25, "zero_point": 1}, [127, -128]),
        (np.int64([3, 4]), {"dtype": "int32", "scale": None, "zero_point": None}, [3, 4]),
        (np.float32([0.5]), {"dtype": "float32", "scale": None, "zero_point": None}, [0.5]),
    ],
)
def test_inputs_get_the_type_of_the_model_file(array, tensor, expected):
    result = evaluate._quantize_input(array, tensor)
    assert result.dtype.name == tensor["dtype"]
    assert result.tolist() == expected


def test_float_samples_for_an_integer_input_without_a_scale_are_refused():
    with pytest.raises(StageError, match="the model expects int32 for input 'x' without a scale, and the samples are float32"):
        evaluate._quantize_input(np.zeros(2, np.float32), {"name": "x", "dtype": "int32", "scale": None, "zero_point": None})
