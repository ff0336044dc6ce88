# SPDX-License-Identifier: Apache-2.0
"""Recipes: values and defaults, overrides of targets, and all problems at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekd import config
from edgekd.domain.budget import Budget
from edgekd.domain.losses import Loss
from edgekd.domain.recipe import Data, Distill, EntryPoint, Evaluate, Recipe, Student, Teacher, TensorSpec
from edgekd.domain.scheme import Quantize
from tests.unit.config.documents import RECIPE, problems_of, write_toml


def _recipe(folder, **changes):
    return config.load_recipe(write_toml(folder, {**RECIPE, **changes}))


def test_a_short_recipe_has_defaults(tmp_path):
    assert _recipe(tmp_path) == Recipe(
        schema=1,
        name="toy",
        data=Data(EntryPoint("data.py", "splits")),
        teacher=Teacher(EntryPoint("models.py", "teacher"), "teacher.safetensors"),
        student=Student(EntryPoint("models.py", "student"), (TensorSpec("image", (1, 8, 8)),)),
        distill=Distill(3, losses=(Loss("kl", 0.9), Loss("ce", 0.1))),
    )


def test_an_integer_is_accepted_as_a_float(tmp_path):
    recipe = _recipe(tmp_path, distill={"epochs": 3, "learning_rate": 1, "losses": [{"kind": "kl"}]})
    assert type(recipe.distill.learning_rate) is float


def test_a_metric_is_top1_or_an_entry_point(tmp_path):
    assert _recipe(tmp_path, evaluate={"metric": "top1"}).evaluate == Evaluate()
    assert _recipe(tmp_path, evaluate={"metric": "models.py:f1"}).evaluate == Evaluate(EntryPoint("models.py", "f1"))
    assert _recipe(tmp_path, evaluate={"score": "models.py:iou"}).evaluate == Evaluate("top1", EntryPoint("models.py", "iou"))


def test_code_may_be_in_another_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "code.py").touch()
    for file in ("sub/code.py", str(tmp_path / "sub" / "code.py")):
        assert _recipe(tmp_path, data={"splits": f"{file}:splits"}).data.splits == EntryPoint(file, "splits")


def test_a_target_changes_budget_and_quantization_key_by_key(tmp_path):
    recipe = _recipe(
        tmp_path,
        budget={"max_size_kib": 100, "max_accuracy_drop_pp": 1.0},
        quantize={"io": "int8"},
        target={"rpi4": {"budget": {"max_size_kib": 64}}, "my.own": {"quantize": {"schemes": ["static_wi8_ai8"]}}},
    )
    assert recipe.overrides_for("rpi4").budget == Budget(max_accuracy_drop_pp=1.0, max_size_kib=64.0)
    assert recipe.overrides_for("rpi4").quantize == Quantize(io="int8")
    assert recipe.overrides_for("my.own").budget == recipe.budget
    assert recipe.overrides_for("my.own").quantize == Quantize(("static_wi8_ai8",), io="int8")
    assert recipe.overrides_for("another").budget == recipe.budget


def test_problems_of_all_parts_are_reported_together(tmp_path):
    problems = problems_of(
        _recipe,
        tmp_path,
        nme="x",
        data={"splits": "dta.py:splits"},
        teacher={"model": "models.py:teacher"},
        student={"model": "models.py:student", "inputs": [{"name": "image", "shape": [2, 8]}, {"name": 3, "shape": [1]}]},
        distill={"epochs": 0, "losses": [{"kind": "ce", "temperature": 2.0}]},
        quantize={"schemes": ["float32"], "io": "int8"},
        evaluate={"metric": "top5"},
        target={"rpi4": {"budget": {"max_size": 3}}},
    )
    keys = sorted(problem.split(": ")[1] for problem in problems)
    assert keys == [
        "data.splits",
        "distill.epochs",
        "distill.losses[0].temperature",
        "evaluate.metric",
        "nme",
        "quantize.io",
        "student.inputs[0].shape",
        "student.inputs[1].name",
        "target.rpi4.budget.max_size",
        "teacher",
    ]


def test_a_problem_of_the_recipe_is_not_repeated_for_its_targets(tmp_path):
    problems = problems_of(_recipe, tmp_path, quantize={"schemes": "all"}, target={"rpi4": {"budget": {"max_size_kib": 3}}})
    assert [problem.split(": ")[1] for problem in problems] == ["quantize.schemes"]


@pytest.mark.parametrize(
    ("teacher", "is_valid"),
    [
        ({"model": "models.py:teacher", "weights": "teacher.safetensors"}, True),
        ({"model": "models.py:teacher", "train": {"epochs": 1}}, True),
        ({"file": "teacher.onnx"}, True),
        ({}, False),
        ({"weights": "teacher.safetensors"}, False),
        ({"train": {"epochs": 1}}, False),
        ({"model": "models.py:teacher"}, False),
        ({"model": "models.py:teacher", "weights": "teacher.safetensors", "train": {"epochs": 1}}, False),
        ({"model": "models.py:teacher", "file": "teacher.onnx"}, False),
        ({"weights": "teacher.safetensors", "file": "teacher.onnx"}, False),
    ],
)
def test_a_teacher_has_weights_or_training_or_a_file(tmp_path, teacher, is_valid):
    if is_valid:
        assert _recipe(tmp_path, teacher=teacher).teacher
    else:
        assert any("it.toml: teacher: has" in problem for problem in problems_of(_recipe, tmp_path, teacher=teacher))


def test_paths_are_relative_to_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    path = write_toml(tmp_path / "sub", {**RECIPE, "name": ""})
    monkeypatch.chdir(tmp_path)
    for recipe_path in (path, Path("sub/it.toml")):
        assert problems_of(config.load_recipe, recipe_path)[0].startswith("sub/it.toml: name: ")
    monkeypatch.chdir(tmp_path / "sub")
    (tmp_path / "elsewhere").mkdir()
    assert problems_of(config.load_recipe, path)[0].startswith("it.toml: ")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert problems_of(config.load_recipe, path)[0].startswith(f"{path}: ")


def test_a_removed_current_folder_does_not_hide_the_problem(tmp_path, monkeypatch):
    folder = tmp_path / "removed"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert problems_of(config.load_recipe, Path("it.toml"))[0] == "it.toml: no such recipe; edgekd init writes one"


def test_a_byte_order_mark_is_ignored(tmp_path):
    path = write_toml(tmp_path, RECIPE)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert config.load_recipe(path).name == "toy"
