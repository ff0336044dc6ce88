# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from edgekd.domain.artifact import Artifact
from edgekd.domain.losses import Loss
from edgekd.domain.recipe import Data, Distill, EntryPoint, Recipe, Student, Teacher, TensorSpec
from edgekd.errors import RecipeError
from edgekd.kd import data, modules, views
from edgekd.kd.soft_targets import storage
from edgekd.kd.teachers import load
from edgekd.kd.teachers.load import load_teacher
from edgekd.kd.training import execution
from edgekd.ports import Context
from edgekd.stages import soft_targets
from tests.stored import stored

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
TRIED = 1 + 2 * storage.SPOT_ROWS  # one for the number of classes, a few of each split to check what was stored


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
        distill=Distill(epochs=1),
    )


def artifacts(folder, counts=COUNTS):
    generator = np.random.default_rng(1)
    found = {}
    for split, count in counts.items():
        for index, width in enumerate((4, 1)):
            path = folder / f"{split}.inputs.{index}.npy"
            np.save(path, generator.standard_normal((count, width)).astype(np.float32))
            found[f"{split}.inputs.{index}"] = Artifact(path, "", 0)
    np.save(folder / "validation.labels.npy", np.arange(counts["validation"]) % 3)
    found["validation.labels"] = Artifact(folder / "validation.labels.npy", "", 0)
    torch.manual_seed(1)
    modules.save_weights(modules.build_module(folder, ENTRY), folder / "teacher.safetensors")
    found["teacher"] = Artifact(folder / "teacher.safetensors", "", 0)
    return found


def run(folder, inputs, progress=lambda *_: None, given=None):
    out = folder / "out"
    out.mkdir(exist_ok=True)
    [step] = soft_targets.steps(given or recipe(), [])
    result = soft_targets.run(step, inputs, Context(folder, out, folder / "work", progress))
    return result, {path.name: path.read_bytes() for path in out.iterdir()}


def asked():
    return sum(sys.modules["user_teacher"].Counting.batches)


def test_the_key_reads_the_teacher_and_the_samples_and_nothing_of_the_distillation():
    [step] = soft_targets.steps(recipe(), [])
    assert step.inputs["teacher"] == "inspect:teacher.safetensors"
    assert step.inputs["code"] == "inspect:teacher.code.json"
    expected = {f"{split}.inputs.{index}": f"inspect:{split}.inputs.{index}.npy" for split in COUNTS for index in (0, 1)}
    assert expected.items() <= step.inputs.items()
    assert len(step.inputs) == 10
    assert set(step.params) == {"model", "augment", "views", "soft_target_storage", "batch_size", "threads", "instruction_set"}
    changed = replace(recipe(), distill=Distill(epochs=9, losses=(Loss("kl", temperature=2.0),), seed=5, threads=1))
    assert soft_targets.steps(changed, []) == [step]


def test_a_teacher_in_a_file_needs_no_entry_and_onnx_its_runtime():
    [step] = soft_targets.steps(replace(recipe(), teacher=Teacher(file="net/teacher.onnx")), [])
    assert step.params["model"] is None
    assert step.inputs["teacher"] == "inspect:teacher.onnx"
    assert "onnxruntime" in step.tools
    assert "onnxruntime" not in soft_targets.steps(recipe(), [])[0].tools


def test_every_sample_is_answered_once_with_raw_logits(folder):
    inputs, told = artifacts(folder), []
    result, files = run(folder, inputs, lambda share, text: told.append((share, text)))
    assert sorted(files) == ["train.outputs.safetensors", "unlabelled.outputs.safetensors", "validation.outputs.safetensors"]
    assert asked() == 5040 + TRIED
    assert max(sys.modules["user_teacher"].Counting.batches) == soft_targets.BATCH_SIZE
    module = modules.load_module(folder, ENTRY, folder / "teacher.safetensors")
    for split, count in COUNTS.items():
        path = folder / "out" / f"{split}.outputs.safetensors"
        [found] = stored(path)
        assert (found.shape, storage.open_soft_targets(path).header.slots) == ((count, 3), 0)
        with torch.no_grad():
            expected = module(*[torch.from_numpy(np.load(inputs[f"{split}.inputs.{index}"].path)) for index in (0, 1)])
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-4)
    [found] = stored(folder / "out" / "validation.outputs.safetensors")
    accuracy = (found.argmax(1) == np.arange(40) % 3).mean()
    assert result.metrics == {"samples": 5040, "classes": 3, "validation_accuracy": pytest.approx(accuracy)}
    assert result.notes == ()
    assert told[-1] == (1.0, "validation: 40 of 40 samples")
    assert [share for share, _ in told] == sorted(share for share, _ in told)


def test_labels_that_are_no_classes_give_no_accuracy(folder):
    inputs = artifacts(folder)
    np.save(folder / "validation.labels.npy", np.linspace(0, 1, 40))
    assert run(folder, inputs)[0].metrics["validation_accuracy"] is None


def test_unlabelled_samples_of_another_domain_are_warned_of(folder):
    inputs = artifacts(folder, {**COUNTS, "unlabelled": 400})
    assert run(folder, inputs)[0].notes == ()
    for path in (folder / "work").iterdir():
        path.unlink()
    for index in (0, 1):
        path = inputs[f"validation.inputs.{index}"].path
        np.save(path, 20 * np.load(path))  # far from where the teacher decides: it is sure of them
    (note,) = run(folder, inputs)[0].notes
    assert note.startswith("warning: the domains differ: the teacher's confidence is ")


