# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sys
import weakref
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from edgekd.domain.artifact import Artifact
from edgekd.domain.losses import Loss
from edgekd.domain.recipe import Data, Distill, EntryPoint, Recipe, Student, Teacher, TensorSpec, Training
from edgekd.errors import RecipeError
from edgekd.kd import data, modules, views
from edgekd.kd.output_spec import OutputSpec
from edgekd.kd.soft_targets import storage
from edgekd.kd.teachers import layouts
from edgekd.kd.teachers.load import load_teacher
from edgekd.kd.training import execution
from edgekd.ports import Context
from edgekd.stages import soft_targets
from tests.stored import stored as stored_logits

CODE = """
import torch
from torch import nn

class Counting(nn.Sequential):
    batches = []
    def forward(self, x, y):
        self.batches.append(len(x))
        return super().forward(torch.cat([x, y], dim=1))

def teacher():
    return Counting(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))

def noisy(inputs, generator):
    return tuple(item + torch.randn(item.shape, generator=generator) for item in inputs)
"""
ENTRY = EntryPoint("user_teacher.py", "teacher")
COUNTS = {"train": 5000, "validation": 40, "unlabelled": 0}
FIRST_SAMPLES = soft_targets.BATCH_SIZE + 1  # a batch to compare layouts with, and one for the number of classes
EXTRA_SAMPLES = FIRST_SAMPLES + 2 * storage.SPOT_ROWS  # a few of each split for the spot check


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "user_teacher.py").write_text(CODE)
    (tmp_path / "work").mkdir()
    yield tmp_path
    sys.modules.pop("user_teacher", None)


def recipe():
    return Recipe(
        schema=1,
        name="t",
        data=Data(ENTRY),
        teacher=Teacher(ENTRY, "teacher.safetensors"),
        student=Student(ENTRY, (TensorSpec("x", (1, 4)), TensorSpec("y", (1, 1)))),
        distill=Distill(epochs=1, threads=1),
    )


def artifacts(folder, counts=COUNTS):
    generator = np.random.default_rng(1)
    inputs = {}
    for split, count in counts.items():
        for index, width in enumerate((4, 1)):
            path = folder / f"{split}.inputs.{index}.npy"
            np.save(path, generator.standard_normal((count, width)).astype(np.float32))
            inputs[f"{split}.inputs.{index}"] = Artifact(path, "", 0)
    torch.manual_seed(1)
    module = modules.build_module(folder, ENTRY).eval()
    modules.save_weights(module, folder / "teacher.safetensors")
    with torch.no_grad():
        predicted = module(*[torch.from_numpy(np.load(inputs[f"validation.inputs.{index}"].path)) for index in (0, 1)]).argmax(1)
    module.batches.clear()
    labels = np.where(np.arange(len(predicted)) % 5 == 0, (predicted + 1) % 3, predicted)  # the teacher is right on four of five
    np.save(folder / "validation.labels.npy", labels)
    inputs["validation.labels"] = Artifact(folder / "validation.labels.npy", "", 0)
    inputs["teacher"] = Artifact(folder / "teacher.safetensors", "", 0)
    return inputs


def run(folder, inputs, progress=lambda *_: None, of_recipe=None):
    out = folder / "out"
    out.mkdir(exist_ok=True)
    [step] = soft_targets.steps(of_recipe or recipe(), [])
    result = soft_targets.run(step, inputs, Context(folder, out, folder / "work", progress))
    return result, {path.name: path.read_bytes() for path in out.iterdir()}


def samples_run():
    """Return on how many samples the teacher was run so far."""
    return sum(sys.modules["user_teacher"].Counting.batches)


def test_the_step_depends_on_the_teacher_and_the_samples_and_not_on_the_distillation():
    [step] = soft_targets.steps(recipe(), [])
    assert step.inputs["teacher"] == "inspect:teacher.safetensors"
    assert step.inputs["code"] == "inspect:teacher.code.json"
    expected = {f"{split}.inputs.{index}": f"inspect:{split}.inputs.{index}.npy" for split in COUNTS for index in (0, 1)}
    assert expected.items() <= step.inputs.items()
    assert len(step.inputs) == 10
    assert (step.params.model, step.params.augment, step.params.views) == (str(ENTRY), None, 1)
    changed = replace(recipe(), distill=Distill(epochs=9, losses=(Loss("kl", temperature=2.0),), seed=5, threads=3))
    [other] = soft_targets.steps(changed, [])
    assert (other, step.threads, other.threads) == (step, 1, 3)  # the number of threads is no part of a step's identity


