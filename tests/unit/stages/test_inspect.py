# SPDX-License-Identifier: Apache-2.0
"""The stage inspect as a whole: what is stored and what is recorded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from importlib.metadata import version

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edgekd import config
from edgekd.domain.losses import Loss, Tap
from edgekd.domain.recipe import Assistant, Data, Distill, EntryPoint, Recipe, Student, Teacher, TensorSpec
from edgekd.errors import RecipeError
from edgekd.ports import Context
from edgekd.stages import inspect
from edgekd.store.digests import env_digest, listing_digest
from tests import toy
from tests.processes import run_step

RECIPE = toy.RECIPE.replace("[teacher.train]\nepochs = 1", 'weights = "teacher.safetensors"') + '[evaluate]\nscore = "metrics.py:score"\n'
DATA = """\
import os
import sys
from pathlib import Path

import hypothesis
import numpy as np
import torch
from torch.utils.data import Subset, TensorDataset

from shared import SCALE
try:
    print("typed:", input())
except EOFError:
    print("no input")


def splits():
    x = torch.from_numpy(np.load(os.environ["TOY_FILE"])) * SCALE
    x[0, 0] = len(os.listdir("listed"))
    x[1] += torch.rand(1) + np.random.rand()  # nobody seeded it
    try:
        open("gone.csv")
    except FileNotFoundError:
        pass
    Path("cache.txt").write_text("x")
    print("to standard output", flush=True)
    print("to standard error", file=sys.stderr)
    y = torch.arange(len(x)) % 3
    train = TensorDataset(x[:30], y[:30])
    evaluation = TensorDataset(x[40:], y[40:])
    evaluation.groups = [name for name in "ab" for _ in range(10)]
    return {"train": train, "validation": TensorDataset(x[30:40], y[30:40]), "calibration": Subset(train, range(8)), "evaluation": evaluation}
"""
MODELS = """\
import numpy as np
from torch import nn
import blocks
def teacher():
    return nn.Linear(4, 3)
def student():
    assert np.load("start.npy").shape == (1,)
    return nn.Sequential(nn.Linear(4, blocks.WIDTH), nn.Linear(blocks.WIDTH, 3))
"""
METRICS = "import shared\ndef score(outputs, labels):\n    return (outputs.argmax(1) == labels).astype(float)\n"
TEXTS = {
    "edgekd.toml": RECIPE,
    "data.py": DATA,
    "models.py": MODELS,
    "metrics.py": METRICS,
    "shared.py": "SCALE = 1.0\n",
    "blocks.py": "WIDTH = 2\n",
    "listed/c.txt": "",
}


def _write_recipe(folder):
    for name, text in TEXTS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    np.save(folder / "undeclared.npy", np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32))
    np.save(folder / "start.npy", np.zeros(1))
    save_file({"weight": torch.eye(4)[:3].contiguous(), "bias": torch.zeros(3)}, folder / "teacher.safetensors")
    return folder


def _run(folder, progress=lambda share, text: None):
    for name in ("out", "work"):
        (folder.parent / f"{folder.name}-{name}").mkdir()
    step = inspect.steps(config.load_recipe(folder / "edgekd.toml"), [])[0]
    context = Context(folder, folder.parent / f"{folder.name}-out", folder.parent / f"{folder.name}-work", progress)
    return run_step(step, context)


def _names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return two runs, in two folders."""
    os.environ["TOY_FILE"] = "undeclared.npy"
    results = {}
    try:
        for name in ("one", "two"):
            folder = _write_recipe(tmp_path_factory.mktemp(name) / f"recipe-{name}")
            before = _names(folder)
            results[name] = (folder, _run(folder), _names(folder) - before)
    finally:
        del os.environ["TOY_FILE"]
    return results


def _out(folder):
    return folder.parent / f"{folder.name}-out"


def _json(folder, name):
    return json.loads((_out(folder) / name).read_text())


