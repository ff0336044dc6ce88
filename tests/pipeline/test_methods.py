# SPDX-License-Identifier: Apache-2.0
"""Every way to distil, from a recipe to a student that has learned, on examples/digits."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from edgekd.cli import main
from edgekd.domain.losses import LOSSES
from edgekd.domain.recipe import Entry
from edgekd.errors import EdgekdError
from edgekd.kd import models as kd_models
from edgekd.kd.stored import store_answers

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits"
MORE_MODELS = '''

class Rows(nn.Module):
    """A transformer's layer over the rows of an image; ``weights`` gives its attention beside the states."""

    def __init__(self, width, heads):
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.weights = Weights(width, heads)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, image):
        states = self.embed(image[:, 0])
        states = self.norm(states + self.weights(states)[0])
        return self.head(states.mean(1))


class Weights(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.inner = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, states):
        return self.inner(states, states, states, need_weights=True, average_attn_weights=False)


def large_rows():
    return Rows(64, 4)


def small_rows():
    return Rows(24, 2)


def middle():
    return nn.Sequential(*_block(1, 16), nn.MaxPool2d(2), *_block(16, 32), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 2 * 2, 10))


def shallow():
    """As the teacher, but each block is a depthwise and a pointwise convolution."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 64, 1), nn.BatchNorm2d(64), nn.ReLU()),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 4 * 4, 10),
    )


def deep():
    return nn.Sequential(
        nn.Sequential(*_block(1, 32)), nn.Sequential(*_block(32, 64)), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 4 * 4, 10)
    )
'''
TAPS = 'taps = [{ student = "6", teacher = "5" }]'
ROWS = ("teacher = large_rows", "student = small_rows")
BLOCKS = ("teacher = deep", "student = shallow")
BLOCK = '{ kind = "block", weight = 10.0, taps = [{ student = "0", teacher = "0" }, { student = "1", teacher = "1" }]'
# name -> losses, lines of [distill], changes of models
METHODS = {
    **{kind: (f'{{ kind = "{kind}" }}', "", ()) for kind in ("ce", "dist", "dkd", "hard", "kl", "mse")},
    "standardized": ('{ kind = "kl", temperature = 2.0, standardize = true }', "", ()),
    "attention": (f'{{ kind = "ce" }}, {{ kind = "attention", weight = 10.0, {TAPS} }}', "", ()),
    "hint": (f'{{ kind = "ce" }}, {{ kind = "hint", {TAPS} }}', "", ()),
    "hint, then kl": (f'{{ kind = "hint", epochs = [1, 2], {TAPS} }}, {{ kind = "kl", epochs = [3, 8] }}', "", ()),
    "relation": ('{ kind = "kl" }, { kind = "relation", taps = [{ student = "8", teacher = "7" }] }', "", ()),
    "hidden": ('{ kind = "ce" }, { kind = "hidden", taps = [{ student = "norm", teacher = "norm" }] }', "", ROWS),
    "attention of heads": (
        '{ kind = "ce" }, { kind = "attention", over = "heads", taps = [{ student = "weights:1", teacher = "weights:1" }] }', "", ROWS
    ),
    "block beside kl": (f'{BLOCK} }}, {{ kind = "kl" }}', "", BLOCKS),
    "block, then kl": (f'{BLOCK}, epochs = [1, 3] }}, {{ kind = "kl", epochs = [4, 8] }}', "", BLOCKS),
    "average": ('{ kind = "ce" }, { kind = "kl", teacher = "average" }', "", ()),
    "previous": ('{ kind = "ce" }, { kind = "kl", teacher = "previous", temperature = 1.0 }', "", ()),
    "teacher and average": ('{ kind = "kl" }, { kind = "kl", teacher = "average", weight = 0.5 }', "", ()),
    "several teachers": ('{ kind = "kl" }', 'teachers = [{ model = "models.py:middle", weights = "middle.safetensors" }, OTHERS]', ()),
    "several teachers by confidence": (
        '{ kind = "kl" }', 'mixing = "confidence"\nteachers = [{ model = "models.py:middle", weights = "middle.safetensors" }]', ()
    ),
    "assistants": ('{ kind = "kl" }', 'assistants = [{ model = "models.py:middle", epochs = 4 }, { model = "models.py:student" }]', ()),
    "search": ('{ kind = "kl", temperature = "auto", standardize = "auto" }, { kind = "ce", weight = "auto" }', "search_share = 0.5", ()),
    "checkpoints": ('{ kind = "kl" }', "", ("checkpoints",)),
}  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A copy of the example, quick, with a cache that all methods share, and models of other origins."""
    folder = tmp_path_factory.mktemp("methods")
    shutil.copytree(EXAMPLE, folder / "digits", ignore=shutil.ignore_patterns("build", "__pycache__"))
    folder /= "digits"
    (folder / "models.py").write_text((folder / "models.py").read_text() + MORE_MODELS)
    text = (folder / "edgekd.toml").read_text().replace("epochs = 10", "epochs = 4").replace("epochs = 30", "epochs = 8")
    (folder / "edgekd.toml").write_text(
        text.replace("[distill]", "[distill]\nthreads = 1").replace("epochs = 4", "epochs = 4\nthreads = 1")
    )
    torch.manual_seed(0)
    middle = kd_models.student(folder, Entry("models.py", "middle"))
    kd_models.save_weights(middle, folder / "middle.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        torch.onnx.export(
            middle.eval(), (torch.zeros(2, 1, 8, 8),), folder / "middle.onnx", dynamic_shapes=({0: torch.export.Dim("n")},), verbose=False
        )
    yield folder
    for name in ("models", "data"):
        sys.modules.pop(name, None)


