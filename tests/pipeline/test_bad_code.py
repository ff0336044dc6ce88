# SPDX-License-Identifier: Apache-2.0
"""Invalid data and user code: one clear message before any long work, and no payload runs."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest

from edgekd import config
from edgekd.errors import RecipeError
from edgekd.ports import Context
from edgekd.stages import inspect
from tests.processes import run_step
from tests.toy import DATA, MODELS, RECIPE

RETURN = "    return splits\n"
TEACHER, STUDENT = "def teacher():\n    return nn.Linear(4, 3)\n", "def student():\n    return nn.Linear(4, 3)\n"


class Payload:
    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def _inspect(folder, data=DATA, models=MODELS, recipe=RECIPE):
    (folder / "data.py").write_text(data)
    (folder / "models.py").write_text(models)
    (folder / "edgekd.toml").write_text(recipe)
    for name in ("out", "work"):
        (folder / name).mkdir()
    step = inspect.steps(config.load_recipe(folder / "edgekd.toml"), [])[0]
    return run_step(step, Context(folder, folder / "out", folder / "work", lambda share, text: None))


def test_the_valid_recipe_passes_and_its_reads_are_recorded(tmp_path):
    data = DATA.replace("import torch\n", "import os, torch, shared\n").replace(
        RETURN, "    open(os.environ['TOY_FILE']).read()\n" + RETURN
    )
    (tmp_path / "shared.py").write_text("")
    (tmp_path / "undeclared.txt").write_text("x")
    os.environ["TOY_FILE"] = "undeclared.txt"
    try:
        result = _inspect(tmp_path, data)
    finally:
        del os.environ["TOY_FILE"]
    assert set(result.record.files) == {"data.py", "models.py", "shared.py", "undeclared.txt"}
    assert set(result.record.env) == {"TOY_FILE"}
    assert result.metrics["classes"] == 3
    assert result.metrics["splits"]["evaluation"]["samples"] == 20


DATA_CASES = {
    "raises": ("    generator", "    raise ValueError('no disk')\n    generator", r"data\.py:4: splits\(\) raised ValueError: no disk"),
    "exits": ("    generator", "    raise SystemExit(0)\n    generator", "tried to end the process"),
    "ends at once": ("    generator", "    import os; os._exit(7)\n    generator", r"data\.py:splits: the process ended with exit code 7"),
    "is killed": ("    generator", "    import os; os.kill(os.getpid(), 9)\n    generator", "ended by signal SIGKILL"),
    "does not parse": ("def splits():", "def splits(:", r"data\.py:3: is not valid Python"),
    "imports a module that is absent": ("import torch\n", "import torch, no_such_module\n", "no_such_module"),
    "has no such function": ("def splits", "def split", r"splits.*did you mean 'split'"),
    "returns nothing": (RETURN, "", "returned NoneType; expected a mapping"),
    "lacks a split": (RETURN, "    del splits['calibration']\n" + RETURN, "lacks the split 'calibration'"),
    "has an unknown split": (RETURN, "    splits['test'] = train\n" + RETURN, "'test' is not a split"),
    "has an empty split": (RETURN, "    splits['validation'] = Subset(train, [])\n" + RETURN, "split 'validation' is empty"),
    "has a split that is not a data set": (RETURN, "    splits['train'] = iter(train)\n" + RETURN, "expected a map-style torch data set"),
    "evaluates on what it trained on": (
        RETURN,
        "    splits['evaluation'] = train\n" + RETURN,
        "splits train and evaluation overlap: 30 of 30",
    ),
    "validates on what it evaluates": (
        RETURN,
        "    splits['validation'] = splits['evaluation']\n" + RETURN,
        "validation and evaluation overlap: 20",
    ),
    "calibrates on what it evaluates": (
        RETURN,
        "    splits['calibration'] = Subset(splits['evaluation'], range(3))\n" + RETURN,
        "calibration and evaluation overlap|3 of 3 samples are not in train",
    ),
    "labels are nan": ("torch.arange(60) % 3", "torch.full((60,), float('nan'))", "label 0 is not finite"),
    "labels are floats": ("torch.arange(60) % 3", "torch.rand(60)", "labels are float32; expected one whole number per sample"),
    "labels are negative": ("torch.arange(60) % 3", "torch.arange(60) % 3 - 1", "class ids from 0 upwards"),
    "labels are vectors": ("torch.arange(60) % 3", "torch.zeros(60, 2).long()", r"labels are int64 of shape \[2\]"),
    "labels exceed the classes": (
        "torch.arange(60) % 3",
        "torch.arange(60) % 5",
        "has the label 4, but teacher and student have 3 classes",
    ),
    "inputs are nan": ("    train =", "    x[7] = float('nan')\n    train =", "train: sample 7 has an input that is not finite"),
    "inputs have another shape": ("torch.randn(60, 4,", "torch.randn(60, 5,", r"input 'x' has shape \[5\]; expected \[4\]"),
    "inputs have another type": ("    train =", "    x = x.double()\n    train =", "input 'x' is float64; expected float32"),
    "items are not pairs": ("TensorDataset(x[:30], y[:30])", "TensorDataset(x[:30])", r"expected a pair \(input, label\)"),
    "items are random": (
        RETURN,
        "    class R(torch.utils.data.Dataset):\n        def __len__(self): return 5\n        def __getitem__(self, i): return torch.rand(4), 0\n"
        "    splits['train'] = R()\n" + RETURN,
        "differs when it is read twice|not in train",
    ),
    "an item raises": (
        RETURN,
        "    class R(torch.utils.data.Dataset):\n        def __len__(self): return 5\n        def __getitem__(self, i): return {}[i]\n"
        "    splits['train'] = R()\n" + RETURN,
        "reading sample 0.*KeyError",
    ),
}
MODEL_CASES = {
    "student returns a sparse tensor": (
        STUDENT,
        "class S(nn.Linear):\n    def forward(self, x): return super().forward(x).to_sparse()\ndef student():\n    return S(4, 3)\n",
        "models.py:student: what it returns cannot be used: TypeError: can't convert Sparse",
    ),
    "student returns a nested tensor": (
        STUDENT,
        "class S(nn.Linear):\n    def forward(self, x): return torch.nested.nested_tensor([x[0]])\ndef student():\n    return S(4, 3)\n",
        "models.py:student: what it returns cannot be used: RuntimeError: ",
    ),
    "student has no outputs": (STUDENT, "def student():\n    return nn.Linear(4, 0)\n", "models.py:student"),
    "teacher returns no module": (TEACHER, "def teacher():\n    return 3\n", "returned int; .*torch.nn.Module"),
    "student raises": (STUDENT, "def student():\n    raise KeyError('width')\n", r"student\(\) raised KeyError"),
    "student takes another input": (STUDENT, "def student():\n    return nn.Linear(5, 3)\n", "raised RuntimeError"),
    "student has other classes": (STUDENT, "def student():\n    return nn.Linear(4, 2)\n", "the teacher has 3 classes, the student 2"),
    "student has nothing to train": (STUDENT, "def student():\n    return nn.Identity()\n", "no trainable parameter"),
    "student is random": (
        STUDENT,
        "class S(nn.Linear):\n    def forward(self, x): return super().forward(x) + torch.rand(1)\ndef student():\n    return S(4, 3)\n",
        "returns different outputs for the same input",
    ),
    "student returns a pair": (
        STUDENT,
        "class S(nn.Linear):\n    def forward(self, x): return super().forward(x), 1\ndef student():\n    return S(4, 3)\n",
        "returned tuple; expected one tensor",
    ),
    "student returns nan": (
        STUDENT,
        "class S(nn.Linear):\n    def forward(self, x): return super().forward(x) * float('nan')\ndef student():\n    return S(4, 3)\n",
        "not finite",
    ),
}
RAISES = "    {}\n    generator"
BAD_TEXT = """class E(Exception):
    def __str__(self): raise ValueError('no text')
    __repr__ = __str__
