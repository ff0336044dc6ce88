# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from edgekd import registry
from edgekd.domain.artifact import Artifact
from edgekd.domain.recipe import Data, Distill, EntryPoint, Recipe, Student, Teacher, TensorSpec
from edgekd.domain.scheme import Quantize
from edgekd.domain.target import Cpu, DeviceEntry, Limits, Protocol, RuntimeEntry, Target
from edgekd.errors import RecipeError, StageError
from edgekd.plan import is_dry_run
from edgekd.ports import Context
from edgekd.stages import quantize
from edgekd.stages.quantize import QuantizeParams

SPECS = (TensorSpec("x", (1, 6)),)


def recipe(**changes):
    return Recipe(
        schema=1,
        name="t",
        data=Data(EntryPoint("d.py", "splits")),
        teacher=Teacher(EntryPoint("m.py", "teacher"), "w.safetensors"),
        student=Student(EntryPoint("m.py", "student"), SPECS),
        distill=Distill(epochs=1),
        quantize=Quantize(**changes),
    )


def target(name="board", arch="aarch64", features=("asimd",)):
    return Target(
        schema=1,
        name=name,
        title="A board",
        cpu=Cpu("any", "any", 4, 1800, features),
        limits=Limits(1024, 1024),
        runtimes=(RuntimeEntry("litert", "ai-edge-litert", (1,)), RuntimeEntry("onnxruntime", "onnxruntime", (1,))),
        schemes=("float32", "static_wi8_ai8", "dynamic_wi8_afp32"),
        device=DeviceEntry(("ssh",), arch),
        protocol=Protocol(1, 1, 1),
    )