def build(site, monkeypatch, text, until="distill"):
    """Build up to a stage; return what the command printed and its exit code."""
    monkeypatch.setenv("EDGEKD_CACHE", str(site.parent / "cache"))
    (site / "method.toml").write_text(text)
    found = CliRunner().invoke(main, ["build", "--recipe", str(site / "method.toml"), "--target", "host", "--until", until])
    if isinstance(found.exception, EdgekdError):  # which __main__ tells
        return found.output + str(found.exception), found.exception.exit_code
    return found.output, found.exit_code


def recipe(site, losses, lines="", changes=()):
    text = (site / "edgekd.toml").read_text()
    old = next(line for line in text.splitlines() if line.startswith("losses"))
    others = '{ file = "middle.onnx", weight = 0.2 }'
    text = text.replace(old, f"losses = [{losses}]\n{lines.replace('OTHERS', others)}")
    for change in changes:
        if change == "checkpoints":
            text = text.replace("[teacher.train]", "[teacher.train]\ncheckpoints = 2")
            continue
        role, function = change.split(" = ")
        text = text.replace(f'"models.py:{role}"', f'"models.py:{function}"')
    return text


def accuracy(site):
    curve = json.loads((site / "build" / "until-distill" / "curve.json").read_text())
    return curve["epochs"][curve["best_epoch"] - 1]["validation_accuracy"]


@pytest.mark.parametrize("name", METHODS)
def test_a_student_learns_by(site, monkeypatch, name):
    monkeypatch.chdir(site)
    losses, lines, changes = METHODS[name]
    told, code = build(site, monkeypatch, recipe(site, losses, lines, changes))
    assert code == 0, told
    assert accuracy(site) > 0.6


def test_every_loss_is_among_the_methods():
    assert {kind for kind in LOSSES if not any(f'"{kind}"' in losses for losses, *_ in METHODS.values())} == set()