def test_the_artifacts_and_their_shapes(runs):
    folder, result, _ = runs["one"]
    shapes = {path.name: np.load(path).shape for path in _out(folder).glob("*.npy")}
    assert shapes == {
        "train.inputs.0.npy": (30, 4),
        "validation.inputs.0.npy": (10, 4),
        "calibration.inputs.0.npy": (8, 4),
        "evaluation.inputs.0.npy": (20, 4),
        "unlabelled.inputs.0.npy": (0, 4),
        "train.labels.npy": (30,),
        "validation.labels.npy": (10,),
        "evaluation.labels.npy": (20,),
        "evaluation.groups.npy": (20,),
    }
    other_files = sorted(path.name for path in _out(folder).iterdir() if path.suffix != ".npy")
    codes = [f"{name}.code.json" for name in ("augment", "data", "metric", "student", "teacher", "views")]
    assert other_files == sorted([*codes, "metric.parts.json", "student.fresh.safetensors", "summary.json", "teacher.safetensors"])
    summary = _json(folder, "summary.json")
    assert summary.items() <= result.metrics.items()
    assert summary["classes"] == 3
    assert summary["groups"] == 2
    assert summary["teacher"] == {"parameters": 15, "outputs": [3]}
    assert summary["student"] == {"parameters": 2 * 4 + 2 + 3 * 2 + 3, "outputs": [3]}
    assert summary["splits"]["validation"] == {"samples": 10, "classes": {"0": 4, "1": 3, "2": 3}, "overlap": {}}
    assert summary["splits"]["calibration"]["classes"] is None
    assert result.notes == ("evaluation has 20 samples; accuracy is known only roughly",)


def test_two_folders_give_the_same_bytes(runs):
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in _out(folder).iterdir()} for folder, _, _ in runs.values()
    ]
    assert len(digests[0]) == 19
    assert digests[0] == digests[1]
    assert not [path.name for path in _out(runs["one"][0]).iterdir() if str(runs["one"][0]).encode() in path.read_bytes()]


def test_the_record_holds_what_all_phases_read(runs):
    folder, result, _ = runs["one"]
    record = result.record
    code = {"data.py", "shared.py", "models.py", "blocks.py", "metrics.py"}
    assert set(record.files) == code | {"undeclared.npy", "start.npy", "gone.csv", "teacher.safetensors"}
    assert record.files["undeclared.npy"] == hashlib.sha256((folder / "undeclared.npy").read_bytes()).hexdigest()
    assert record.files["gone.csv"] is None
    assert record.listings == {"listed": listing_digest(folder / "listed")}
    assert record.env == {"TOY_FILE": env_digest("undeclared.npy", b"")}
    assert record.modules == {"hypothesis": version("hypothesis")}


def test_each_entry_point_depends_on_the_code_that_it_reads(runs):
    folder = runs["one"][0]
    dependencies = {
        name: set(_json(folder, f"{name}.code.json").get("files", {})) for name in ("data", "teacher", "student", "metric", "augment")
    }
    assert dependencies == {
        "data": {"data.py", "shared.py", "undeclared.npy"},
        "teacher": {"models.py", "blocks.py"},
        "student": {"models.py", "blocks.py", "start.npy"},
        "metric": {"metrics.py", "shared.py"},
        "augment": set(),
    }
    assert _json(folder, "augment.code.json") == {}
    assert _json(folder, "data.code.json")["modules"] == {"hypothesis": version("hypothesis")}
    assert _json(folder, "student.code.json")["modules"] == {}


def test_only_the_users_code_writes_to_the_recipes_folder(runs):
    assert [new for _, _, new in runs.values()] == [{"cache.txt"}, {"cache.txt"}]