def test_each_view_is_answered_as_the_student_will_see_it(folder):
    inputs = artifacts(folder)
    given = replace(recipe(), distill=Distill(epochs=2, augment=EntryPoint("user_teacher.py", "noisy"), views=3))
    result, _ = run(folder, inputs, given=given)
    assert result.metrics["samples"] == 3 * (COUNTS["train"] + COUNTS["unlabelled"]) + COUNTS["validation"]
    augment = views.load_augmentation(folder, given.distill.augment)
    module = modules.load_module(folder, ENTRY, folder / "teacher.safetensors")
    for split, count in COUNTS.items():
        found = stored(folder / "out" / f"{split}.outputs.safetensors")
        assert found.shape == (1 if split == "validation" else 3, count, 3)
        for number, answered in enumerate(found):
            seen = tuple(torch.from_numpy(item) for item in data.load_arrays(inputs, split))
            if split != "validation":
                seen = views.make_view(augment, split, seen, number)
            with torch.no_grad():
                np.testing.assert_allclose(answered, module(*seen).numpy(), rtol=1e-3, atol=1e-4)


class Stop(BaseException):
    """As little expected as a kill."""


def test_a_run_that_was_killed_goes_on_and_ends_in_the_same_bytes(folder):
    inputs = artifacts(folder)
    _, whole = run(folder, inputs)
    for path in (folder / "work").iterdir():
        path.unlink()
    before = asked()

    def stop(share, _):
        if share > 0.5:
            raise Stop

    with pytest.raises(Stop):
        run(folder, inputs, stop)
    assert 0 < asked() - before < 5040 + TRIED
    assert run(folder, inputs)[1] == whole
    assert asked() - before == 5040 + TRIED + 1  # none twice


def test_a_kill_in_the_last_split_loses_no_answer_of_an_earlier_one(folder):
    inputs = artifacts(folder, {**COUNTS, "unlabelled": 100})
    _, whole = run(folder, inputs)
    (folder / "work").mkdir(exist_ok=True)
    before = asked()

    def stop(_, told):
        if told.startswith("unlabelled"):
            raise Stop

    with pytest.raises(Stop):
        run(folder, inputs, stop)
    assert asked() - before == 5140 + 1
    assert run(folder, inputs)[1] == whole
    assert asked() - before == 5140 + 2 + 3 * storage.SPOT_ROWS  # none twice


def test_one_view_of_a_split_is_in_memory_at_a_time(folder, monkeypatch):
    inputs, made = artifacts(folder), []
    view, alive = data.make_view, []

    def watched(augment, split, arrays, number):
        alive.append(sum(reference() is not None for name, reference in made if name == split))
        found = view(augment, split, arrays, number)
        made.append((split, weakref.ref(found[0])))
        return found

    monkeypatch.setattr(data, "make_view", watched)
    run(folder, inputs, given=replace(recipe(), distill=Distill(epochs=2, augment=EntryPoint("user_teacher.py", "noisy"), views=6)))
    assert len(made) >= 6
    assert max(alive) <= 1  # the one before, while the next is made


def test_damaged_partial_work_is_made_again(folder):
    inputs = artifacts(folder)
    _, whole = run(folder, inputs)
    for path in (folder / "work").iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert run(folder, inputs)[1] == whole


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_answer_that_is_not_finite_is_told_with_its_sample(folder, value):
    inputs = artifacts(folder)
    path = inputs["train.inputs.0"].path
    array = np.load(path)
    array[4321, 2] = value
    np.save(path, array)
    with pytest.raises(RecipeError, match=r"teacher: its answer to train\[4321\] is -?(nan|inf) for class \d; expected finite logits"):
        run(folder, inputs)


def test_the_step_is_the_same_in_json():
    [step] = soft_targets.steps(recipe(), [])
    assert json.loads(json.dumps(step.params)) == step.params


def test_a_module_answers_on_the_accelerator_that_is_here(folder, monkeypatch):
    inputs = artifacts(folder, {"train": 40, "validation": 40, "unlabelled": 0})
    _, expected = run(folder, inputs)
    monkeypatch.setattr(execution, "accelerators", lambda: {"cpu:0": "it"})  # what torch takes for another name of a device
    [step] = soft_targets.steps(recipe(), [])
    assert (step.params["accelerator"], step.params["name"]) == ("cpu:0", "it")
    asked_for_none = replace(recipe(), distill=Distill(epochs=1, accelerator="none"))
    assert "accelerator" not in soft_targets.steps(asked_for_none, [])[0].params
    assert "accelerator" not in soft_targets.steps(replace(recipe(), teacher=Teacher(file="t.onnx")), [])[0].params
    result, files = run(folder, inputs)
    assert (result.notes, files) == ((), expected)


@pytest.mark.parametrize(("device", "why"), [("meta", "meta"), ("cpu:0", "its answers differ by ")])
def test_a_teacher_that_fails_or_answers_otherwise_there_answers_on_the_processor(folder, monkeypatch, device, why):
    inputs = artifacts(folder, {"train": 40, "validation": 40, "unlabelled": 0})
    _, expected = run(folder, inputs)
    monkeypatch.setattr(execution, "accelerators", lambda: {device: "it"})
    if device == "cpu:0":
        unchanged = load_teacher

        def off(recipe_dir, entry, path, device="cpu"):
            answer = unchanged(recipe_dir, entry, path, device)
            return answer if device == "cpu" else lambda batch: answer(batch) * 1.01

        monkeypatch.setattr(load, "load_teacher", off)
    result, files = run(folder, inputs)
    (note,) = result.notes
    assert note.startswith(f"warning: the teacher answers on the processor, not on {device}: ")
    assert why in note
    assert files == expected
