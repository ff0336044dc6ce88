# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from edgekd.domain.artifact import Artifact
from edgekd.domain.losses import Loss, Tap
from edgekd.domain.recipe import Baselines, Teacher
from edgekd.errors import RecipeError
from edgekd.kd import data, modules
from edgekd.kd.training import calibrate, jobs, trainer
from edgekd.kd.training.callbacks import DRY_RUN_SAMPLES
from edgekd.ports import Context
from edgekd.stages import distill
from tests.distilling import CE, KL, entry, recipe
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


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "distill_user.py").write_text(CODE)
    yield tmp_path
    sys.modules.pop("distill_user", None)


def artifacts(folder, unlabelled=0, labels=lambda classes: classes):
    generator = np.random.default_rng(1)
    inputs = {}
    for split, count in (("train", 60), ("validation", 60), ("unlabelled", unlabelled)):
        classes = generator.integers(0, 3, count)
        arrays = {
            "inputs.0": (generator.standard_normal((count, 4)) + 2 * classes[:, None]).astype(np.float32),
            "labels": labels(classes),
            "soft_targets": (6 * np.eye(3)[classes] + generator.standard_normal((count, 3))).astype(np.float32)[None],
        }
        if split == "unlabelled":
            del arrays["labels"]
        store(folder / f"{split}.soft_targets.safetensors", arrays.pop("soft_targets"), split)
        inputs[f"{split}.soft_targets"] = Artifact(folder / f"{split}.soft_targets.safetensors", "", 0)
        for name, array in arrays.items():
            np.save(folder / f"{split}.{name}.npy", array)
            inputs[f"{split}.{name}"] = Artifact(folder / f"{split}.{name}.npy", "", 0)
    return inputs


def run(folder, recipe, inputs):
    for name in ("out", "work"):
        (folder / name).mkdir(exist_ok=True)
    [step] = distill.steps(recipe, [])
    result = distill.run(step, inputs, Context(folder, folder / "out", folder / "work", lambda *_: None))
    for path in (folder / "work").iterdir():
        path.unlink()
    return result, {path.name: path.read_bytes() for path in (folder / "out").iterdir()}