def test_a_teacher_in_a_file_needs_no_entry_point_and_onnx_needs_its_runtime():
    [step] = soft_targets.steps(replace(recipe(), teacher=Teacher(file="net/teacher.onnx")), [])
    assert step.params.model is None
    assert step.inputs["teacher"] == "inspect:teacher.onnx"
    assert "onnxruntime" in step.tools
    assert "onnxruntime" not in soft_targets.steps(recipe(), [])[0].tools


def test_the_teacher_runs_once_on_every_sample_and_its_raw_logits_are_stored(folder):
    inputs, reports = artifacts(folder), []
    result, files = run(folder, inputs, lambda share, text: reports.append((share, text)))
    assert sorted(files) == [f"{split}.soft_targets.safetensors" for split in sorted(COUNTS)]
    assert samples_run() == 5040 + EXTRA_SAMPLES
    assert max(sys.modules["user_teacher"].Counting.batches) == soft_targets.BATCH_SIZE
    module = modules.load_module(folder, ENTRY, folder / "teacher.safetensors")
    for split, count in COUNTS.items():
        path = folder / "out" / f"{split}.soft_targets.safetensors"
        [logits] = stored_logits(path)
        assert (logits.shape, storage.open_soft_targets(path).header.slots) == ((count, 3), 0)
        with torch.no_grad():
            expected = module(*[torch.from_numpy(np.load(inputs[f"{split}.inputs.{index}"].path)) for index in (0, 1)])
        np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-3, atol=1e-4)
    [logits] = stored_logits(folder / "out" / "validation.soft_targets.safetensors")
    assert result.metrics == {"samples": 5040, "classes": 3, "validation_accuracy": pytest.approx(0.8)}
    assert result.notes == ()
    assert result.notes == ()
    assert reports[-1] == (1.0, "validation: 40 of 40 samples")
    assert [share for share, _ in reports] == sorted(share for share, _ in reports)


def test_labels_that_are_not_classes_give_no_accuracy(folder):
    inputs = artifacts(folder)
    np.save(folder / "validation.labels.npy", np.linspace(0, 1, 40))
    assert run(folder, inputs)[0].metrics["validation_accuracy"] is None


def test_unlabelled_samples_of_another_domain_give_a_warning(folder):
    inputs = artifacts(folder, {**COUNTS, "unlabelled": 400})
    assert run(folder, inputs)[0].notes == ()
    for path in (folder / "work").iterdir():
        path.unlink()
    for index in (0, 1):
        path = inputs[f"validation.inputs.{index}"].path
        np.save(path, 20 * np.load(path))  # far from the decision boundary: the teacher is confident
    note, *_ = run(folder, inputs)[0].notes
    assert note.startswith("warning: the domains differ: the teacher's confidence is ")


def test_the_teacher_sees_mixed_views_which_are_no_other_domain(folder):
    inputs = artifacts(folder, {"train": 300, "validation": 400, "unlabelled": 400})
    for split in ("validation", "unlabelled"):
        for index in (0, 1):
            path = inputs[f"{split}.inputs.{index}"].path
            np.save(path, 20 * np.load(path))  # the teacher is confident, except where samples are mixed
    result, _ = run(folder, inputs, of_recipe=replace(recipe(), distill=Distill(epochs=2, mixup=1.0, views=4)))
    assert result.notes == ()
    logits = stored_logits(folder / "out" / "unlabelled.soft_targets.safetensors")
    confidence = np.exp(logits - logits.max(2, keepdims=True)).sum(2) ** -1
    assert confidence[1:].mean() < confidence[0].mean() - 0.02
    mixture = views.draw_mixture(views.ViewOptions(mixup=1.0), "unlabelled", 400, 3)
    shares = mixture.shares[:, None]
    samples = [torch.from_numpy(array) for array in data.load_arrays(inputs, "unlabelled")]
    with torch.no_grad():
        module = modules.load_module(folder, ENTRY, folder / "teacher.safetensors")
        expected = module(*(shares * array + (1 - shares) * array[mixture.partners] for array in samples))
    np.testing.assert_allclose(logits[3], expected.numpy(), rtol=2e-3, atol=2e-2)


