# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from edgekd.domain.artifact import Artifact
from edgekd.domain.losses import Loss
from edgekd.domain.recipe import Assistant, Control, Data, Distill, Entry, Recipe, Student, Teacher, TensorSpec
from edgekd.errors import RecipeError
from edgekd.kd import calibrate, data, lessons, models, train
from edgekd.ports import Context
from edgekd.stages import distill
from tests.stored import store, stored

CODE = """
import torch
from torch import nn

def noisy(inputs, generator):
    return inputs + 0.1 * torch.randn(inputs.shape, generator=generator)

def student():
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 3))

def four():
    return nn.Linear(4, 4)
"""
KL = Loss("kl", 0.9, temperature=2.0)
CE = Loss("ce", 0.1)


def entry(function):
    return Entry("distill_user.py", function)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "distill_user.py").write_text(CODE)
    yield tmp_path
    sys.modules.pop("distill_user", None)


def recipe(function="student", **changes):
    return Recipe(
        schema=1,
        name="t",
        data=Data(entry("splits")),
        teacher=Teacher(entry("teacher"), "w.safetensors"),
        student=Student(entry(function), (TensorSpec("x", (1, 4)),)),
        distill=Distill(
            **{"epochs": 8, "losses": (KL, CE), "batch_size": 16, "learning_rate": 0.02, "threads": 1, "precision": "float32", **changes}
        ),
    )


def artifacts(folder, unlabelled=0, labels=lambda classes: classes):
    generator = np.random.default_rng(1)
    found = {}
    for split, count in (("train", 60), ("validation", 60), ("unlabelled", unlabelled)):
        classes = generator.integers(0, 3, count)
        arrays = {
            "inputs.0": (generator.standard_normal((count, 4)) + 2 * classes[:, None]).astype(np.float32),
            "labels": labels(classes),
            "outputs": (6 * np.eye(3)[classes] + generator.standard_normal((count, 3))).astype(np.float32)[None],
        }
        if split == "unlabelled":
            del arrays["labels"]
        store(folder / f"{split}.outputs.safetensors", arrays.pop("outputs"), split)
        found[f"{split}.outputs"] = Artifact(folder / f"{split}.outputs.safetensors", "", 0)
        for name, array in arrays.items():
            np.save(folder / f"{split}.{name}.npy", array)
            found[f"{split}.{name}"] = Artifact(folder / f"{split}.{name}.npy", "", 0)
    return found


def run(folder, given, inputs):
    for name in ("out", "work"):
        (folder / name).mkdir(exist_ok=True)
    [step] = distill.steps(given, [])
    result = distill.run(step, inputs, Context(folder, folder / "out", folder / "work", lambda *_: None))
    for path in (folder / "work").iterdir():
        path.unlink()
    return result, {path.name: path.read_bytes() for path in (folder / "out").iterdir()}


def test_the_step_names_all_that_changes_the_student():
    [step] = distill.steps(recipe(), [])
    assert (step.id, step.stage) == ("distill", "distill")
    assert step.params["losses"] == [
        {"kind": "kl", "weight": 0.9, "temperature": 2.0, "standardize": False},
        {"kind": "ce", "weight": 0.1, "label_smoothing": 0.0},
    ]
    assert json.loads(json.dumps(step.params)) == step.params
    assert {"model", "epochs", "optimizer", "learning_rate", "weight_decay", "batch_size", "seed", "threads", "instruction_set"} <= set(
        step.params
    )
    assert step.inputs == {
        "train.inputs.0": "inspect:train.inputs.0.npy",
        "train.labels": "inspect:train.labels.npy",
        "train.outputs": "supervise:train.outputs.safetensors",
        "validation.inputs.0": "inspect:validation.inputs.0.npy",
        "validation.labels": "inspect:validation.labels.npy",
        "validation.outputs": "supervise:validation.outputs.safetensors",
        "unlabelled.inputs.0": "inspect:unlabelled.inputs.0.npy",
        "unlabelled.outputs": "supervise:unlabelled.outputs.safetensors",
        "code": "inspect:student.code.json",
        "views.code": "inspect:views.code.json",
    }


def test_no_split_but_train_validation_and_unlabelled_is_seen():
    [step] = distill.steps(recipe(), [])
    assert not [name for name in step.inputs.values() if "evaluation" in name or "calibration" in name]


