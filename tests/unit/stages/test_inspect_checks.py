# SPDX-License-Identifier: Apache-2.0
"""Checks of teacher, student and augmentation: what is stored, and the messages about invalid ones."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from edgekd import usercode
from edgekd.errors import RecipeError
from edgekd.stages.inspect import checks
from edgekd.stages.inspect.params import CheckContext
from edgekd.store.arrays import compact
from tests.unit.stages.toy_params import PARAMS

HEAD = "import torch\nfrom torch import nn\n"
NET = "class Net(nn.Linear):\n    def forward(self, x):\n        return {}\ndef net():\n    return Net(4, 3)\n"


@pytest.fixture
def check(tmp_path):
    """Return a function that writes models.py and makes the context of the checks."""
    (tmp_path / "out").mkdir()
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "validation", "evaluation"):
        np.save(tmp_path / "out" / f"{split}.inputs.0.npy", torch.randn(20, 4, generator=generator).numpy())
        np.save(tmp_path / "out" / f"{split}.labels.npy", np.arange(20) % 3)
    yield lambda code="", **params: _check_context(tmp_path, code, params)
    usercode.forget_modules()


def _check_context(folder, code, params):
    (folder / "models.py").write_text(HEAD + code)
    return CheckContext(replace(PARAMS, **params), folder, folder / "out")


def _refusal(call, *arguments):
    with pytest.raises(RecipeError) as caught:
        call(*arguments)
    return "\n".join(caught.value.problems)


def _student(check, code):
    return checks.check_student(check(code), range(20))


def test_the_size_and_the_logits_of_a_student(check):
    summary, logits = _student(check, NET.format("super().forward(x)"))
    assert summary == {"parameters": 15, "outputs": [3]}
    assert logits.shape == (20, 3)
    assert logits.dtype == np.float32
    assert np.array_equal(logits, _student(check, NET.format("super().forward(x)"))[1])  # fresh weights, the same in each run


def test_a_student_with_dropout_and_batch_norm_passes(check):
    summary, _ = _student(
        check, "def net():\n    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))\n"
    )
    assert summary == {"parameters": 4 * 8 + 8 + 16 + 8 * 3 + 3, "outputs": [3]}


BAD_STUDENTS = {
    "is a number": ("def net():\n    return 3\n", "models.py:net: returned int; it must return a torch.nn.Module"),
    "is a class": (
        "def net():\n    return nn.ReLU\n",
        "models.py:net: returned the class ReLU; it must return a torch.nn.Module: return ReLU(...)",
    ),
    "learns nothing": ("def net():\n    return nn.Identity()\n", "models.py:net: the student has no trainable parameter"),
    "is frozen": (
        "def net():\n    return nn.Linear(4, 3).requires_grad_(False)\n",
        "models.py:net: the student has no trainable parameter",
    ),
    "cuts its gradient": (
        NET.format("super().forward(x).detach()"),
        "models.py:net: the outputs of the student depend on no trainable parameter; nothing would be learned",
    ),
    "returns a pair": (
        NET.format("(super().forward(x), x)"),
        "models.py:net: forward() returned tuple; expected one tensor of logits [2, classes]",
    ),
    "returns a dictionary": (
        NET.format("{'logits': super().forward(x)}"),
        "models.py:net: forward() returned dict; expected one tensor of logits [2, classes]",
    ),
    "returns class ids": (
        NET.format("super().forward(x).argmax(1)"),
        "models.py:net: forward() returned int64 [2] for 2 samples; expected float logits [2, classes]",
    ),
    "returns an image": (
        NET.format("super().forward(x)[:, :, None]"),
        "models.py:net: forward() returned float32 [2, 3, 1] for 2 samples; expected float logits [2, classes]",
    ),
    "returns one row for the batch": (
        NET.format("super().forward(x).mean(0, keepdim=True)"),
        "models.py:net: forward() returned float32 [1, 3] for 2 samples; expected float logits [2, classes]",
    ),
    "mixes samples": (
        NET.format("super().forward(x).softmax(0)"),
        (
            "models.py:net: the student returns different outputs for a sample alone and in a batch of 64; expected the same "
            "(an operation over axis 0, which is the batch?)"
        ),
    ),
    "mixes samples of larger batches": (
        NET.format("super().forward(x)[:, :] + (len(x) > 60)"),
        (
            "models.py:net: the student returns different outputs for a sample alone and in a batch of 64; expected the same "
            "(an operation over axis 0, which is the batch?)"
        ),
    ),
    "is random": (
        NET.format("super().forward(x) + torch.rand(1)"),
        "models.py:net: the student in eval mode returns different outputs for the same input; expected the same (dropout written by hand?)",
    ),
    "draws what is not in its state dict": (
        (
            "class Net(nn.Linear):\n    def __init__(self):\n        super().__init__(4, 3)\n        self.mixing = torch.randn(3, 3)\n"
            "    def forward(self, x):\n        return super().forward(x) @ self.mixing\ndef net():\n    return Net()\n"
        ),
        (
            "models.py:net: the student returns different outputs when it is built again with the same weights; expected the same "
            "(a random tensor outside of the state dict? use register_buffer)"
        ),
    ),
    "returns nan": (
        NET.format("super().forward(x) * float('nan')"),
        "models.py:net: returns outputs that are not finite (NaN or infinite); check the weights and the scale of the inputs",
    ),
    "takes another input": (
        "def net():\n    return nn.Linear(5, 3)\n",
        "models.py: forward() of what net() made raised RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x4 and 5x3)",
    ),
    "takes two inputs": (
        "class Net(nn.Linear):\n    def forward(self, x, y):\n        return x\ndef net():\n    return Net(4, 3)\n",
        "models.py: forward() of what net() made raised TypeError: Net.forward() missing 1 required positional argument: 'y'",
    ),
    "raises": (
        NET.format("[][0]"),
        "models.py:5: forward() of what net() made raised IndexError: list index out of range",
    ),
}


@pytest.mark.parametrize("name", BAD_STUDENTS)
def test_invalid_student(name, check):
    code, message = BAD_STUDENTS[name]
    assert _refusal(_student, check, code) == message


LINEAR = "def net():\n    return nn.Linear(4, 3)\n"


def _teacher(check, code=LINEAR, **changes):
    return checks.check_teacher(check(code), replace(PARAMS.teacher, **changes), "teacher")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_the_weights_of_a_teacher_are_stored_as_safetensors(check, tmp_path, suffix):
    weights = nn.Linear(4, 3).state_dict()
    path = tmp_path / f"teacher.{suffix}"
    if suffix == "pt":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    assert _teacher(check, weights=path.name) == {"parameters": 15, "outputs": [3]}
    stored = load_file(tmp_path / "out" / "teacher.safetensors")
    assert {name: value.tolist() for name, value in stored.items()} == {name: value.tolist() for name, value in weights.items()}


def test_a_teacher_that_is_trained_here_is_not_stored(check, tmp_path):
    assert _teacher(check, trained_here=True) == {"parameters": 15, "outputs": [3]}
    assert not list((tmp_path / "out").glob("teacher.*"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's older ways to write such files
@pytest.mark.parametrize("suffix", ["ts", "pt2", "onnx"])
def test_a_whole_model_is_copied(check, tmp_path, suffix):
    module, path = nn.Linear(4, 3).eval(), tmp_path / f"big.{suffix}"
    shapes = {"input": {0: torch.export.Dim("n", min=1, max=64)}}
    if suffix == "ts":
        torch.jit.trace(module, torch.zeros(2, 4)).save(path)
    elif suffix == "pt2":
        torch.export.save(torch.export.export(module, (torch.zeros(2, 4),), dynamic_shapes=shapes), path)
    else:
        torch.onnx.export(module, (torch.zeros(1, 4),), path, dynamo=False)
    assert _teacher(check, model=None, file=path.name) == {"parameters": None, "outputs": [3]}
    assert (tmp_path / "out" / f"teacher.{suffix}").read_bytes() == path.read_bytes()


def test_weights_that_do_not_fit_are_refused_by_name(check, tmp_path):
    save_file({"weight": torch.zeros(5, 4), "scale": torch.zeros(1)}, tmp_path / "w.safetensors")
    problems = _refusal(lambda: _teacher(check, weights="w.safetensors")).splitlines()
    assert problems == [
        "models.py:net with w.safetensors: the weights lack bias",
        "models.py:net with w.safetensors: the module has no scale",
        "models.py:net with w.safetensors: weight has shape [5, 4]; the module's is [3, 4]",
    ]


def test_weights_that_are_not_finite_are_refusal(check, tmp_path):
    save_file({"weight": torch.full((3, 4), torch.inf), "bias": torch.zeros(3)}, tmp_path / "w.safetensors")
    assert _refusal(lambda: _teacher(check, weights="w.safetensors")).startswith("models.py:net: returns outputs that are not finite")


def test_absent_weights_and_models_are_reported_with_a_suggestion(check, tmp_path):
    (tmp_path / "teacher.safetensors").write_bytes(b"")
    message = _refusal(lambda: _teacher(check, weights="teachr.safetensors"))
    assert message.startswith("teacher.weights: teachr.safetensors: no such file in ")
    assert message.endswith(" (did you mean 'teacher.safetensors'?)")
    assert _refusal(lambda: _teacher(check, file="gone/x.onnx")).startswith("teacher.file: gone/x.onnx: no such file in ")
    assert "teacher.safetensors: is empty; save the weights again" in _refusal(lambda: _teacher(check, weights="teacher.safetensors"))


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
def test_a_payload_in_weights_never_runs(write, name, check, tmp_path):
    ran = tmp_path / "it-ran"
    write(tmp_path / name, Payload(ran))
    assert name in _refusal(lambda: _teacher(check, weights=name))
    assert not ran.exists()
    stored = (tmp_path / name).read_bytes()
    assert b"mkdir" in stored  # the call is in the file,
    assert str(ran).encode() in stored
    function, arguments = Payload(ran).__reduce__()
    function(*arguments)
    assert ran.exists()  # and would have left a folder


@pytest.mark.parametrize("suffix", ["ts", "pt2", "onnx"])
def test_a_payload_in_a_whole_model_never_runs(suffix, check, tmp_path):
    ran = tmp_path / "it-ran"
    _payload_torch(tmp_path / f"m.{suffix}", Payload(ran))
    assert f"m.{suffix}" in _refusal(lambda: _teacher(check, model=None, file=f"m.{suffix}"))
    assert not ran.exists()


TOKENS = "def net():\n    return nn.Sequential(nn.Embedding(50, 3), nn.Flatten(), nn.Linear(12, 3))\n"
INDEX_ERROR = "raised IndexError: index out of range in self"


def _save_tokens(folder, split=None, token=0):
    """Four tokens of each sample, from which its label follows; one of sample 13 of a split is replaced."""
    for name in ("train", "validation", "evaluation"):
        ids = np.arange(80).reshape(20, 4) % 48
        ids[13, 2] = token if name == split else ids[13, 2]
        np.save(folder / "out" / f"{name}.inputs.0.npy", ids)


@pytest.mark.parametrize("split", ["train", "validation", "evaluation"])
@pytest.mark.parametrize("token", [50, -1])
def test_one_token_outside_of_the_vocabulary_of_a_student_is_named(split, token, check, tmp_path):
    _save_tokens(tmp_path)
    assert _student(check, TOKENS)[0]["outputs"] == [3]
    _save_tokens(tmp_path, split, token)
    where = f"(with sample 13 of {split}, where input 'x' holds {token})"
    assert _refusal(checks.check_student, check(TOKENS), [0, 1]) == f"models.py: forward() of what net() made {INDEX_ERROR} {where}"


def test_one_token_outside_of_the_vocabulary_is_seen_in_a_compact_file(check, tmp_path):
    _save_tokens(tmp_path)
    path = tmp_path / "out" / "train.inputs.0.npy"
    ids = np.arange(4 * 40_000).reshape(40_000, 4) % 48
    ids[31_000, 1] = 50
    np.save(path, ids)
    compact(path)
    assert path.stat().st_size < ids.nbytes / 2
    where = "(with sample 31000 of train, where input 'x' holds 50)"
    assert _refusal(checks.check_student, check(TOKENS), [0, 1]) == f"models.py: forward() of what net() made {INDEX_ERROR} {where}"


def test_one_token_outside_of_the_vocabulary_of_a_teacher_is_named(check, tmp_path):
    weights = {"0.weight": torch.eye(3)[torch.arange(50) // 4 % 3], "2.weight": torch.eye(3).repeat(1, 4), "2.bias": torch.zeros(3)}
    save_file(weights, tmp_path / "w.safetensors")
    teacher = replace(PARAMS.teacher, weights="w.safetensors")
    _save_tokens(tmp_path)
    assert checks.check_teacher(check(TOKENS), teacher, "teacher")["outputs"] == [3]
    _save_tokens(tmp_path, "evaluation", 50)
    where = "(with sample 13 of evaluation, where input 'x' holds 50)"
    assert _refusal(checks.check_teacher, check(TOKENS), teacher, "teacher") == f"models.py: net() {INDEX_ERROR} {where}"


BATCH = "models.py:augment: returned {}; expected a batch of the same shapes and types as its input (float32 [2, 4])"
BAD_AUGMENTS = {
    "crops": ("x[:, 1:]", BATCH.format("Tensor of shape [2, 3]")),
    "widens": ("x.double()", BATCH.format("Tensor of shape [2, 4]")),
    "leaves torch": ("x.numpy()", BATCH.format("ndarray of shape [2, 4]")),
    "returns nothing": ("None", BATCH.format("NoneType None")),
    "draws from another generator": (
        "x + torch.rand(1)",
        "models.py:augment: returns different batches for the same batch and seed; draw only from the generator that it gets",
    ),
    "raises": ("x.nothing", "models.py:4: augment() raised AttributeError: 'Tensor' object has no attribute 'nothing'"),
}


def _augment(check, expression):
    checks.check_augmentation(check(f"def augment(x, generator):\n    return {expression}\n"), "models.py:augment")


def test_valid_augmentation(check):
    _augment(check, "x + torch.rand(x.shape, generator=generator)")


@pytest.mark.parametrize("name", BAD_AUGMENTS)
def test_invalid_augmentation(name, check):
    expression, message = BAD_AUGMENTS[name]
    assert _refusal(_augment, check, expression) == message
