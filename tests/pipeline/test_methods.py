# SPDX-License-Identifier: Apache-2.0
"""Every method of distillation, from a recipe to a trained student, on examples/digits."""

from __future__ import annotations

import json
import re
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
from edgekd.domain.recipe import EntryPoint
from edgekd.errors import EdgekdError
from edgekd.kd import modules
from edgekd.kd.teachers.stored import save_teacher_logits
from tests import teachers

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


def large_of_many():
    return nn.Sequential(*list(teacher())[:-1], nn.Linear(64 * 4 * 4, 300))


def small_of_many():
    return nn.Sequential(*list(student())[:-1], nn.Linear(16 * 2 * 2, 300))


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
MORE_DATA = '''

def _with(labels):
    """Return the splits with other labels, and the unlabelled one made of training images."""
    relabelled = {}
    for name, split in splits().items():
        images, classes = (torch.stack([torch.as_tensor(sample[part]) for sample in split]) for part in (0, 1))
        relabelled[name] = torch.utils.data.TensorDataset(images, labels(classes))
    return relabelled


def bits():
    return _with(lambda digit: torch.stack([digit // 2**place % 2 for place in range(4)], dim=1))


def parity_and_digit():
    return _with(lambda digit: torch.stack([digit % 2, digit], dim=1))


def tokens():
    return _with(lambda digit: torch.stack([digit // 2**place % 2 for place in range(4)], dim=1).long())


def value():
    return _with(lambda digit: digit.float() / 10)


def right_bits(outputs, labels):
    return ((outputs > 0) == labels).mean(1)


def right_tokens(outputs, labels):
    return (outputs.reshape(len(outputs), 4, 2).argmax(2) == labels).mean(1)


def right_digit(outputs, labels):
    return (outputs[:, 2:].argmax(1) == labels[:, 1]).astype(float)


def near(outputs, labels):
    return (abs(outputs[:, 0] - labels) < 0.1).astype(float)
'''
# outputs that are not one softmax: data, score, width, lines of [student], losses; the loss of the teacher is in tests/teachers.py
OUTPUTS = {
    "multilabel": ("bits", "right_bits", 4, 'task = "multilabel"', '{ kind = "ce" }, { kind = "kl", weight = 0.05 }'),
    "heads": ("parity_and_digit", "right_digit", 12, "heads = [2, 10]", '{ kind = "ce" }, { kind = "kl", weight = 0.05 }'),
    "tokens": ("tokens", "right_tokens", 8, "heads = [2, 2, 2, 2]", '{ kind = "ce" }, { kind = "dkd", weight = 0.05 }'),
    "regression": ("value", "near", 1, 'task = "regression"', '{ kind = "mse_labels" }, { kind = "mse", weight = 0.01 }'),
}
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
    "many classes": ('{ kind = "kl", temperature = 1.0 }, { kind = "ce" }', "", ("teacher = large_of_many", "student = small_of_many")),
    "ema": ('{ kind = "ce" }, { kind = "kl", teacher = "ema" }', "", ()),
    "last epoch": ('{ kind = "ce" }, { kind = "kl", teacher = "last_epoch", temperature = 1.0 }', "", ()),
    "teacher and ema": ('{ kind = "kl" }, { kind = "kl", teacher = "ema", weight = 0.5 }', "", ()),
    "several teachers": ('{ kind = "kl" }', 'teachers = [{ model = "models.py:middle", weights = "middle.safetensors" }, OTHERS]', ()),
    "several teachers by confidence": (
        '{ kind = "kl" }', 'teacher_weighting = "confidence"\nteachers = [{ model = "models.py:middle", weights = "middle.safetensors" }]', ()
    ),
    "assistants": ('{ kind = "kl" }', 'assistants = [{ model = "models.py:middle", epochs = 4 }, { model = "models.py:student" }]', ()),
    "search": ('{ kind = "kl", temperature = "auto", standardize = "auto" }, { kind = "ce", weight = "auto" }', "search_share = 0.5", ()),
    "checkpoints": ('{ kind = "kl" }', "", ("checkpoints",)),
    "break-even": ('{ kind = "kl", temperature = "auto" }', "break_even_inferences = 1000000000\nmax_minutes = 99\nsearch_share = 0.5", ()),
    "mixed views": ('{ kind = "kl" }, { kind = "ce" }', "mixup = 1.0\nviews = 3", ()),
}  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the example, with few epochs, a cache that all methods share, and further models."""
    folder = tmp_path_factory.mktemp("methods")
    shutil.copytree(EXAMPLE, folder / "digits", ignore=shutil.ignore_patterns("build", "__pycache__"))
    folder /= "digits"
    (folder / "models.py").write_text((folder / "models.py").read_text() + MORE_MODELS)
    text = (folder / "edgekd.toml").read_text().replace("epochs = 10", "epochs = 4").replace("epochs = 30", "epochs = 8")
    (folder / "edgekd.toml").write_text(
        text.replace("[distill]", "[distill]\nthreads = 1").replace("epochs = 4", "epochs = 4\nthreads = 1")
    )
    middle = teachers.train(folder, "middle", "splits", torch.nn.functional.cross_entropy)
    modules.save_weights(middle, folder / "middle.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        torch.onnx.export(
            middle.eval(),
            (torch.zeros(2, 1, 8, 8),),
            folder / "middle.onnx",
            dynamic_shapes=({0: torch.export.Dim("n")},),
            external_data=False,
            verbose=False,
        )
    yield folder
    for name in ("models", "data"):
        sys.modules.pop(name, None)


def build(project, monkeypatch, text, until="distill"):
    """Build up to a stage; return what the command printed and its exit code."""
    monkeypatch.setenv("EDGEKD_CACHE", str(project.parent / "cache"))
    (project / "method.toml").write_text(text)
    result = CliRunner().invoke(main, ["build", "--recipe", str(project / "method.toml"), "--target", "host", "--until", until])
    if isinstance(result.exception, EdgekdError):  # which __main__ prints
        return result.output + str(result.exception), result.exception.exit_code
    return result.output, result.exit_code


def recipe(project, losses, lines="", changes=()):
    text = (project / "edgekd.toml").read_text()
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


def accuracy(project):
    curve = json.loads((project / "build" / "until-distill" / "curve.json").read_text())
    return curve["epochs"][-1]["validation_accuracy"]


@pytest.mark.parametrize("name", METHODS)
def test_a_student_learns_by(project, monkeypatch, name):
    monkeypatch.chdir(project)
    losses, lines, changes = METHODS[name]
    output, code = build(project, monkeypatch, recipe(project, losses, lines, changes))
    assert code == 0, output
    assert accuracy(project) > 0.6


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_student_with_other_outputs_learns(project, monkeypatch, name):
    monkeypatch.chdir(project)
    splits, score, width, line, losses = OUTPUTS[name]
    (project / "data.py").write_text((EXAMPLE / "data.py").read_text() + MORE_DATA)
    functions = "".join(
        f"\n\ndef {role}_{width}():\n    return nn.Sequential(*list({role}())[:-1], nn.Linear({inputs}, {width}))\n"
        for role, inputs in (("teacher", 64 * 4 * 4), ("student", 16 * 2 * 2))
    )
    (project / "models.py").write_text((EXAMPLE / "models.py").read_text() + MORE_MODELS + functions)
    teacher = teachers.train(project, f"teacher_{width}", splits, teachers.LOSSES[name])
    modules.save_weights(teacher, project / "wide.safetensors")
    text = recipe(project, losses, "", (f"teacher = teacher_{width}", f"student = student_{width}"))
    start, end = text.index("[teacher.train]"), text.index("[student]")
    text = text[:start] + 'weights = "wide.safetensors"\n' + text[end:].replace("[student]", f"[student]\n{line}")
    text = text.replace("data.py:splits", f"data.py:{splits}").replace("[budget]", f'[evaluate]\nscore = "data.py:{score}"\n[budget]')
    output, code = build(project, monkeypatch, text)
    assert code == 0, output
    best = json.loads((project / "build" / "until-distill" / "curve.json").read_text())["epochs"][-1]
    assert best["validation_loss"] < 0.05 if name == "regression" else best["validation_accuracy"] > 0.6


def test_every_loss_is_among_the_methods():
    shown = " ".join([losses for losses, *_ in METHODS.values()] + [losses for *_, losses in OUTPUTS.values()])
    assert {kind for kind in LOSSES if f'"{kind}"' not in shown} == set()


def test_stored_teacher_logits_train_a_student_and_are_the_reference_without_a_model(project, monkeypatch):
    monkeypatch.chdir(project)
    teacher = recipe(project, '{ kind = "kl" }')
    output, code = build(project, monkeypatch, teacher, until="teach")
    assert code == 0, output
    module = modules.load_module(project, EntryPoint("models.py", "teacher"), project / "build" / "until-teach" / "teacher.safetensors")
    sys.path.insert(0, str(project))
    try:
        from data import splits  # the example's own
    finally:
        sys.path.remove(str(project))
    images = torch.cat([torch.stack([sample[0] for sample in split]) for name, split in splits().items() if name != "calibration"])
    with torch.no_grad():
        save_teacher_logits(project / "logits.safetensors", [images.numpy()], module(images).numpy())
    start, end = teacher.index("[teacher]"), teacher.index("[student]")
    stored = teacher[:start] + '[teacher]\nfile = "logits.safetensors"\n' + teacher[end:]
    output, code = build(project, monkeypatch, stored, until="evaluate")
    assert code == 0, output
    output, code = build(project, monkeypatch, stored.replace("[distill]", "[distill]\nseed = 1"))
    assert code == 0, output
    assert accuracy(project) > 0.6


def test_stored_logits_of_other_samples_are_refused_before_anything_is_trained(project, monkeypatch):
    monkeypatch.chdir(project)
    save_teacher_logits(project / "few.safetensors", [np.zeros((3, 1, 8, 8), np.float32)], np.zeros((3, 10), np.float32))
    text = recipe(project, '{ kind = "kl" }', 'teachers = [{ file = "few.safetensors" }]')
    output, code = build(project, monkeypatch, text)
    assert code == 2
    assert "few.safetensors: has no logits for a sample" in output
    assert not re.search(r"epoch \d+/\d+", output)


def test_a_hint_into_a_mobile_student_gets_a_warning_and_one_into_a_plain_student_does_not(project, monkeypatch):
    monkeypatch.chdir(project)
    hint = '{ kind = "ce" }, { kind = "hint", taps = [{ student = "1", teacher = "1" }] }'
    output, code = build(project, monkeypatch, recipe(project, hint, "", BLOCKS), until="inspect")
    assert code == 0, output
    assert "warning: hint from a plain convolutional teacher into a depthwise (mobile) student did harm" in output
    assert "did harm" not in build(project, monkeypatch, recipe(project, hint, "", ("teacher = deep",)), until="inspect")[0]
    assert "did harm" not in build(project, monkeypatch, recipe(project, '{ kind = "kl" }', "", BLOCKS), until="inspect")[0]


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
            "models.py:three: has other outputs than teacher and student",
        ),
        (
            '{ kind = "kl" }',
            'teachers = [{ model = "models.py:middle", weights = "nan.safetensors" }]',
            "returns outputs that are not finite",
        ),
        ('{ kind = "kl" }', 'teachers = [{ model = "models.py:teacher", weights = "middle.safetensors" }]', "the weights lack"),
    ],
)
def test_mistakes_are_reported_before_the_first_epoch(project, monkeypatch, losses, lines, message):
    monkeypatch.chdir(project)
    (project / "models.py").write_text(
        (EXAMPLE / "models.py").read_text() + MORE_MODELS + "\n\ndef three():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))\n"
    )
    broken = modules.read_weights(project / "middle.safetensors")
    (project / "nan.safetensors").write_bytes(
        modules.serialize_weights({name: value * float("nan") if value.is_floating_point() else value for name, value in broken.items()})
    )
    output, code = build(project, monkeypatch, recipe(project, losses, lines))
    assert code == 2, output
    assert message in output
    assert not re.search(r"epoch \d+/\d+", output)