@pytest.fixture(scope="module")
def mlp(tmp_path_factory):
    """Return the ONNX file of a small net."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("mlp") / "model.onnx"
    registry.runtime("onnxruntime").export(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), SPECS, path)
    return path


def run(folder, step, model, calibration):
    for name in ("out", "work"):
        (folder / name).mkdir()
    np.save(folder / "c.npy", calibration)
    inputs = {"model": Artifact(model, "", 0)}
    inputs |= {name: Artifact(folder / "c.npy", "", 0) for name in step.inputs if name.startswith("calibration")}
    result = quantize.run(step, inputs, Context(folder, folder / "out", folder / "work", lambda *_: None))
    return result, json.loads((folder / "out" / "scheme.json").read_text())


def find_step(name, changed=None):
    return next(step for step in quantize.steps(changed or recipe(), [target()]) if step.id == name)


def real_steps(recipe, *targets):
    """Return the steps except for dry runs."""
    return [step for step in quantize.steps(recipe, targets) if not is_dry_run(step.id)]


def test_each_candidate_has_a_step_and_only_static_ones_read_the_calibration_set():
    steps = {step.id: step for step in quantize.steps(recipe(), [target(), target("other")])}
    assert sorted(steps) == [
        f"quantize/{prefix}{runtime}/{scheme}/ptq"
        for prefix in ("dry_run/", "")
        for runtime in ("litert", "onnxruntime")
        for scheme in ("dynamic_wi8_afp32", "static_wi8_ai8")
    ]
    static, dynamic = steps["quantize/litert/static_wi8_ai8/ptq"], steps["quantize/onnxruntime/dynamic_wi8_afp32/ptq"]
    assert static.inputs == {"model": "export/student/litert:model.tflite", "calibration.0": "inspect:calibration.inputs.0.npy"}
    assert dynamic.inputs == {"model": "export/student/onnxruntime:model.onnx"}
    assert static.params.options == {"scheme": "static_wi8_ai8", "io": "float32"}
    assert static.params.instruction_set is not None
    assert dynamic.params == QuantizeParams("onnxruntime", {"scheme": "dynamic_wi8_afp32", "io": "float32"}, None)
    dry_run = steps["quantize/dry_run/onnxruntime/dynamic_wi8_afp32/ptq"]  # it is run on samples, so it reads some
    assert dry_run.inputs == {"model": "export/dry_run/onnxruntime:model.onnx", "calibration.0": "inspect:calibration.inputs.0.npy"}
    assert dry_run.params.samples == 8
    assert static.tools == ("ai-edge-quantizer", "ai-edge-litert", "numpy")


def test_targets_with_different_cpus_share_the_steps_that_do_not_depend_on_the_cpu():
    steps = [step.id for step in real_steps(recipe(), target(), target("old", "x86_64", ("avx2",)))]
    assert [step for step in steps if "reduce_range" in step] == [
        "quantize/onnxruntime/static_wi8_ai8/ptq/reduce_range=True",
        "quantize/onnxruntime/dynamic_wi8_afp32/ptq/reduce_range=True",
    ]
    assert len(steps) == len(set(steps)) == 6


def test_integer_inputs_and_outputs_leave_only_static_candidates():
    steps = [step.id for step in real_steps(recipe(io="int8"), target())]
    assert steps == ["quantize/litert/static_wi8_ai8/ptq/io=int8", "quantize/onnxruntime/static_wi8_ai8/ptq/io=int8"]
    with pytest.raises(RecipeError, match="'dynamic_wi8_afp32' has float inputs and outputs; quantize.io = \"int8\" needs a static scheme"):
        quantize.steps(recipe(io="int8", schemes=("static_wi8_ai8", "dynamic_wi8_afp32")), [target()])


def test_a_static_candidate_has_its_scheme_file(mlp, tmp_path):
    calibration = np.random.default_rng(0).standard_normal((20, 6)).astype(np.float32)
    result, scheme = run(tmp_path, find_step("quantize/onnxruntime/static_wi8_ai8/ptq"), mlp, calibration)
    assert (scheme["scheme"], scheme["io"], scheme["calibration_samples"]) == ("static_wi8_ai8", "float32", 20)
    assert (result.metrics["ops"], result.metrics["float_ops"], result.notes) == (2, 0, ())
    assert result.metrics["size_bytes"] == (tmp_path / "out" / "model.onnx").stat().st_size


def test_a_large_calibration_set_is_sampled_evenly(mlp, tmp_path):
    rows = 4 * quantize.MAX_SAMPLES
    calibration = np.repeat(np.linspace(0, 7, rows, dtype=np.float32)[:, None], 6, axis=1)  # sorted, as by class
    integer_io = recipe(io="int8")
    _, scheme = run(tmp_path, find_step("quantize/onnxruntime/static_wi8_ai8/ptq/io=int8", integer_io), mlp, calibration)
    assert scheme["calibration_samples"] == quantize.MAX_SAMPLES
    assert scheme["inputs"][0]["scale"] == pytest.approx(7 / 255)


def test_a_dynamic_candidate_notes_what_stays_float(mlp, tmp_path):
    result, _ = run(tmp_path, find_step("quantize/onnxruntime/dynamic_wi8_afp32/ptq"), mlp, [])
    assert result.notes == ("Relu (1) stays float: activations stay float in a dynamic scheme",)
    assert result.metrics["float_ops"] == 1


def test_a_model_without_a_quantized_op_is_noted(tmp_path):
    path = tmp_path / "conv.onnx"
    registry.runtime("onnxruntime").export(nn.Conv1d(2, 3, 3).eval(), (TensorSpec("x", (1, 2, 6)),), path)
    result, scheme = run(tmp_path, find_step("quantize/onnxruntime/dynamic_wi8_afp32/ptq"), path, [])
    assert scheme["integer_ops"] == []
    assert result.notes[0] == "nothing was quantized: no op of the model has an int8 form under dynamic_wi8_afp32"


def test_a_refusal_of_the_quantizer_names_the_step(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(StageError, match=r"quantize/onnxruntime/static_wi8_ai8/ptq: onnxruntime's quantizer refuses static_wi8_ai8: "):
        run(tmp_path, find_step("quantize/onnxruntime/static_wi8_ai8/ptq"), tmp_path / "model.onnx", np.zeros((4, 6), np.float32))


def test_a_dry_run_refuses_a_file_whose_outputs_are_not_finite(tmp_path):
    class Infinite(nn.Module):
        def forward(self, x):
            return x / (x - x)

    registry.runtime("onnxruntime").export(Infinite().eval(), SPECS, tmp_path / "model.onnx")
    with pytest.raises(
        StageError, match="quantize/dry_run/onnxruntime/dynamic_wi8_afp32/ptq: model.onnx: returns outputs that are not finite"
    ):
        run(tmp_path, find_step("quantize/dry_run/onnxruntime/dynamic_wi8_afp32/ptq"), tmp_path / "model.onnx", np.ones((4, 6), np.float32))


def test_a_dry_run_calibrates_on_few_samples(mlp, tmp_path):
    calibration = np.random.default_rng(0).standard_normal((20, 6)).astype(np.float32)
    _, scheme = run(tmp_path, find_step("quantize/dry_run/onnxruntime/static_wi8_ai8/ptq"), mlp, calibration)
    assert scheme["calibration_samples"] == 8
