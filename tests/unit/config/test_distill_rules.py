# SPDX-License-Identifier: Apache-2.0
"""Rules of [distill] and [teacher]: losses and their options, teachers, taps, epochs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgekd import config
from edgekd.domain.losses import LOSSES, TAPPED, Loss
from edgekd.errors import RecipeError

EXAMPLE = Path(__file__).parents[3] / "examples" / "digits"
TAPS = {"taps": [{"student": "0", "teacher": "1"}]}


def _toml(value):
    """Write a value as TOML; an array of tables as inline tables."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(item)}" for name, item in value.items()) + " }"
    return "[" + ", ".join(map(_toml, value)) + "]" if isinstance(value, list) else json.dumps(value)


def _losses(folder, kind, options):
    """Read the digits' recipe with one loss, written as TOML."""
    shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("build", "__pycache__"))
    recipe = folder / "edgekd.toml"
    written = ", ".join(f"{name} = {_toml(value)}" for name, value in {"kind": kind, **options}.items())
    lines = [f"losses = [{{ {written} }}]" if line.startswith("losses = ") else line for line in recipe.read_text().splitlines()]
    text = "\n".join(lines)
    if kind == "mse_labels":  # has no meaning for classes
        train = text[text.index("[teacher.train]") : text.index("[student]")]
        text = text.replace(train, 'weights = "w.safetensors"\n').replace("[student]", '[student]\ntask = "regression"')
        text += '\n[evaluate]\nscore = "data.py:score"\n'
        (folder / "w.safetensors").write_bytes(b"")
    recipe.write_text(text)
    return config.load_recipe(recipe).distill.losses


@pytest.mark.parametrize("kind", LOSSES)
def test_each_kind_of_loss_takes_its_options_and_no_other(tmp_path, kind):
    options = {name: 0.5 if isinstance(value, float) and not isinstance(value, bool) else value for name, value in LOSSES[kind].items()}
    taps = TAPS if kind in TAPPED else {}
    (loss,) = _losses(tmp_path, kind, {**options, **taps})
    assert (loss.explicit_options, loss.options) == (options, options)
    assert Loss.from_dict(json.loads(json.dumps(loss.to_dict()))).to_dict() == loss.to_dict()
    (plain,) = _losses(tmp_path, kind, taps)
    assert (plain.explicit_options, plain.options) == ({}, LOSSES[kind])
    for name in {"temperature", "standardize", "label_smoothing", "target_weight", "inter_weight"} - options.keys():
        with pytest.raises(RecipeError, match=f"'{kind}' has no {name}; expected one of "):
            _losses(tmp_path, kind, {name: name == "standardize" or 1.0, **taps})


def _recipe(folder, *changes):
    """Read the digits' recipe with lines of ``[distill]`` and ``[teacher]`` put in."""
    shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("build", "__pycache__"))
    recipe = folder / "edgekd.toml"
    text = recipe.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    recipe.write_text(text)
    (folder / "w.safetensors").write_bytes(b"")
    return config.load_recipe(recipe)


LOSSES_LINE = next(line for line in (EXAMPLE / "edgekd.toml").read_text().splitlines() if line.startswith("losses"))
MODEL = 'model = "models.py:teacher"'


def _with(losses):
    return LOSSES_LINE, f"losses = [{losses}]"


def _more(line):
    return LOSSES_LINE, f"{LOSSES_LINE}\n{line}"


