# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest

from edgekd.domain.artifact import Artifact
from edgekd.domain.recipe import Data, Distill, EntryPoint, Recipe, Student, Teacher, TensorSpec, Training
from edgekd.errors import RecipeError
from edgekd.kd.teachers.load import load_teacher
from edgekd.ports import Context
from edgekd.stages import teach

CODE = """
import torch
from torch import nn

def teacher():
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))

def noise(x, generator):
    assert isinstance(generator, torch.Generator)
    return x + 0.1 * torch.randn(x.shape, generator=generator)

def cropping(x, generator):
    return x[:, :2]

def raising(x, generator):
    return x / {}["missing"]
"""


def entry(function):
    return EntryPoint("teach_user.py", function)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "teach_user.py").write_text(CODE)
    yield tmp_path
    sys.modules.pop("teach_user", None)


def recipe(**training):
    return Recipe(
        schema=1,
        name="t",
        data=Data(entry("splits")),
        teacher=Teacher(
            model=entry("teacher"),
            train=Training(**{"epochs": 8, "batch_size": 16, "learning_rate": 0.02, "threads": 1, "precision": "float32", **training}),
        ),
        student=Student(entry("student"), (TensorSpec("x", (1, 4)),)),
        distill=Distill(epochs=1),
    )


def artifacts(folder, labels=None):
    generator = np.random.default_rng(1)
    inputs_by_name = {}
    for split, count in (("train", 120), ("validation", 60)):
        classes = generator.integers(0, 3, count)
        inputs = (generator.standard_normal((count, 4)) + 2 * classes[:, None]).astype(np.float32)
        for name, array in ((f"{split}.inputs.0", inputs), (f"{split}.labels", classes if labels is None else labels(classes))):
            np.save(folder / f"{name}.npy", array)
            inputs_by_name[name] = Artifact(folder / f"{name}.npy", "", 0)
    return inputs_by_name


def run(folder, recipe, inputs):
    reports = []
    for name in ("out", "work"):
        (folder / name).mkdir(exist_ok=True)
    context = Context(folder, folder / "out", folder / "work", lambda share, text: reports.append((share, text)))
    [step] = teach.steps(recipe, [])
    result = teach.run(step, inputs, context)
    return result, reports, {path.name: path.read_bytes() for path in (folder / "out").iterdir()}


def test_a_given_teacher_is_not_trained():
    assert teach.steps(replace(recipe(), teacher=Teacher(entry("teacher"), "w.safetensors")), []) == []


def test_the_step_names_all_that_changes_the_teacher():
    [step] = teach.steps(recipe(augment=entry("noise")), [])
    assert (step.id, step.stage) == ("teach", "teach")
    assert step.params.augment == "teach_user.py:noise"
    assert (step.params.settings.epochs, step.params.settings.threads) == (8, 1)
    json.dumps(asdict(step.params), allow_nan=False)
    assert step.inputs == {
        "train.inputs.0": "inspect:train.inputs.0.npy",
        "train.labels": "inspect:train.labels.npy",
        "validation.inputs.0": "inspect:validation.inputs.0.npy",
        "validation.labels": "inspect:validation.labels.npy",
        "code": "inspect:teacher.code.json",
        "augment.code": "inspect:augment.code.json",
    }


def test_threads_are_the_machines_unless_the_recipe_names_them():
    [named], [unnamed] = teach.steps(recipe(threads=3), []), teach.steps(recipe(threads=None), [])
    assert named.params.settings.threads == 3
    assert unnamed.params.settings.threads == teach.runner.facts()["cores"]


def test_a_teacher_is_trained_and_loaded_again(folder):
    result, reports, files = run(folder, recipe(augment=entry("noise"), label_smoothing=0.05), artifacts(folder))
    assert sorted(files) == ["curve.json", "teacher.safetensors"]
    curve = json.loads(files["curve.json"])
    assert [line["epoch"] for line in curve["epochs"]] == list(range(1, 9))
    assert result.metrics == {**curve["epochs"][-1], "samples": 8 * 120}
    assert result.metrics["validation_accuracy"] > 0.7
    assert reports[-1][0] == 1.0
    teacher = load_teacher(folder, entry("teacher"), folder / "out" / "teacher.safetensors")
    labels = np.load(folder / "validation.labels.npy")
    logits = teacher([np.load(folder / "validation.inputs.0.npy")])
    assert (logits.argmax(1) == labels).mean() == pytest.approx(result.metrics["validation_accuracy"])


def test_augmentation_and_smoothing_change_the_teacher(folder):
    weights = []
    for index, changed in enumerate([recipe(), recipe(augment=entry("noise")), recipe(label_smoothing=0.3)]):
        where = folder / str(index)
        where.mkdir()
        (where / "teach_user.py").write_text(CODE)
        weights.append(run(where, changed, artifacts(where))[2]["teacher.safetensors"])
        sys.modules.pop("teach_user")
    assert len(set(weights)) == 3


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("cropping", "teach_user.py:cropping: changes the shapes or types of its inputs"),
        ("raising", r"teach_user.py:\d+: raising\(\) raised KeyError"),
    ],
)
def test_an_augmentation_that_misbehaves_is_reported(folder, function, message):
    with pytest.raises(RecipeError, match=message):
        run(folder, recipe(augment=entry(function)), artifacts(folder))


def test_labels_that_are_not_classes_are_refused(folder):
    with pytest.raises(RecipeError, match=r"teacher.train: the train split has samples without a class"):
        run(folder, recipe(), artifacts(folder, labels=lambda classes: classes.astype(np.float64)))