"""
HOOK = """def student():
    module = nn.Linear(4, 3)
    def hook(*_): raise KeyError('from a hook')
    module.register_forward_hook(hook)
    return module
"""
OVERRIDES = ("state_dict", "train", "named_parameters", "_apply")
DATA_CASES |= {
    "raises KeyboardInterrupt": (
        "    generator",
        RAISES.format("raise KeyboardInterrupt"),
        r"data\.py:4: splits\(\) raised KeyboardInterrupt$",
    ),
    "raises an exception without a text": (
        "def splits():",
        f"{BAD_TEXT}def splits():\n    raise E",
        r"data\.py:7: splits\(\) raised E: \(its text cannot be read",
    ),
    "raises an exception with escapes": (
        "    generator",
        RAISES.format("raise ValueError('\\x1b[31m' + 'x' * 10**6)"),
        r"ValueError: \\x1b\[31mx{400,500}\.\.\. \(1,000,005 characters\)$",
    ),
    "recurses": ("    generator", RAISES.format("(f := lambda: f())()"), r"data\.py:4: splits\(\) raised RecursionError"),
    "aborts": ("    generator", RAISES.format("import os; os.abort()"), r"was ended by signal SIGABRT at data\.py:4 while this ran"),
    "wants too much memory": ("    generator", RAISES.format("bytearray(2**50)"), r"data\.py:4: splits\(\) raised MemoryError"),
    "raises KeyboardInterrupt on import": (
        "import torch\n",
        "import torch\nraise KeyboardInterrupt\n",
        r"data\.py:2: importing it raised KeyboardInterrupt",
    ),
    "reads arguments": (
        "    generator",
        RAISES.format("import argparse; argparse.ArgumentParser().parse_args(['--x'])"),
        "tried to end the process",
    ),
}
MODEL_CASES |= {
    "student raises in a hook": (STUDENT, HOOK, r"models\.py:.*raised KeyError: 'from a hook'"),
    **{
        f"student raises in {name}": (
            STUDENT,
            f"class S(nn.Linear):\n    def {name}(self, *_, **__): raise KeyboardInterrupt\ndef student():\n    return S(4, 3)\n",
            r"models\.py:\d+: .* raised KeyboardInterrupt",
        )
        for name in OVERRIDES
    },
}
HARMLESS = {
    "a thread that does not end": "import threading, time; threading.Thread(target=time.sleep, args=(1e5,)).start()",
    "an exit handler that waits": "import atexit, time; atexit.register(time.sleep, 1e5)",
    "a process that does not end": "import subprocess; subprocess.Popen(['sleep', '100000'])",
    "no streams": "import sys; sys.stdout = sys.stderr = None",
    "closed streams": "import os, sys; sys.stdout.close(); os.close(1); os.close(2)",
    "another folder": "import os; os.chdir('/')",
    "an empty environment": "import os; os.environ.clear()",
    "other handlers of signals": "import signal; [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)]",
    "warnings as errors": "import warnings; warnings.simplefilter('error')",
    "floating point errors": "import numpy; numpy.seterr(all='raise')",
    "logs on standard output": "import logging, sys; logging.basicConfig(stream=sys.stdout, level=0)",
    "no gradients": "import torch; torch.set_grad_enabled(False)",
    "a low limit of recursion": "import sys; sys.setrecursionlimit(90)",
    "no argument": "import argparse; argparse.ArgumentParser().parse_args()",
}


@pytest.mark.parametrize("name", HARMLESS)
def test_inspect_goes_on_after_code_that_leaves(name, tmp_path, capfd):
    models = f"def change():\n    {HARMLESS[name]}\n{MODELS}".replace("():\n    return", "():\n    change()\n    return")
    assert models.count("change()") == 3
    result = _inspect(tmp_path, models=models)
    assert result.metrics["classes"] == 3
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("change", ["torch.set_default_dtype(torch.float64)", "torch.set_default_device('meta')"])
def test_settings_on_import_do_not_outlast_it(change, tmp_path):
    result = _inspect(tmp_path, models=MODELS + change)
    notes = [note for note in result.notes if "restores" in note]
    assert [note.partition(": changes torch's default d")[0] for note in notes] == ["models.py:student", "models.py:teacher"]


def test_a_process_that_ends_while_it_trains_is_a_failed_stage(tmp_path):
    """Exit code 0 of the user's code must not become that of the build, and what it prints must not reach standard output.

    The build's own process imports no library of the steps meanwhile.
    """
    teacher = """CALLS = 0
