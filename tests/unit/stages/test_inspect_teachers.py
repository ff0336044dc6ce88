# SPDX-License-Identifier: Apache-2.0
"""Teachers that are random, mix samples, return no logits or know nothing are refused at inspect; so are modules that cannot be used."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edgekd import usercode
from edgekd.domain.recipe import EntryPoint, TensorSpec
from edgekd.errors import RecipeError
from edgekd.stages.inspect import checks
from edgekd.stages.inspect.params import CheckContext, TeacherParams
from tests.unit.stages import toy_params

HEAD = "import torch\nfrom torch import nn\nfrom torch.nn import functional as F\n"
COUNT = 300
PARAMS = replace(
    toy_params.PARAMS,
    inputs=(TensorSpec("x", (1, 3)),),
    teacher=TeacherParams("models.py:net", "w.safetensors", None, trained_here=False),
)
NET = "class Net(nn.Linear):\n    def forward(self, x):\n        {}\ndef net():\n    return Net(3, 3)\n"
LABELS = np.arange(COUNT) % 3


@pytest.fixture
def check(tmp_path):
    """Return a function that writes models.py and makes the context of the checks; the class of a sample is its largest input."""
    (tmp_path / "out").mkdir()
    inputs = np.random.default_rng(0).standard_normal((COUNT, 3)).astype(np.float32)
    inputs[np.arange(COUNT), LABELS] += 3
    for split in ("train", "validation", "evaluation"):
        np.save(tmp_path / "out" / f"{split}.inputs.0.npy", inputs)
        np.save(tmp_path / "out" / f"{split}.labels.npy", LABELS)
    save_file({"weight": torch.eye(3), "bias": torch.zeros(3)}, tmp_path / "w.safetensors")

    def make(code, **params):
        (tmp_path / "models.py").write_text(HEAD + code)
        return CheckContext(replace(PARAMS, **params), tmp_path, tmp_path / "out")

    yield make
    usercode.forget_modules()


def _check_teacher(context, name="teacher", **changes):
    return checks.check_teacher(context, replace(PARAMS.teacher, **changes), name)


def _refusal(call, *arguments, **options):
    with pytest.raises(RecipeError) as caught:
        call(*arguments, **options)
    (problem,) = caught.value.problems
    assert "\n" not in problem
    return problem


def test_a_fine_teacher_passes_without_a_word(check):
    context = check(NET.format("return super().forward(x)"))
    assert _check_teacher(context) == {"parameters": 12, "outputs": [3]}
    assert context.notes == []


RANDOM = {
    "dropout": "return F.dropout(super().forward(x), 0.3)",
    "rare dropout": "return super().forward(x) * (torch.rand(len(x), 1) > 0.1)",
    "noise": "return super().forward(x) + 0.1 * torch.randn(3)",
    "a counter": "self.calls = getattr(self, 'calls', 0) + 1\n        return super().forward(x) * self.calls",
    "a running mean": "self.mean = 0.9 * getattr(self, 'mean', 0) + 0.1 * x.mean()\n        return super().forward(x - self.mean)",
}


@pytest.mark.parametrize("name", RANDOM)
def test_a_teacher_that_is_no_function_of_its_input_is_refused(check, name):
    assert "returns different outputs for the same input; expected the same (dropout without training=self.training" in _refusal(
        _check_teacher, check(NET.format(RANDOM[name]))
    )


@pytest.mark.parametrize(
    "body", ["return F.batch_norm(super().forward(x), None, None, training=True)", "return super().forward(x - x.mean(0))"]
)
@pytest.mark.filterwarnings("ignore")
def test_a_teacher_that_mixes_the_samples_of_a_batch_is_refused(check, body):
    problem = _refusal(_check_teacher, check(NET.format(body)))
    assert "different outputs for a sample alone and in a batch of 8" in problem or "Expected more than 1 value per channel" in problem


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_sample_without_a_finite_output_is_named(check, value):
    inputs = np.load(check("").out / "validation.inputs.0.npy")
    last = int(inputs[:, 0].argmax())
    code = NET.format(f"return super().forward(x).masked_fill(x[:, :1] >= {inputs[last, 0] - 1e-4}, float('{value}'))")
    problem = _refusal(_check_teacher, check(code))
    assert "not finite (NaN or infinite) for 1 of " in problem
    assert f"the first is validation[{last}];" in problem


@pytest.mark.parametrize("body", ["return super().forward(x).softmax(1)", "return F.one_hot(super().forward(x).argmax(1), 3).float()"])
def test_probabilities_are_refused(check, body):
    assert "returns probabilities (rows that sum to 1), not logits" in _refusal(_check_teacher, check(NET.format(body)))


def test_log_probabilities_give_a_warning(check):
    context = check(NET.format("return super().forward(x).log_softmax(1)"))
    _check_teacher(context)
    (note,) = context.notes
    assert note.startswith("warning: the teacher models.py:net returns log-probabilities")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return super().forward(x).roll(1, 1)", "would be right on 97.7%; return logits[:, [1, 2, 0]]"),  # another order of classes
        ("return super().forward(x.roll(1, 1))", "would be right on 97.7%; return logits[:, [1, 2, 0]]"),  # or of inputs: the same here
        ("return super().forward(x * 1e-9) + torch.tensor([0, 2, 0])", "is no better than the commonest class"),  # wrong preprocessing
        ("return super().forward(x * 1e6).sin()", "is no better than the commonest class"),
    ],
)
def test_a_worthless_teacher_is_refused(check, body, message):
    assert message in _refusal(_check_teacher, check(NET.format(body)))


@pytest.mark.parametrize(("name", "params"), [("checkpoint.0", {}), ("teacher", {"score": "metrics.py:score"})])
def test_earlier_weights_and_teachers_of_other_labels_are_not_refused(check, name, params):
    context = check(NET.format("return super().forward(x).roll(1, 1)"), **params)
    assert _check_teacher(context, name) == {"parameters": 12, "outputs": [3]}


def test_a_network_that_is_trained_here_returns_logits(check):
    context = check(NET.format("return super().forward(x).softmax(1)"))
    assert "models.py:net: the teacher returns probabilities" in _refusal(_check_teacher, context, weights=None, trained_here=True)
    checks.check_student(context, range(COUNT))
    (note,) = context.notes
    assert note.startswith("warning: the student models.py:net returns probabilities")


def test_a_teacher_that_is_trained_here_is_checked_as_a_student_is(check):
    context = check(NET.format("return F.dropout(super().forward(x), 0.5)"))
    assert "the teacher in eval mode returns different outputs for the same input" in _refusal(
        _check_teacher, context, weights=None, trained_here=True
    )


BAD_MODULES = {
    "none": ("def net():\n    pass\n", "returned NoneType; it must return a torch.nn.Module"),
    "a class": ("class Net(nn.Linear):\n    pass\ndef net():\n    return Net\n", "returned the class Net"),
    "a pair": ("def net():\n    return nn.Linear(3, 3), 1\n", "returned tuple; it must return a torch.nn.Module"),
    "lazy": ("def net():\n    return nn.Sequential(nn.LazyLinear(3))\n", "0.weight, 0.bias is lazy, without a shape"),
    "scripted": ("def net():\n    return torch.jit.script(nn.Linear(3, 3))\n", "returned a TorchScript module, which cannot be exported"),
    "scripted inside": ("def net():\n    return nn.Sequential(torch.jit.script(nn.Linear(3, 3)))\n", "returned a TorchScript module"),
    "meta": ("def net():\n    return nn.Linear(3, 3, device='meta')\n", "weight is on the meta device, without values"),
    "complex": ("def net():\n    return nn.Linear(3, 3, dtype=torch.complex64)\n", "weight is complex64; expected real numbers"),
    "quantized": (
        "def net():\n    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 3)))\n",
        "returned a quantized module",
    ),
    "extra state": (
        "class Net(nn.Linear):\n    def get_extra_state(self):\n        return {'a': 1}\ndef net():\n    return Net(3, 3)\n",
        "the module's state holds _extra_state, which is not a tensor",
    ),
    "a state that raises": (
        "class Net(nn.Linear):\n    def get_extra_state(self):\n        return 1 / 0\ndef net():\n    return Net(3, 3)\n",
        "state_dict() of what net() made raised ZeroDivisionError",
    ),
    "attributes that raise": (
        (
            "class Net(nn.Linear):\n    def __getattr__(self, name):\n        return 1 / 0 if name == '_orig_mod' else super().__getattr__(name)\n"
            "def net():\n    return Net(3, 3)\n"
        ),
        "an attribute of what net() made raised ZeroDivisionError",
    ),
    "double": (
        "def net():\n    return nn.Linear(3, 3).double()\n",
        "weight of the student is float64; expected float32: return model.float()",
    ),
    "half": ("def net():\n    return nn.Linear(3, 3).half()\n", "weight of the student is float16; expected float32: return model.float()"),
    "shared": ("MODEL = nn.Linear(3, 3)\ndef net():\n    return MODEL\n", "returns a module with the same parameters in each call"),
    "without parameters": ("def net():\n    return nn.ReLU()\n", "the student has no trainable parameter"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BAD_MODULES)
def test_a_module_that_cannot_be_used_is_refused(check, name):
    code, message = BAD_MODULES[name]
    assert message in _refusal(checks.check_student, check(code), range(COUNT))


WRAPPED = {
    "compiled": "return torch.compile(nn.Linear(3, 3))",
    "compiled in place": "m = nn.Linear(3, 3); m.compile(); return m",
    "parallel": "return nn.DataParallel(nn.Linear(3, 3))",
    "compiled inside": "return nn.Sequential(torch.compile(nn.Linear(3, 3)), nn.Identity())",
    "compiled twice": "return torch.compile(nn.DataParallel(torch.compile(nn.Linear(3, 3))))",
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_modules_are_unwrapped(check, name):
    from edgekd.kd import modules

    context = check(f"def net():\n    {WRAPPED[name]}\n")
    module = modules.build_module(context.recipe_dir, EntryPoint("models.py", "net"))
    assert set(module.state_dict()) == ({"0.weight", "0.bias"} if name == "compiled inside" else {"weight", "bias"})
    assert all(type(part).__module__.startswith("torch.nn.modules") for part in module.modules())
    assert module._compiled_call_impl is None