def test_stored_answers_teach_and_are_the_reference_without_a_model(site, monkeypatch):
    monkeypatch.chdir(site)
    teacher = recipe(site, '{ kind = "kl" }')
    told, code = build(site, monkeypatch, teacher, until="teach")
    assert code == 0, told
    module = kd_models.load_student(site, Entry("models.py", "teacher"), site / "build" / "until-teach" / "teacher.safetensors")
    sys.path.insert(0, str(site))
    try:
        from data import splits  # the example's own
    finally:
        sys.path.remove(str(site))
    images = torch.cat([torch.stack([sample[0] for sample in split]) for name, split in splits().items() if name != "calibration"])
    with torch.no_grad():
        store_answers(site / "answers.safetensors", [images.numpy()], module(images).numpy())
    start, end = teacher.index("[teacher]"), teacher.index("[student]")
    stored = teacher[:start] + '[teacher]\nfile = "answers.safetensors"\n' + teacher[end:]
    told, code = build(site, monkeypatch, stored, until="evaluate")
    assert code == 0, told
    told, code = build(site, monkeypatch, stored.replace("[distill]", "[distill]\nseed = 1"))
    assert accuracy(site) > 0.6
    first = np.load(next((site.parent / "cache").rglob("train.outputs.npy")))
    assert first.shape[2] == 10


def test_stored_answers_to_other_samples_are_refused_before_anything_is_trained(site, monkeypatch):
    monkeypatch.chdir(site)
    store_answers(site / "few.safetensors", [np.zeros((3, 1, 8, 8), np.float32)], np.zeros((3, 10), np.float32))
    text = recipe(site, '{ kind = "kl" }', 'teachers = [{ file = "few.safetensors" }]')
    told, code = build(site, monkeypatch, text)
    assert code == 2
    assert "few.safetensors: has no answer to a sample" in told
    assert "epoch" not in told


def test_a_hint_into_a_mobile_student_is_warned_of_and_one_into_a_plain_student_is_not(site, monkeypatch):
    monkeypatch.chdir(site)
    hint = '{ kind = "ce" }, { kind = "hint", taps = [{ student = "1", teacher = "1" }] }'
    told, code = build(site, monkeypatch, recipe(site, hint, "", BLOCKS), until="inspect")
    assert code == 0, told
    assert "warning: hint from a plain convolutional teacher into a depthwise (mobile) student did harm" in told
    assert "did harm" not in build(site, monkeypatch, recipe(site, hint, "", ("teacher = deep",)), until="inspect")[0]
    assert "did harm" not in build(site, monkeypatch, recipe(site, '{ kind = "kl" }', "", BLOCKS), until="inspect")[0]


@pytest.mark.parametrize(
    ("losses", "lines", "message"),
    [
        (
            '{ kind = "hint", taps = [{ student = "99", teacher = "5" }] }',
            "",
            "tap '99' of the student (models.py:student): no such module",
        ),
        (
            '{ kind = "kl" }',
            'assistants = [{ model = "models.py:three" }]',
            "models.py:three: gives other outputs than teacher and student",
        ),
        (
            '{ kind = "kl" }',
            'teachers = [{ model = "models.py:middle", weights = "nan.safetensors" }]',
            "gives outputs that are not finite",
        ),
        ('{ kind = "kl" }', 'teachers = [{ model = "models.py:teacher", weights = "middle.safetensors" }]', "the weights lack"),
    ],
)
def test_what_is_wrong_is_told_before_the_first_epoch(site, monkeypatch, losses, lines, message):
    monkeypatch.chdir(site)
    (site / "models.py").write_text(
        (EXAMPLE / "models.py").read_text() + MORE_MODELS + "\n\ndef three():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))\n"
    )
    broken = kd_models.read_weights(site / "middle.safetensors")
    (site / "nan.safetensors").write_bytes(kd_models.pack({name: value * float("nan") for name, value in broken.items()}))
    told, code = build(site, monkeypatch, recipe(site, losses, lines))
    assert code == 2, told
    assert message in told
    assert "epoch" not in told