def test_all_keys_of_distillation_are_read(tmp_path):
    recipe = _recipe(
        tmp_path,
        _with(
            '{ kind = "ce" }, { kind = "kl", epochs = [2, 30] }, { kind = "kl", teacher = "ema" }, '
            '{ kind = "hint", epochs = [1, 2], taps = [{ student = "0", teacher = "1" }, { student = "2", teacher = "3:1" }] }'
        ),
        (MODEL, MODEL + "\nweight = 2.0"),
        (
            "[distill]",
            '[distill]\nteachers = [{ model = "models.py:teacher", weights = "w.safetensors", weight = 0.5 }]\nteacher_weighting = "confidence"',
        ),
    )
    assert [(loss.kind, loss.epochs, loss.teacher, len(loss.taps)) for loss in recipe.distill.losses] == [
        ("ce", None, "frozen", 0),
        ("kl", (2, 30), "frozen", 0),
        ("kl", None, "ema", 0),
        ("hint", (1, 2), "frozen", 2),
    ]
    assert (recipe.teacher.weight, recipe.distill.teachers[0].weight, recipe.distill.teacher_weighting) == (2.0, 0.5, "confidence")
    assert list(recipe.soft_target_sources) == ["soft_targets", "soft_targets/teacher/0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with('{ kind = "hint" }'), r"losses\[0\].taps: missing; 'hint' matches modules of student and teacher"),
        (_with('{ kind = "kl", taps = [{ student = "0", teacher = "0" }] }'), "'kl' is a loss of logits and has no taps"),
        (_with('{ kind = "kl" }, { kind = "kl", weight = 2.0 }'), r"losses\[1\].kind: 'kl' occurs twice"),
        (_with('{ kind = "ce", teacher = "ema" }'), "'ema', but 'ce' does not use teacher logits"),
        (_with('{ kind = "kl", teacher = "emma" }'), r"'emma' is not a teacher; .*did you mean 'ema'"),
        (_with('{ kind = "kl", teacher = "last_epoch" }'), "none is active in epoch 1; expected at least one in each of"),
        (_with('{ kind = "kl", epochs = [2, 1] }'), r"\[2, 1\]; expected the first and the last epoch in which it is active, from 1 to"),
        (_with('{ kind = "kl", epochs = [1, 9999] }'), r"\[1, 9999\]; expected the first and the last epoch"),
        (_with('{ kind = "kl", epochs = [1, 2] }'), "none is active in epoch 3"),
        (_more('teacher_weighting = "confidence"'), "'confidence', but there is one teacher"),
        (_more('teacher_weighting = "random"'), "'random' is not a teacher weighting"),
        (_more('teachers = [{ model = "models.py:teacher" }]'), r"distill.teachers\[0\]: has model; expected model and weights"),
        (
            _more('teachers = [{ model = "models.py:teacher", train = { epochs = 1 } }]'),
            r"teachers\[0\].train: a further teacher cannot be trained",
        ),
        (
            _more('teachers = [{ model = "models.py:teacher", weights = "w.safetensors", checkpoints = ["w.safetensors"] }]'),
            "only the reference has earlier weights",
        ),
        (_more('teachers = [{ file = "logits.npz" }]'), r"'logits.npz'; expected a file that ends in .onnx, .pt2, .safetensors, .ts"),
        (_more("views = 8"), "distill: has views without augment or mixup: the teacher's logits are computed once for each view"),
        (_more("mixup = 1.0"), "distill: has mixup without views, such as 8"),
        (_more("mixup = 1.0\nviews = 1"), "distill.views: 1 with mixup, and the first view is not mixed; expected at least 2"),
        (_more("mixup = 0.0\nviews = 4"), "distill.mixup: 0 is out of range"),
        (
            _with('{ kind = "dkd" }]\nviews = 4\nmixup = 1.0\nteachers = ['),
            "mixes inputs and class probabilities, and 'dkd' needs one class",
        ),
        (_more("max_minutes = 0"), "distill.max_minutes: 0 is out of range"),
        (
            (LOSSES_LINE, 'losses = [{ kind = "kl", epochs = [1, 30] }]\nmax_minutes = 5'),
            "max_minutes: may end training before",
        ),
        ((MODEL, MODEL + '\ncheckpoints = ["w.safetensors"]'), "need model and weights; a teacher with \\[teacher.train\\] has"),
        (("[teacher.train]", "[teacher.train]\ncheckpoints = 500"), "expected fewer than teacher.train.epochs"),
        (_with('{ kind = "kl", temperature = "auto", epochs = [1, 30] }'), "have epochs, and a value is 'auto'"),
        (
            (LOSSES_LINE, 'losses = [{ kind = "kl", epochs = [1, 30] }]\nassistants = [{ model = "models.py:teacher", epochs = 5 }]'),
            "have other epochs than the student, and losses have epochs; expected 30",
        ),
        (("[student]", "[student]\nheads = [5, 5]"), "top-1 judges one softmax; expected evaluate.score or evaluate.metric"),
        (("[student]", "[student]\nheads = [10]"), "are several softmaxes; expected at least two"),
        (
            ("[student]", '[student]\ntask = "regression"'),
            "'kl' compares classes, and student.task is regression; expected one of mse, mse_labels",
        ),
        (("[student]", '[student]\ntask = "multilabel"'), "trains for classes of one softmax; expected a teacher with weights"),
        (("[student]", '[student]\ntask = "multilabels"'), "'multilabels' is not a task; .*did you mean 'multilabel'"),
    ],
)
def test_contradictions_are_reported(tmp_path, change, message):
    with pytest.raises(RecipeError, match=message):
        _recipe(tmp_path, change)


