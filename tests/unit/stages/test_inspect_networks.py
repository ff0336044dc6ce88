# SPDX-License-Identifier: Apache-2.0
"""Teacher, student, metric and augmentation on a few samples: what is kept, and what is said of wrong ones."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from edgekd import usercode
from edgekd.errors import RecipeError
from edgekd.stages.inspect import networks

HEAD = "import torch\nfrom torch import nn\n"
NET = "class Net(nn.Linear):\n    def forward(self, x):\n        return {}\ndef net():\n    return Net(4, 3)\n"


@pytest.fixture
def bench(tmp_path):
    (tmp_path / "out").mkdir()
    made = torch.Generator().manual_seed(0)
    for split in ("train", "evaluation"):
        np.save(tmp_path / "out" / f"{split}.inputs.0.npy", torch.randn(20, 4, generator=made).numpy())
    np.save(tmp_path / "out" / "evaluation.labels.npy", np.arange(20) % 3)
    yield lambda code="", **params: _bench(tmp_path, code, params)
    usercode.forget_modules()


def _bench(folder, code, params):
    (folder / "models.py").write_text(HEAD + code)
    names = dict.fromkeys(("teacher", "weights", "file", "student", "metric", "score", "augment"))
    inputs = [{"name": "x", "shape": [1, 4], "dtype": "float32"}]
    return networks.Bench({**names, "taught": False, "inputs": inputs, **params}, folder, folder / "out")


def _refused(call, *arguments):
    with pytest.raises(RecipeError) as caught:
        call(*arguments)
    return "\n".join(caught.value.problems)


def _student(bench, code):
    return networks.student(bench(code, student="models.py:net"), range(20))


def test_a_student_is_measured_and_answers(bench):
    found, answers = _student(bench, NET.format("super().forward(x)"))
    assert found == {"parameters": 15, "outputs": [3]}
    assert answers.shape == (20, 3)
    assert answers.dtype == np.float32
    assert np.array_equal(answers, _student(bench, NET.format("super().forward(x)"))[1])  # fresh weights, the same in each run


def test_a_student_with_dropout_and_normalisation_is_right(bench):
    found, _ = _student(bench, "def net():\n    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))\n")
    assert found == {"parameters": 4 * 8 + 8 + 16 + 8 * 3 + 3, "outputs": [3]}


BAD_STUDENTS = {
    "is a number": ("def net():\n    return 3\n", "models.py:net: returned int; it must return a torch.nn.Module"),
    "is a class": ("def net():\n    return nn.ReLU\n", "models.py:net: returned type; it must return a torch.nn.Module"),
    "learns nothing": ("def net():\n    return nn.Identity()\n", "models.py:net: the student has no parameter that can be trained"),
    "is frozen": (
        "def net():\n    return nn.Linear(4, 3).requires_grad_(False)\n",
        "models.py:net: the student has no parameter that can be trained",
    ),
    "cuts its gradient": (
        NET.format("super().forward(x).detach()"),
        "models.py:net: the answers of the student depend on no parameter that can be trained; nothing would be learned",
    ),
    "answers with a pair": (
        NET.format("(super().forward(x), x)"),
        "models.py:net: forward() returned tuple; expected one tensor of logits [2, classes]",
    ),
    "answers with a dictionary": (
        NET.format("{'logits': super().forward(x)}"),
        "models.py:net: forward() returned dict; expected one tensor of logits [2, classes]",
    ),
    "answers with class ids": (
        NET.format("super().forward(x).argmax(1)"),
        "models.py:net: answered 2 samples with int64 [2]; expected float logits [2, classes]",
    ),
    "answers with an image": (
        NET.format("super().forward(x)[:, :, None]"),
        "models.py:net: answered 2 samples with float32 [2, 3, 1]; expected float logits [2, classes]",
    ),
    "answers one for the batch": (
        NET.format("super().forward(x).mean(0, keepdim=True)"),
        "models.py:net: answered 2 samples with float32 [1, 3]; expected float logits [2, classes]",
    ),
    "mixes samples": (
        NET.format("super().forward(x).softmax(0)"),
        (
            "models.py:net: the student answers a sample differently alone and in a batch of two; expected the same "
            "(an operation over axis 0, which is the batch?)"
        ),
    ),
    "is random": (
        NET.format("super().forward(x) + torch.rand(1)"),
        "models.py:net: the student in eval mode gives two answers to one input; expected the same (dropout by hand?)",
    ),
    "gives nan": (
        NET.format("super().forward(x) * float('nan')"),
        "models.py:net: gives outputs that are not finite (NaN or infinite); check the weights and the scale of the inputs",
    ),
    "wants another input": (
        "def net():\n    return nn.Linear(5, 3)\n",
        "models.py: forward() of what net() made raised RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x4 and 5x3)",
    ),
    "wants two inputs": (
        "class Net(nn.Linear):\n    def forward(self, x, y):\n        return x\ndef net():\n    return Net(4, 3)\n",
        "models.py: forward() of what net() made raised TypeError: Net.forward() missing 1 required positional argument: 'y'",
    ),
    "raises": (
        NET.format("[][0]"),
        "models.py:5: forward() of what net() made raised IndexError: list index out of range",
    ),
}


@pytest.mark.parametrize("name", BAD_STUDENTS)
def test_a_student_that(name, bench):
    code, message = BAD_STUDENTS[name]
    assert _refused(_student, bench, code) == message


LINEAR = "def net():\n    return nn.Linear(4, 3)\n"


def _teacher(bench, code=LINEAR, **params):
    made = bench(code, **{"teacher": "models.py:net", **params})
    return networks.teacher(made, made.params)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_given_teacher_is_kept_as_safetensors(bench, tmp_path, suffix):
    weights = nn.Linear(4, 3).state_dict()
    path = tmp_path / f"teacher.{suffix}"
    if suffix == "pt":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    assert _teacher(bench, weights=path.name) == {"parameters": 15, "outputs": [3]}
    kept = load_file(tmp_path / "out" / "teacher.safetensors")
    assert {name: value.tolist() for name, value in kept.items()} == {name: value.tolist() for name, value in weights.items()}


def test_a_teacher_that_is_taught_leaves_no_file(bench, tmp_path):
    assert _teacher(bench, taught=True) == {"parameters": 15, "outputs": [3]}
    assert not list((tmp_path / "out").glob("teacher.*"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's older ways to write such files
@pytest.mark.parametrize("suffix", ["ts", "pt2", "onnx"])
def test_a_whole_model_is_kept_as_it_is(bench, tmp_path, suffix):
    module, path = nn.Linear(4, 3).eval(), tmp_path / f"big.{suffix}"
    batch = {"x": {0: torch.export.Dim("n", min=1, max=64)}} if suffix == "pt2" else None
    if suffix == "ts":
        torch.jit.trace(module, torch.zeros(2, 4)).save(path)
    elif suffix == "pt2":
        torch.export.save(torch.export.export(module, (torch.zeros(2, 4),), dynamic_shapes={"input": batch["x"]}), path)
    else:
        torch.onnx.export(module, (torch.zeros(1, 4),), path, dynamo=False)
    assert _teacher(bench, teacher=None, file=path.name) == {"parameters": None, "outputs": [3]}
    assert (tmp_path / "out" / f"teacher.{suffix}").read_bytes() == path.read_bytes()


def test_weights_that_do_not_fit_are_refused_by_name(bench, tmp_path):
    save_file({"weight": torch.zeros(5, 4), "scale": torch.zeros(1)}, tmp_path / "w.safetensors")
    told = _refused(lambda: _teacher(bench, weights="w.safetensors")).splitlines()
    assert told == [
        "models.py:net with w.safetensors: the weights lack bias",
        "models.py:net with w.safetensors: the module has no scale",
        "models.py:net with w.safetensors: weight has shape [5, 4]; the module's is [3, 4]",
    ]


def test_weights_that_are_not_finite_are_refused(bench, tmp_path):
    save_file({"weight": torch.full((3, 4), torch.inf), "bias": torch.zeros(3)}, tmp_path / "w.safetensors")
    assert _refused(lambda: _teacher(bench, weights="w.safetensors")).startswith("models.py:net: gives outputs that are not finite")


def test_weights_and_models_that_are_not_there_are_told_with_a_guess(bench, tmp_path):
    (tmp_path / "teacher.safetensors").write_bytes(b"")
    told = _refused(lambda: _teacher(bench, weights="teachr.safetensors"))
    assert told.startswith("teacher.weights: teachr.safetensors: no such file in ")
    assert told.endswith(" (did you mean 'teacher.safetensors'?)")
    assert _refused(lambda: _teacher(bench, file="gone/x.onnx")).startswith("teacher.file: gone/x.onnx: no such file in ")
    assert "teacher.safetensors: is not a safetensors file" in _refused(lambda: _teacher(bench, weights="teacher.safetensors"))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def _payload_torch(path, payload):
    torch.save({"weight": payload, "bias": torch.zeros(3)}, path)


def _payload_pickle(path, payload):
    path.write_bytes(pickle.dumps({"weight": payload}))


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.safetensors"])
@pytest.mark.parametrize("write", [_payload_torch, _payload_pickle])
def test_a_payload_in_weights_never_runs(write, name, bench, tmp_path):
    ran = tmp_path / "it-ran"
    write(tmp_path / name, Payload(ran))
    assert name in _refused(lambda: _teacher(bench, weights=name))
    assert not ran.exists()
    stored = (tmp_path / name).read_bytes()
    assert b"mkdir" in stored  # the call lies in the file,
    assert str(ran).encode() in stored
    function, arguments = Payload(ran).__reduce__()
    function(*arguments)
    assert ran.exists()  # and would have been seen


@pytest.mark.parametrize("suffix", ["ts", "pt2", "onnx"])
def test_a_payload_in_a_whole_model_never_runs(suffix, bench, tmp_path):
    ran = tmp_path / "it-ran"
    _payload_torch(tmp_path / f"m.{suffix}", Payload(ran))
    assert f"m.{suffix}" in _refused(lambda: _teacher(bench, teacher=None, file=f"m.{suffix}"))
    assert not ran.exists()


OUTPUTS, LABELS = np.eye(3, dtype=np.float32)[np.arange(9) % 3], np.arange(9) % 3
SCORES = "models.py:score: returned {} for 9 samples; expected 9 scores from 0 to 1"
WHOLE = "models.py:metric: returned {}; expected one finite number for the whole set, 1 at most (0.93, not 93)"
RIGHT_SCORES = ["(outputs.argmax(1) == labels)", "(outputs.argmax(1) == labels).astype(float)", "[0.5] * len(labels)", "torch.ones(9)"]
RIGHT_METRICS = ["0.5", "1", "outputs.max()", "torch.tensor(0.25)", "float((outputs.argmax(1) == labels).mean())", "-0.2"]
BAD_SCORES = {
    "one": ("0.5", SCORES.format("float 0.5")),
    "none": ("None", SCORES.format("NoneType None")),
    "too few": ("labels[1:] * 0", SCORES.format("ndarray of shape [8]")),
    "a column": ("labels[:, None] * 0", SCORES.format("ndarray of shape [9, 1]")),
    "percent": ("labels * 100", SCORES.format("ndarray of shape [9]")),
    "negative": ("labels - 1.0", SCORES.format("ndarray of shape [9]")),
    "nan": ("labels * float('nan')", SCORES.format("ndarray of shape [9]")),
    "text": ("['a'] * 9", SCORES.format("list ['a', 'a', 'a', 'a', 'a', 'a', 'a', 'a',")),
    "raised": ("1 / 0", "models.py:4: score() raised ZeroDivisionError: division by zero"),
    "ragged": ("[[1], [1, 2]]", None),
}
BAD_METRICS = {
    "an array": ("labels", WHOLE.format("ndarray of shape [9]")),
    "none": ("None", WHOLE.format("NoneType None")),
    "percent": ("93.0", WHOLE.format("float 93.0")),
    "nan": ("float('nan')", WHOLE.format("float nan")),
    "text": ("'0.9'", WHOLE.format("str 0.9")),
    "raised": ("1 / 0", "models.py:4: metric() raised ZeroDivisionError: division by zero"),
}


def _metric(bench, kind, expression):
    networks.metric(bench(f"def {kind}(outputs, labels):\n    return {expression}\n", **{kind: f"models.py:{kind}"}), OUTPUTS, LABELS)


@pytest.mark.parametrize("expression", RIGHT_SCORES)
def test_a_right_score(expression, bench):
    _metric(bench, "score", expression)


@pytest.mark.parametrize("expression", RIGHT_METRICS)
def test_a_right_metric(expression, bench):
    _metric(bench, "metric", expression)


@pytest.mark.parametrize("name", BAD_SCORES)
def test_a_score_that_is(name, bench):
    expression, message = BAD_SCORES[name]
    told = _refused(_metric, bench, "score", expression)
    assert told == message or (message is None and "what score returned raised ValueError" in told)


@pytest.mark.parametrize("name", BAD_METRICS)
def test_a_metric_that_is(name, bench):
    expression, message = BAD_METRICS[name]
    assert _refused(_metric, bench, "metric", expression) == message


def test_a_metric_is_tried_on_samples_of_each_class():
    labels = np.repeat(np.arange(5), [1000, 1, 2, 500, 30])
    rows = networks.scored_rows(labels)
    assert np.bincount(labels[rows]).tolist() == [12, 1, 2, 12, 12]
    assert networks.scored_rows(np.arange(200)) == list(range(200))
    assert networks.scored_rows(np.zeros((100, 2))) == list(range(64))


BATCH = "models.py:augment: returned {}; expected a batch of the same shapes and types as it was given (float32 [2, 4])"
BAD_AUGMENTS = {
    "crops": ("x[:, 1:]", BATCH.format("Tensor of shape [2, 3]")),
    "widens": ("x.double()", BATCH.format("Tensor of shape [2, 4]")),
    "leaves torch": ("x.numpy()", BATCH.format("ndarray of shape [2, 4]")),
    "returns nothing": ("None", BATCH.format("NoneType None")),
    "draws elsewhere": (
        "x + torch.rand(1)",
        "models.py:augment: gives two answers to one batch and one seed; draw only from the generator that it is given",
    ),
    "raises": ("x.nothing", "models.py:4: augment() raised AttributeError: 'Tensor' object has no attribute 'nothing'"),
}


def _augment(bench, expression):
    networks.augment(bench(f"def augment(x, generator):\n    return {expression}\n", augment="models.py:augment"), "augment")


def test_a_right_augmentation(bench):
    _augment(bench, "x + torch.rand(x.shape, generator=generator)")


@pytest.mark.parametrize("name", BAD_AUGMENTS)
def test_an_augmentation_that(name, bench):
    expression, message = BAD_AUGMENTS[name]
    assert _refused(_augment, bench, expression) == message