def test_the_logits_of_each_view_are_those_for_the_inputs_of_the_student(folder):
    inputs = artifacts(folder)
    with_views = replace(recipe(), distill=Distill(epochs=2, augment=EntryPoint("user_teacher.py", "noisy"), views=3))
    result, _ = run(folder, inputs, of_recipe=with_views)
    assert result.metrics["samples"] == 3 * (COUNTS["train"] + COUNTS["unlabelled"]) + COUNTS["validation"]
    augment = views.load_augmentation(folder, with_views.distill.augment)
    module = modules.load_module(folder, ENTRY, folder / "teacher.safetensors")
    for split, count in COUNTS.items():
        logits = stored_logits(folder / "out" / f"{split}.soft_targets.safetensors")
        assert logits.shape == (1 if split == "validation" else 3, count, 3)
        for number, view_logits in enumerate(logits):
            view = tuple(torch.from_numpy(array) for array in data.load_arrays(inputs, split))
            if split != "validation":
                view = views.make_view(views.ViewOptions(augment), split, view, number)
            with torch.no_grad():
                np.testing.assert_allclose(view_logits, module(*view).numpy(), rtol=1e-3, atol=1e-4)


class Stop(BaseException):
    """Stands in for a kill: no code expects it."""


def test_a_run_that_was_killed_resumes_and_ends_with_the_same_bytes(folder):
    inputs = artifacts(folder)
    _, expected = run(folder, inputs)
    for path in (folder / "work").iterdir():
        path.unlink()
    before = samples_run()

    def stop(share, _):
        if share > 0.5:
            raise Stop

    with pytest.raises(Stop):
        run(folder, inputs, stop)
    assert 0 < samples_run() - before < 5040 + EXTRA_SAMPLES
    assert run(folder, inputs)[1] == expected
    assert 0 <= samples_run() - before - (5040 + EXTRA_SAMPLES + FIRST_SAMPLES) <= soft_targets.CHUNK  # those that were not stored yet


def test_a_kill_in_the_last_split_loses_nothing_of_an_earlier_one(folder):
    inputs = artifacts(folder, {**COUNTS, "unlabelled": 100})
    _, expected = run(folder, inputs)
    (folder / "work").mkdir(exist_ok=True)
    before = samples_run()

    def stop(_, text):
        if text.startswith("unlabelled"):
            raise Stop

    with pytest.raises(Stop):
        run(folder, inputs, stop)
    assert samples_run() - before == 5140 + FIRST_SAMPLES
    assert run(folder, inputs)[1] == expected
    assert samples_run() - before == 5140 + 2 * FIRST_SAMPLES + 3 * storage.SPOT_ROWS  # none a second time


def test_one_view_of_a_split_is_in_memory_at_a_time(folder, monkeypatch):
    inputs, references, alive = artifacts(folder), [], []
    make_view = data.make_view

    def watched(augment, split, arrays, number):
        alive.append(sum(reference() is not None for name, reference in references if name == split))
        view = make_view(augment, split, arrays, number)
        references.append((split, weakref.ref(view[0])))
        return view

    monkeypatch.setattr(data, "make_view", watched)
    augment = EntryPoint("user_teacher.py", "noisy")
    run(folder, inputs, of_recipe=replace(recipe(), distill=Distill(epochs=2, augment=augment, views=6)))
    assert len(references) >= 6
    assert max(alive) <= 1  # the previous one, while the next is made


def test_damaged_partial_work_is_done_again(folder):
    inputs = artifacts(folder)
    _, expected = run(folder, inputs)
    for path in (folder / "work").iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert run(folder, inputs)[1] == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_logit_that_is_not_finite_is_reported_with_its_sample(folder, value):
    inputs = artifacts(folder)
    path = inputs["train.inputs.0"].path
    array = np.load(path)
    array[4321, 2] = value
    np.save(path, array)
    with pytest.raises(RecipeError, match=r"teacher: its logit for train\[4321\] is -?(nan|inf) for class \d; expected finite logits"):
        run(folder, inputs)