def test_epochs_take_the_views_in_turns(folder, monkeypatch):
    inputs = artifacts(folder)
    answers = stored(inputs["train.outputs"].path)
    store(inputs["train.outputs"].path, np.concatenate([answers, answers + 1, answers + 2]))
    store(inputs["unlabelled.outputs"].path, np.zeros((3, 0, 3), np.float32), "unlabelled")
    seen = []

    def fit(job, *_):
        seen.extend(job.view(epoch) for epoch in range(5))
        raise KeyboardInterrupt

    [step] = distill.steps(recipe(augment=entry("noisy"), views=3), [])
    monkeypatch.setattr(train, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        distill.run(step, inputs, Context(folder, folder, folder, lambda *_: None))
    assert [int(np.rint((item.outputs.numpy() - answers[0]).mean())) for item in seen] == [0, 1, 2, 0, 1]
    assert torch.equal(seen[0].inputs[0], seen[3].inputs[0])
    assert not torch.equal(seen[0].inputs[0], seen[1].inputs[0])


def test_a_student_learns_from_views(folder):
    inputs = artifacts(folder)
    for split in ("train", "unlabelled"):
        store(inputs[f"{split}.outputs"].path, np.repeat(stored(inputs[f"{split}.outputs"].path), 2, axis=0), split)
    assert run(folder, recipe(augment=entry("noisy"), views=2), inputs)[0].metrics["validation_accuracy"] > 0.6


def test_twins_are_trained_alike_but_for_the_teacher_and_the_seed():
    plain, *others = distill.steps(recipe(control=Control(seeds=2), seed=7), [])
    assert [step.id for step in others] == [
        "distill/distilled/1",
        "distill/alone/0",
        "distill/alone/1",
        "distill/smoothed/0",
        "distill/smoothed/1",
    ]
    assert [step.params["seed"] for step in others] == [8, 7, 8, 7, 8]
    for step in others:
        same = plain.params.keys() - ({"seed"} if "distilled" in step.id else {"seed", "losses"})
        assert all(step.params[name] == plain.params[name] for name in same)
        reads_teacher = any(reference.startswith("supervise:") for reference in step.inputs.values())
        assert reads_teacher == ("distilled" in step.id)
    assert others[-1].params["losses"] == [{"kind": "ce", "weight": 1.0, "label_smoothing": 0.1}]


def test_a_twin_by_pseudo_labels_follows_the_student_that_was_trained_alone():
    given = recipe(control=Control(seeds=2, pseudo_labels=True), teachers=(Teacher(entry("other"), "o.safetensors"),))
    last = distill.steps(given, [])[-1]
    assert last.id == "distill/pseudo/1"
    assert [loss["kind"] for loss in last.params["losses"]] == ["ce", "hard"]
    assert {reference.partition(":")[0] for name, reference in last.inputs.items() if "outputs" in name} == {"supervise/pseudo/1"}
    assert given.supervisors["supervise/pseudo/1"].artifact == "distill/alone/1:student.safetensors"
    assert not {"mixing", "checkpoints", "teacher"} & last.params.keys()


def test_each_link_of_a_chain_is_taught_by_the_one_before():
    middle, small = (Assistant(entry(name)) for name in ("middle", "small"))
    given = recipe(assistants=(middle, replace(small, epochs=3)), teachers=(Teacher(file="o.onnx", weight=0.5),))
    first, second, last = distill.steps(given, [])
    assert [step.id for step in (first, second, last)] == ["distill/assistant/0", "distill/assistant/1", "distill"]
    assert [step.params["epochs"] for step in (first, second, last)] == [8, 3, 8]
    assert first.params["mixing"] == {"weights": [1.0, 0.5], "by": "weights"}
    assert "mixing" not in second.params.keys() | last.params.keys()
    taught = [
        {reference.partition(":")[0] for name, reference in step.inputs.items() if "outputs" in name} for step in (first, second, last)
    ]
    assert taught == [{"supervise", "supervise/teacher/0"}, {"supervise/assistant/0"}, {"supervise/assistant/1"}]
    assert first.inputs["code"] == "inspect:assistant.0.code.json"


def test_students_of_other_sizes_differ_from_the_student_in_their_module_only():
    student, wide, deep = distill.steps(recipe(sizes=(entry("wide"), entry("deep"))), [])
    assert [student.id, wide.id, deep.id] == ["distill", "distill/size/0", "distill/size/1"]
    assert student.params == distill.steps(recipe(), [])[0].params
    assert wide.params == {**student.params, "model": "distill_user.py:wide"}
    assert deep.inputs == {**student.inputs, "code": "inspect:size.1.code.json"}


def test_all_that_is_distilled_is_in_the_precision_that_was_tried_once(monkeypatch):
    facts = distill.runner.facts()
    monkeypatch.setattr(distill.runner, "facts", lambda: {**facts, "features": ["avx512_bf16"]})
    given = recipe(
        precision="auto", sizes=(entry("wide"),), assistants=(Assistant(entry("middle")),), control=Control(seeds=2, pseudo_labels=True)
    )
    trial, *others = distill.steps(given, [])
    assert trial.id == "distill/precision"
    assert [step.inputs["precision"] for step in others] == ["distill/precision:precision.json"] * 10
    monkeypatch.setattr(distill.runner, "facts", lambda: {**facts, "features": ["avx2"]})
    assert all("precision" not in step.inputs.keys() | step.params.keys() for step in distill.steps(given, []))
    asked = distill.steps(replace(given, distill=replace(given.distill, precision="bfloat16")), [])
    assert {step.params["precision"] for step in asked} == {"bfloat16"}


def test_checkpoints_teach_in_turns_and_the_teacher_last(folder, monkeypatch):
    inputs = artifacts(folder)
    for split in ("train", "validation", "unlabelled"):
        answers = stored(inputs[f"{split}.outputs"].path)
        for number in range(3):
            path = folder / f"{split}.outputs.{number}.safetensors"
            store(path, answers + 1 + number, split)
            inputs[f"{split}.outputs.checkpoint.{number}"] = Artifact(path, "", 0)
    seen = []

    def fit(job, *_):
        clean = job.validation.outputs
        seen.extend(int(np.rint((job.view(epoch).outputs.numpy() - stored(inputs["train.outputs"].path)[0]).mean())) for epoch in range(8))
        assert torch.equal(clean, torch.from_numpy(stored(inputs["validation.outputs"].path)[0]))
        raise KeyboardInterrupt

    given = replace(recipe(), teacher=Teacher(entry("teacher"), "w.safetensors", checkpoints=("a.pt", "b.pt", "c.pt")))
    [step] = distill.steps(given, [])
    assert [name for name in given.supervisors if "checkpoint" in name] == [f"supervise/checkpoint/{number}" for number in range(3)]
    monkeypatch.setattr(train, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        distill.run(step, inputs, Context(folder, folder, folder, lambda *_: None))
    assert seen == [1, 1, 2, 2, 3, 3, 0, 0]


def test_what_is_left_open_is_searched_once_for_all_seeds_and_for_the_smoothed_twin_too():
    given = recipe(losses=(Loss("kl", temperature="auto"), CE), control=Control(seeds=2), search_share=0.5)
    steps = distill.steps(given, [])
    assert [step.id for step in steps] == [
        "distill/search",
        "distill",
        "distill/distilled/1",
        "distill/alone/0",
        "distill/alone/1",
        "distill/search/smoothed/0",
        "distill/smoothed/0",
        "distill/smoothed/1",
    ]
    assert {step.id: step.inputs["chosen"] for step in steps if "chosen" in step.inputs} == {
        "distill": "distill/search:chosen.json",
        "distill/distilled/1": "distill/search:chosen.json",
        "distill/smoothed/0": "distill/search/smoothed/0:chosen.json",
        "distill/smoothed/1": "distill/search/smoothed/0:chosen.json",
    }
    searching = [step for step in steps if "search_share" in step.params]
    assert [step.id for step in searching] == ["distill/search", "distill/search/smoothed/0"]
    assert {step.params["search_share"] for step in searching} == {0.5}
    assert all("optuna" in step.tools for step in searching)


def test_a_twin_needs_no_teacher(folder):
    inputs = {name: item for name, item in artifacts(folder).items() if "outputs" not in name}
    *_, step = distill.steps(recipe(control=Control(seeds=2)), [])
    for name in ("out", "work"):
        (folder / name).mkdir()
    result = distill.run(step, inputs, Context(folder, folder / "out", folder / "work", lambda *_: None))
    assert result.metrics["validation_accuracy"] > 0.5


def test_a_twin_takes_as_many_steps_as_the_student_that_learns_from_unlabelled_samples_too(folder):
    inputs = artifacts(folder, unlabelled=200)
    taught = lessons.training_set(inputs, [KL, CE], "distill.losses")
    alone = lessons.training_set({name: item for name, item in inputs.items() if "outputs" not in name}, [CE], "distill.control")
    assert len(alone) == len(taught) == 260
    assert torch.equal(alone.inputs[0][60:120], taught.inputs[0][:60])
    assert alone.labels.min() >= 0


def test_a_twin_of_a_student_that_learns_from_labels_only_reads_no_unlabelled_samples():
    for losses, reads in (((KL, CE), True), ((Loss("dkd"), CE), False)):
        twin = distill.steps(recipe(losses=losses, control=Control(seeds=2)), [])[-1]
        assert any(name.startswith("unlabelled") for name in twin.inputs) == reads


@pytest.mark.parametrize("loss", [Loss("dist"), Loss("kl", temperature=2.0, standardize=True)])
def test_answers_of_a_loss_that_leaves_the_scale_free_are_calibrated(folder, loss):
    inputs = artifacts(folder)
    result, _ = run(folder, recipe(losses=(loss,)), inputs)
    (note,) = result.notes
    assert "is folded into the last layer" in note
    module = models.load_student(folder, entry("student"), folder / "out" / "student.safetensors")
    validation = data.samples(inputs, "validation")
    with torch.no_grad():
        assert calibrate.temperature(module(*validation.inputs), validation.labels) == pytest.approx(1, abs=0.02)
    assert run(folder, recipe(), inputs)[0].notes == ()


@pytest.mark.parametrize("kind", ["dist", "dkd", "hard", "mse"])
def test_each_loss_teaches(folder, kind):
    result, _ = run(folder, recipe(losses=(Loss(kind),)), artifacts(folder))
    assert result.metrics["validation_accuracy"] > 0.5


def test_a_student_is_distilled_and_comes_back(folder):
    result, files = run(folder, recipe(), artifacts(folder))
    assert sorted(files) == ["curve.json", "student.safetensors"]
    curve = json.loads(files["curve.json"])
    assert result.metrics == curve["epochs"][curve["best_epoch"] - 1]
    assert result.metrics["validation_accuracy"] > 0.6
    module = models.load_student(folder, entry("student"), folder / "out" / "student.safetensors")
    with torch.no_grad():
        found = module(torch.from_numpy(np.load(folder / "validation.inputs.0.npy"))).argmax(1).numpy()
    assert (found == np.load(folder / "validation.labels.npy")).mean() == pytest.approx(result.metrics["validation_accuracy"])


def test_the_same_step_gives_the_same_bytes_and_the_temperature_changes_them(folder):
    inputs = artifacts(folder)
    first = run(folder, recipe(), inputs)[1]
    assert run(folder, recipe(), inputs)[1] == first
    assert run(folder, recipe(losses=(replace(KL, temperature=4.0), CE)), inputs)[1] != first


def test_labels_do_not_matter_to_kl_alone_but_for_the_accuracy(folder):
    kl_only = recipe(losses=(KL,))
    result, _ = run(folder, kl_only, artifacts(folder, labels=lambda classes: classes.astype(np.float64) / 2))
    assert result.metrics["validation_accuracy"] is None
    assert result.metrics["validation_loss"] < 2


def test_ce_without_classes_is_refused(folder):
    with pytest.raises(RecipeError, match="'ce' needs classes, and the labels of the train split are none"):
        run(folder, recipe(), artifacts(folder, labels=lambda classes: classes.astype(np.float64)))


def test_unlabelled_samples_are_learnt_from_through_kl_only(folder):
    inputs = artifacts(folder, unlabelled=200)
    assert len(lessons.training_set(inputs, [KL, CE], "distill.losses")) == 260
    assert lessons.training_set(inputs, [KL, CE], "distill.losses").labels[60:].unique().tolist() == [-1]
    assert len(lessons.training_set(inputs, [CE], "distill.losses")) == 60
    with_more = run(folder, recipe(), inputs)[1]
    assert run(folder, recipe(), artifacts(folder))[1] != with_more


def test_classes_that_differ_from_the_teachers_are_refused(folder):
    with pytest.raises(RecipeError, match=r"distill_user.py:four: answers with 4 classes; the teacher answers with 3"):
        run(folder, recipe("four"), artifacts(folder))
