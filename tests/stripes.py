# SPDX-License-Identifier: Apache-2.0
"""A tiny recipe with a sound teacher that can be built whole in seconds; tests of invalid inputs change a line of it."""

from __future__ import annotations

import os
import subprocess
import sys

ROWS = 600
RECIPE = """\
schema = 1
name = "stripes"
[data]
splits = "data.py:splits"
[teacher]
model = "models.py:teacher"
weights = "teacher.safetensors"
[student]
model = "models.py:student"
inputs = [{ name = "image", shape = [1, 1, 8, 8], dtype = "float32" }]
[distill]
epochs = 2
batch_size = 32
learning_rate = 0.05
threads = 1
precision = "float32"
accelerator = "none"
[quantize]
runtimes = ["onnxruntime"]
schemes = ["float32"]
[budget]
max_accuracy_drop_pp = 30.0
"""
DATA = """\
import torch
from torch.utils.data import Subset, TensorDataset


def tensors():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(600) % 3
    x = 0.3 * torch.randn(600, 1, 8, 8, generator=generator)
    for index in range(3):
        x[y == index, :, 2 * index : 2 * index + 2] += 1.0
    return x, y


def splits():
    x, y = tensors()
    train = TensorDataset(x[:256], y[:256])
    splits = {"train": train, "validation": TensorDataset(x[256:320], y[256:320]),
              "calibration": Subset(train, range(16)), "evaluation": TensorDataset(x[320:], y[320:])}
    return splits
"""
MODELS = """\
import torch
from torch import nn


def teacher():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(64, 3)

    def forward(self, x):
        return self.last(x.flatten(1))


def student():
    return Student()
"""
PROFILE = """\
schema = 1
name = "brief"
title = "This machine, measured briefly"
cpu = { isa = "native", core = "native", cores = "native", mhz = "native", features = "native" }
limits = { memory_mib = "native", storage_mib = "native" }
runtimes = [
  { name = "litert", package = "ai-edge-litert", delegate = "xnnpack", threads = [1] },
  { name = "onnxruntime", package = "onnxruntime", threads = [1] },
]
schemes = ["float32", "static_wi8_ai8", "dynamic_wi8_afp32"]
device = { kinds = ["local"], arch = "native" }
protocol = { warmup_runs = 2, min_runs = 30, min_seconds = 0.0 }
"""


def teacher_weights():
    """Return weights with which the teacher has an accuracy of 100 %: each class is the mean of its rows."""
    import torch

    weight = torch.zeros(3, 1, 8, 8)
    for index in range(3):
        weight[index, 0, 2 * index : 2 * index + 2] = 0.5
    return {"1.weight": weight.reshape(3, 64), "1.bias": torch.zeros(3)}


def write(folder, *, recipe=RECIPE, data=DATA, models=MODELS):
    """Write the recipe and its files to a folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("edgekd.toml", recipe), ("data.py", data), ("models.py", models), ("brief.toml", PROFILE)):
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    save_file(teacher_weights(), folder / "teacher.safetensors")
    return folder


def command(*arguments, prefix=("-m", "edgekd")):
    """Return the command line of a build of the recipe in the current folder."""
    return [sys.executable, *prefix, "build", "--target", "./brief.toml", *arguments]


def build(folder, *arguments, prefix=("-m", "edgekd"), timeout=300, **environment):
    """Build the recipe in a folder and return the finished process."""
    variables = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    return subprocess.run(
        command(*arguments, prefix=prefix), cwd=folder, env=variables, capture_output=True, text=True, check=False, timeout=timeout
    )


def check_message(process, exit_codes):
    """Check that a process that refuses something ends with one of some exit codes, and one message without a traceback."""
    text = process.stdout + process.stderr
    assert process.returncode in exit_codes, text
    assert "Traceback" not in text, text
    assert "internal error" not in text, text
    lines = [line.startswith("edgekd: ") for line in process.stderr.splitlines()]
    starts = [is_message and not before for before, is_message in zip([False, *lines], lines, strict=False)]
    assert sum(starts) == 1, text
    assert all(letter.isprintable() or letter in "\n\t" for letter in process.stderr), repr(process.stderr)