class S(nn.Linear):
    def forward(self, x):
        global CALLS
        CALLS += self.training
        print("noise")
        if CALLS > 60: os._exit(0)
        return super().forward(x)
def teacher():
    return S(4, 3)
"""
    recipe = RECIPE.replace("[teacher.train]\nepochs = 1", '[teacher.train]\nepochs = 200\nprecision = "float32"')
    for file, text in {"edgekd.toml": recipe, "data.py": DATA, "models.py": "import os\n" + MODELS.replace(TEACHER, teacher)}.items():
        (tmp_path / file).write_text(text)
    program = "import sys; from edgekd import cli; code = cli.run(sys.argv[1:]); sys.exit(sorted({'torch', 'onnx', 'onnxruntime', 'ai_edge_litert'} & set(sys.modules)) or code)"
    command = [sys.executable, "-c", program, "build", "--recipe", str(tmp_path / "edgekd.toml"), "--until", "teach", "--json"]
    build = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert build.returncode == 5, build.stderr
    assert build.stdout == ""
    last = build.stderr.splitlines()[-1]
    assert (
        last
        == "edgekd: teach: models.py:teacher: the process ended with exit code 0 while this ran; its last output: noise | noise | noise"
    )
    assert "Traceback" not in build.stderr


def _refused(folder, message, **parts):
    with pytest.raises(RecipeError, match=message) as caught:
        _inspect(folder, **parts)
    assert "Traceback" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", DATA_CASES)
def test_data_that(name, tmp_path):
    old, new, message = DATA_CASES[name]
    assert old in DATA
    _refused(tmp_path, message, data=DATA.replace(old, new))


@pytest.mark.parametrize("name", MODEL_CASES)
def test_a_model_whose(name, tmp_path):
    old, new, message = MODEL_CASES[name]
    assert old in MODELS
    _refused(tmp_path, message, models=MODELS.replace(old, new))


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
def test_a_payload_in_weights_never_runs(suffix, tmp_path):
    payload = Payload()
    payload.path = tmp_path / "it-ran"
    (tmp_path / f"weights{suffix}").write_bytes(pickle.dumps({"weight": payload}))
    recipe = RECIPE.replace("[teacher.train]\nepochs = 1\n", f'weights = "weights{suffix}"\n')
    _refused(tmp_path, "weights", recipe=recipe)
    assert not payload.path.exists()