def worthless(folder, count):
    """Return the inputs of a teacher whose accuracy is that of guessing."""
    inputs = artifacts(folder, {"train": 40, "validation": count, "unlabelled": 0})
    np.save(folder / "validation.labels.npy", np.random.default_rng(2).integers(0, 3, count))
    return inputs


@pytest.mark.parametrize("count", [30, 600])
def test_a_teacher_that_is_no_better_than_a_constant_gives_a_warning(folder, count):
    (note,) = run(folder, worthless(folder, count))[0].notes
    assert note.startswith("warning: the teacher (user_teacher.py:teacher) is no better than the commonest class: right on ")


def test_a_teacher_that_learned_nothing_here_is_refused_unless_few_samples_say_so(folder):
    trained = replace(recipe(), teacher=Teacher(ENTRY, train=Training(epochs=1)))
    (note,) = run(folder, worthless(folder, 12), of_recipe=trained)[0].notes
    assert note.startswith("warning: the teacher (user_teacher.py:teacher) is no better than the commonest class: right on ")
    with pytest.raises(RecipeError, match=r"is no better than the commonest class: .*; train it longer, or with another"):
        run(folder, worthless(folder, 600), of_recipe=trained)


def test_the_parameters_can_be_written_as_json():
    [step] = soft_targets.steps(recipe(), [])
    assert json.loads(json.dumps(asdict(step.params)))["output"] == {"task": "multiclass", "heads": []}


def test_a_module_runs_on_the_accelerator_of_this_machine(folder, monkeypatch):
    inputs = artifacts(folder, {"train": 40, "validation": 40, "unlabelled": 0})
    _, expected = run(folder, inputs)
    monkeypatch.setattr(execution, "accelerators", lambda: {"cpu:0": "it"})  # torch accepts this as a name of the CPU
    [step] = soft_targets.steps(recipe(), [])
    assert step.params.mode == execution.ExecutionMode(accelerator="cpu:0", accelerator_name="it")
    without_accelerator = replace(recipe(), distill=Distill(epochs=1, accelerator="none"))
    assert soft_targets.steps(without_accelerator, [])[0].params.mode == execution.DEFAULT_MODE
    of_file = replace(recipe(), teacher=Teacher(file="t.onnx"))
    assert soft_targets.steps(of_file, [])[0].params.mode == execution.DEFAULT_MODE
    result, files = run(folder, inputs)
    assert (result.notes, files) == ((), expected)


@pytest.mark.parametrize(("device", "why"), [("meta", "meta"), ("cpu:0", "its logits differ by ")])
def test_a_teacher_that_fails_or_returns_other_logits_on_the_accelerator_runs_on_the_cpu(folder, monkeypatch, device, why):
    inputs = artifacts(folder, {"train": 40, "validation": 40, "unlabelled": 0})
    _, expected = run(folder, inputs)
    monkeypatch.setattr(execution, "accelerators", lambda: {device: "it"})
    if device == "cpu:0":
        unchanged = load_teacher

        def inaccurate(recipe_dir, entry, path, device="cpu"):
            predict = unchanged(recipe_dir, entry, path, device)
            return predict if device == "cpu" else lambda batch: predict(batch) * 1.01

        monkeypatch.setattr(layouts, "load_teacher", inaccurate)
    result, files = run(folder, inputs)
    (note,) = result.notes
    assert note.startswith(f"warning: the teacher runs on the CPU, not on {device}: ")
    assert why in note
    assert files == expected


@pytest.mark.parametrize(("task", "precision", "slots"), [("multiclass", "float16", storage.SLOTS), ("regression", "float32", 0)])
def test_numbers_of_a_regression_are_stored_exactly_and_never_sampled(folder, task, precision, slots):
    params = replace(soft_targets.steps(recipe(), ())[0].params, output=OutputSpec(task))
    header = soft_targets._header(params, artifacts(folder), "train", 5000, 300)
    assert (header.precision, header.slots) == (precision, slots)