def test_epochs_take_the_views_in_turns(folder, monkeypatch):
    inputs = artifacts(folder)
    logits = stored(inputs["train.soft_targets"].path)
    store(inputs["train.soft_targets"].path, np.concatenate([logits, logits + 1, logits + 2]))
    store(inputs["unlabelled.soft_targets"].path, np.zeros((3, 0, 3), np.float32), "unlabelled")
    views = []

    def fit(job, *_):
        views.extend(job.view(epoch) for epoch in range(5))
        raise KeyboardInterrupt

    [step] = distill.steps(recipe(augment=entry("noisy"), views=3), [])
    monkeypatch.setattr(trainer, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        distill.run(step, inputs, Context(folder, folder, folder, lambda *_: None))
    assert [int(np.rint((view.teacher_logits.numpy() - logits[0]).mean())) for view in views] == [0, 1, 2, 0, 1]
    assert torch.equal(views[0].inputs[0], views[3].inputs[0])
    assert not torch.equal(views[0].inputs[0], views[1].inputs[0])


def test_a_student_learns_from_views(folder):
    inputs = artifacts(folder)
    for split in ("train", "unlabelled"):
        store(inputs[f"{split}.soft_targets"].path, np.repeat(stored(inputs[f"{split}.soft_targets"].path), 2, axis=0), split)
    assert run(folder, recipe(augment=entry("noisy"), views=2), inputs)[0].metrics["validation_accuracy"] > 0.6


@pytest.mark.parametrize("losses", [(KL, CE), (replace(CE, label_smoothing=0.1),)])
def test_students_with_and_without_a_teacher_learn_from_mixed_views_and_their_labels(folder, losses, monkeypatch):
    inputs = artifacts(folder)
    for split in ("train", "unlabelled"):
        store(inputs[f"{split}.soft_targets"].path, np.repeat(stored(inputs[f"{split}.soft_targets"].path), 3, axis=0), split)
    targets, student_objective = [], jobs.student_objective

    def recorded(*arguments):
        objective = student_objective(*arguments)
        return lambda logits, teacher, labels, epoch: targets.append((epoch, labels)) or objective(logits, teacher, labels, epoch)

    monkeypatch.setattr(jobs, "student_objective", recorded)
    assert run(folder, recipe(losses=losses, mixup=0.5, views=3), inputs)[0].metrics["validation_accuracy"] > 0.6
    mixed = [labels for epoch, labels in targets if labels.is_floating_point()]
    assert {epoch for epoch, labels in targets if labels.is_floating_point()} == {1, 2, 4, 5, 7}
    torch.testing.assert_close(torch.cat(mixed).sum(dim=1), torch.ones(60 * 5 + DRY_RUN_SAMPLES))


def test_the_student_that_a_search_has_trained_is_that_of_a_training_of_its_own(folder):
    inputs = artifacts(folder)
    auto = recipe(losses=(replace(KL, temperature="auto"), CE), epochs=8)
    searching, student = distill.steps(auto, [])

    def run_step(step, inputs, name):
        (folder / name / "out").mkdir(parents=True)
        (folder / name / "work").mkdir()
        epochs = []
        context = Context(folder, folder / name / "out", folder / name / "work", lambda _, text: epochs.append(text))
        return distill.run(step, inputs, context), epochs

    result, _ = run_step(searching, inputs, "search")
    assert result.metrics["epochs"] <= 24
    searched = {name: Artifact(folder / "search" / "out" / file, "", 0) for name, file in
                (("chosen", "chosen.json"), ("trained", "trained.safetensors"))}  # fmt: skip
    (from_search, epochs), (anew, _) = (
        run_step(student, inputs | {name: searched[name] for name in names}, name)
        for name, names in (("reused", ("chosen", "trained")), ("anew", ("chosen",)))
    )
    assert epochs == []
    assert from_search == anew
    for file in ("student.safetensors", "curve.json"):
        assert (folder / "reused" / "out" / file).read_bytes() == (folder / "anew" / "out" / file).read_bytes()


def test_checkpoints_teach_in_turns_and_the_teacher_last(folder, monkeypatch):
    inputs = artifacts(folder)
    for split in ("train", "validation", "unlabelled"):
        logits = stored(inputs[f"{split}.soft_targets"].path)
        for number in range(3):
            path = folder / f"{split}.soft_targets.{number}.safetensors"
            store(path, logits + 1 + number, split)
            inputs[f"{split}.soft_targets.checkpoint.{number}"] = Artifact(path, "", 0)
    turns = []

    def fit(job, *_):
        clean = job.validation.teacher_logits
        turns.extend(
            int(np.rint((job.view(epoch).teacher_logits.numpy() - stored(inputs["train.soft_targets"].path)[0]).mean()))
            for epoch in range(8)
        )
        assert torch.equal(clean, torch.from_numpy(stored(inputs["validation.soft_targets"].path)[0]))
        raise KeyboardInterrupt

    with_checkpoints = replace(recipe(), teacher=Teacher(entry("teacher"), "w.safetensors", checkpoints=("a.pt", "b.pt", "c.pt")))
    [step] = distill.steps(with_checkpoints, [])
    assert [name for name in with_checkpoints.soft_target_sources if "checkpoint" in name] == [
        f"soft_targets/checkpoint/{number}" for number in range(3)
    ]
    monkeypatch.setattr(trainer, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        distill.run(step, inputs, Context(folder, folder, folder, lambda *_: None))
    assert turns == [1, 1, 2, 2, 3, 3, 0, 0]


def test_a_baseline_needs_no_teacher(folder):
    inputs = {name: item for name, item in artifacts(folder).items() if "soft_targets" not in name}
    *_, step = distill.steps(recipe(baselines=Baselines(seeds=2)), [])
    for name in ("out", "work"):
        (folder / name).mkdir()
    result = distill.run(step, inputs, Context(folder, folder / "out", folder / "work", lambda *_: None))
    assert result.metrics["validation_accuracy"] > 0.5


def test_the_losses_of_a_student_are_named_as_a_search_chose_them(folder):
    searched = recipe(losses=(replace(KL, temperature="auto"), CE), baselines=Baselines(seeds=2))
    step = next(step for step in distill.steps(searched, []) if step.id == "distill/label_smoothing/0")
    chosen = {"losses": [Loss("ce", label_smoothing=0.3).to_dict()]}
    (folder / "chosen.json").write_text(json.dumps(chosen))
    inputs = {name: item for name, item in artifacts(folder).items() if "soft_targets" not in name}
    inputs["chosen"] = Artifact(folder / "chosen.json", "", 0)
    for name in ("out", "work"):
        (folder / name).mkdir()
    result = distill.run(step, inputs, Context(folder, folder / "out", folder / "work", lambda *_: None))
    assert result.metrics["losses"] == "ce (label_smoothing 0.3)"


@pytest.mark.parametrize(
    ("loss", "description"),
    [
        (Loss("ce"), "ce"),
        (Loss("kl", 0.9, temperature=2.0, standardize=True), "0.9 kl (temperature 2, standardize)"),
        (Loss("kl", 2, epochs=(1, 3), teacher="ema", temperature=0.5), "2 kl (epochs [1, 3], teacher ema, temperature 0.5)"),
        (Loss("attention", 100.0, taps=(Tap("a", "b"),)), "100 attention (over channels)"),
    ],
)
def test_a_loss_is_described_by_its_weight_and_what_it_does_not_leave_out(loss, description):
    assert loss.describe() == description


def test_a_baseline_takes_as_many_steps_as_the_student_that_learns_from_unlabelled_samples_too(folder):
    inputs = artifacts(folder, unlabelled=200)
    distilled = jobs.training_set(inputs, [KL, CE], "distill.losses")
    baseline = jobs.training_set({name: item for name, item in inputs.items() if "soft_targets" not in name}, [CE], "distill.baselines")
    assert len(baseline) == len(distilled) == 260
    assert torch.equal(baseline.inputs[0][60:120], distilled.inputs[0][:60])
    assert baseline.labels.min() >= 0


@pytest.mark.parametrize("loss", [Loss("dist"), Loss("kl", temperature=2.0, standardize=True), Loss("kl"), Loss("ce")])
def test_logits_are_calibrated_whatever_the_loss(folder, loss):
    inputs = artifacts(folder)
    result, _ = run(folder, recipe(losses=(loss,)), inputs)
    (note,) = result.notes
    assert "is folded into the last layer" in note
    module = modules.load_module(folder, entry("student"), folder / "out" / "student.safetensors")
    validation = data.load_split(inputs, "validation")
    with torch.no_grad():
        assert calibrate.fit_temperature(module(*validation.inputs), validation.labels) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("kind", ["dist", "dkd", "hard", "mse"])
def test_each_loss_trains_a_student(folder, kind):
    result, _ = run(folder, recipe(losses=(Loss(kind),)), artifacts(folder))
    assert result.metrics["validation_accuracy"] > 0.5


def test_a_student_is_distilled_and_loaded_again(folder):
    result, files = run(folder, recipe(), artifacts(folder))
    assert sorted(files) == ["curve.json", "student.safetensors"]
    curve = json.loads(files["curve.json"])
    losses = " + ".join(loss.describe() for loss in recipe().distill.losses)
    assert result.metrics == {**curve["epochs"][-1], "samples": 8 * 60, "losses": losses}
    assert result.metrics["validation_accuracy"] > 0.6
    module = modules.load_module(folder, entry("student"), folder / "out" / "student.safetensors")
    with torch.no_grad():
        predictions = module(torch.from_numpy(np.load(folder / "validation.inputs.0.npy"))).argmax(1).numpy()
    assert (predictions == np.load(folder / "validation.labels.npy")).mean() == pytest.approx(result.metrics["validation_accuracy"])


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
    with pytest.raises(RecipeError, match="'ce' needs classes, and the train split has no class labels"):
        run(folder, recipe(), artifacts(folder, labels=lambda classes: classes.astype(np.float64)))


def test_unlabelled_samples_are_learnt_from_through_kl_only(folder):
    inputs = artifacts(folder, unlabelled=200)
    assert len(jobs.training_set(inputs, [KL, CE], "distill.losses")) == 260
    assert jobs.training_set(inputs, [KL, CE], "distill.losses").labels[60:].unique().tolist() == [-1]
    assert len(jobs.training_set(inputs, [CE], "distill.losses")) == 60
    with_more = run(folder, recipe(), inputs)[1]
    assert run(folder, recipe(), artifacts(folder))[1] != with_more


def test_classes_that_differ_from_the_teachers_are_refused(folder):
    with pytest.raises(RecipeError, match=r"distill_user.py:four: has 4 classes; the teacher has 3"):
        run(folder, recipe("four"), artifacts(folder))