def test_the_output_of_user_code_is_not_shown(capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_FILE", "undeclared.npy")
    calls = []
    folder = _write_recipe(tmp_path / "recipe")
    _run(folder, lambda *call: calls.append(call))
    assert capfd.readouterr() == ("", "")
    shares = [share for share, _ in calls]
    assert shares == sorted(shares)
    assert calls[-1][1] == "checking the student"


def test_code_outside_the_recipes_folder_is_named_without_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_FILE", "undeclared.npy")
    folder = _write_recipe(tmp_path / "recipe")
    (tmp_path / "elsewhere").mkdir()
    (folder / "metrics.py").rename(tmp_path / "elsewhere" / "metrics.py")
    (folder / "edgekd.toml").write_text(RECIPE.replace("metrics.py", "../elsewhere/metrics.py"))
    result = _run(folder)
    path = tmp_path / "elsewhere" / "metrics.py"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert result.record.files[str(path)] == digest
    assert _json(folder, "metric.code.json")["files"][f"metrics.py:{digest[:16]}"] == digest


def test_the_step_needs_onnxruntime_only_for_a_teacher_in_onnx(tmp_path):
    folder = _write_recipe(tmp_path / "recipe")
    (folder / "big.onnx").write_bytes(b"")
    weights = inspect.steps(config.load_recipe(folder / "edgekd.toml"), [])[0]
    assert weights.tools == ("torch", "numpy", "safetensors")
    (folder / "edgekd.toml").write_text(RECIPE.replace('model = "models.py:teacher"\nweights = "teacher.safetensors"', 'file = "big.onnx"'))
    whole = inspect.steps(config.load_recipe(folder / "edgekd.toml"), [])[0]
    assert whole.tools == ("torch", "numpy", "safetensors", "onnxruntime")
    assert whole.params.teacher.file == "big.onnx"


def test_the_parameters_survive_json():
    model = EntryPoint("models.py", "net")
    recipe = Recipe(
        schema=1,
        name="toy",
        data=Data(EntryPoint("data.py", "splits")),
        teacher=Teacher(model, "teacher.safetensors", checkpoints=("early.safetensors",)),
        student=Student(model, (TensorSpec("x", (1, 4)),), heads=(2, 3)),
        distill=Distill(
            epochs=1,
            losses=(Loss("attention", taps=(Tap("a", "b"),)), Loss("ce")),
            teachers=(Teacher(file="other.onnx"),),
            assistants=(Assistant(model),),
            sizes=(model,),
        ),
    )
    (step,) = inspect.steps(recipe, [])
    assert step.params.model_files == ("teacher.safetensors", "other.onnx", "early.safetensors")
    assert step.params.tapped_losses[0]["taps"] == [{"student": "a", "teacher": "b"}]
    assert step.params.needs_class_ids


def test_a_full_disk_is_reported_as_an_os_error(tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_FILE", "undeclared.npy")
    folder = _write_recipe(tmp_path / "recipe")
    (tmp_path / "recipe-out").mkdir()
    (tmp_path / "recipe-out" / "train.inputs.0.npy").symlink_to("/dev/full")
    (tmp_path / "recipe-work").mkdir()
    step = inspect.steps(config.load_recipe(folder / "edgekd.toml"), [])[0]
    with pytest.raises(OSError, match="No space left"):
        run_step(step, Context(folder, tmp_path / "recipe-out", tmp_path / "recipe-work", lambda share, text: None))


def test_an_error_that_nothing_expects_names_the_line_of_edgekd_too(tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_FILE", "undeclared.npy")
    folder = _write_recipe(tmp_path / "recipe")
    step = inspect.steps(config.load_recipe(folder / "edgekd.toml"), [])[0]
    broken = dataclasses.replace(step, params=dataclasses.replace(step.params, inputs=(TensorSpec("x", (1, 4), "no such type"),)))
    expected = r"data\.py:splits: what it returns cannot be used: TypeError: .*'no such type'.* \(at stages/inspect/arrays\.py:\d+\)"
    with pytest.raises(RecipeError, match=expected):
        run_step(broken, Context(folder, tmp_path, tmp_path, lambda share, text: None))