def test_taps_need_a_module_and_one_teacher(tmp_path):
    taps = _with('{ kind = "hint", taps = [{ student = "0", teacher = "0" }] }')
    with pytest.raises(RecipeError, match="name modules of one teacher"):
        _recipe(tmp_path, (LOSSES_LINE, taps[1] + '\nassistants = [{ model = "models.py:teacher" }]'))
    with pytest.raises(RecipeError, match="name modules of one student"):
        _recipe(tmp_path, (LOSSES_LINE, taps[1] + '\nsizes = ["models.py:teacher"]'))
    lines = (EXAMPLE / "edgekd.toml").read_text().splitlines()
    start = lines.index(MODEL)
    train = "\n".join(lines[start : next(i for i in range(start, len(lines)) if lines[i].startswith("[student"))])
    with pytest.raises(RecipeError, match="need a teacher that is a module"):
        _recipe(tmp_path, taps, (train, 'file = "w.safetensors"\n'))


def test_regression_has_no_baselines_yet(tmp_path):
    text = (EXAMPLE / "edgekd.toml").read_text()
    train = text[text.index("[teacher.train]") : text.index("[student]")]
    changes = (
        (train, 'weights = "w.safetensors"\n'),
        ("[student]", '[student]\ntask = "regression"'),
        ("[budget]", '[evaluate]\nscore = "data.py:score"\n[budget]'),
        _with('{ kind = "mse_labels" }, { kind = "mse" }'),
    )
    assert _recipe(tmp_path / "without", *changes).student.task == "regression"
    with pytest.raises(RecipeError, match="baselines learn classes, and student.task is regression"):
        _recipe(tmp_path / "with", *changes, ("[distill]", "[distill]\nbaselines = { seeds = 2 }"))


def test_teachers_of_other_outputs_are_not_weighted_by_confidence(tmp_path):
    teacher = 'teachers = [{ model = "models.py:teacher", weights = "w.safetensors" }]\nteacher_weighting = "confidence"'
    with pytest.raises(RecipeError, match="'confidence' weighs teachers by the probability of one label per sample.*; expected \"fixed\""):
        _recipe(tmp_path, ("[student]", "[student]\nheads = [5, 5]"), ("[distill]", f"[distill]\n{teacher}"))


AUTO_EPOCHS = ("epochs = 30", 'epochs = "auto"')


def test_epochs_may_be_left_to_the_minutes(tmp_path):
    distill = _recipe(tmp_path, AUTO_EPOCHS, _more("max_minutes = 0.5")).distill
    assert (distill.epochs, distill.max_minutes) == ("auto", 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ((AUTO_EPOCHS,), "distill.epochs: 'auto' without a limit; expected a number, or distill.max_minutes, such as 30"),
        (
            (AUTO_EPOCHS, _more('max_minutes = 5\nassistants = [{ model = "models.py:teacher" }]')),
            "distill.assistants: need epochs of their own where distill.epochs is 'auto'",
        ),
        ((("epochs = 30", 'epochs = "many"'),), "distill.epochs: 'many'; expected an integer or \"auto\""),
        ((("epochs = 10", 'epochs = "auto"'),), "teacher.train.epochs: 'auto'; expected an integer"),
    ],
)
def test_other_epochs_are_refused(tmp_path, changes, message):
    with pytest.raises(RecipeError, match=message):
        _recipe(tmp_path, *changes)


def test_what_cannot_be_mixed_is_refused(tmp_path):
    integers = ('dtype = "float32"', 'dtype = "int64"')
    with pytest.raises(RecipeError, match="distill.mixup: 0.4 mixes inputs and class probabilities, and student.inputs has integers"):
        _recipe(tmp_path, integers, _more("mixup = 0.4\nviews = 9"))
    with pytest.raises(RecipeError, match="and this student has other outputs; expected one softmax"):
        _recipe(tmp_path, ("[student]", '[student]\ntask = "multilabel"'), _more("mixup = 0.4\nviews = 9"))
    with pytest.raises(RecipeError, match="and 'confidence' weighs teachers by one class"):
        _recipe(tmp_path, _more('mixup = 0.4\nviews = 9\nteacher_weighting = "confidence"'))
