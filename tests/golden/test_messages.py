# SPDX-License-Identifier: Apache-2.0
"""Every error message about a wrong recipe or a wrong target profile, as a golden file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgekd import config
from edgekd.errors import RecipeError

GOLDEN = Path(__file__).parent / "messages.txt"

RECIPE = """\
schema = 1
name = "toy"
[data]
splits = "data.py:splits"
[teacher]
model = "models.py:teacher"
weights = "teacher.safetensors"
[student]
model = "models.py:student"
inputs = [{ name = "image", shape = [1, 1, 8, 8], dtype = "float32" }]
[distill]
epochs = 3
losses = [{ kind = "kl", temperature = 4.0, weight = 0.9 }, { kind = "ce", weight = 0.1 }]
[budget]
max_accuracy_drop_pp = 1.0
"""
TARGET = """\
schema = 1
name = "board"
title = "A board"
cpu = { isa = "armv8-a", core = "cortex-a72", cores = 4, mhz = 1800, features = ["asimd"] }
limits = { memory_mib = 1024, storage_mib = 1024 }
runtimes = [{ name = "litert", package = "ai-edge-litert", threads = [1, 4] }]
schemes = ["float32", "static_wi8_ai8"]
device = { kinds = ["ssh"], arch = "aarch64" }
protocol = { warmup_runs = 20, min_runs = 300, min_seconds = 10 }
"""
# name -> (text to replace, replacement)
RECIPES = {
    "invalid TOML": ("schema = 1", "schema = "),
    "schema of a later version": ("schema = 1", "schema = 2"),
    "schema missing": ("schema = 1\n", ""),
    "name with a slash": ('"toy"', '"to/y"'),
    "name is a number": ('"toy"', "3"),
    "name is empty": ('"toy"', '""'),
    "unknown table": ("[budget]", "[budgets]"),
    "unknown key": ("epochs = 3", "epoch = 3"),
    "unknown budget": ("max_accuracy_drop_pp", "max_acuracy_drop_pp"),
    "entry point without function": ('"data.py:splits"', '"data.py"'),
    "entry point that is not a Python file": ('"data.py:splits"', '"data.txt:splits"'),
    "entry point with an invalid name": ('"data.py:splits"', '"data.py:spl its"'),
    "entry point is a number": ('"data.py:splits"', "4"),
    "entry point whose file is missing": ('"data.py:splits"', '"dta.py:splits"'),
    "two files are missing": ("models.py", "model.py"),
    "teacher without weights": ('weights = "teacher.safetensors"\n', ""),
    "teacher with file and model": ('weights = "teacher.safetensors"', 'file = "teacher.onnx"'),
    "weights of another kind": ("teacher.safetensors", "teacher.h5"),
    "weights with a name that is too long": ("teacher.safetensors", f"{'y' * 300}.pt"),
    "weights are missing": ("teacher.safetensors", "techer.safetensors"),
    "student missing": (
        '[student]\nmodel = "models.py:student"\ninputs = [{ name = "image", shape = [1, 1, 8, 8], dtype = "float32" }]\n',
        "",
    ),
    "no inputs": ('[{ name = "image", shape = [1, 1, 8, 8], dtype = "float32" }]', "[]"),
    "inputs is a table": ('[{ name = "image", shape = [1, 1, 8, 8], dtype = "float32" }]', '{ name = "image", shape = [1, 1, 8, 8] }'),
    "batch that is not 1": ("[1, 1, 8, 8]", "[32, 1, 8, 8]"),
    "axis of 0": ("[1, 1, 8, 8]", "[1, 0, 8, 8]"),
    "axis that is a float": ("[1, 1, 8, 8]", "[1, 1, 8.0, 8]"),
    "dtype is misspelled": ('"float32"', '"flaot32"'),
    "control characters in a name": ('name = "image"', 'name = "im\\u001b[2Jage"'),
    "two inputs of one name": ("inputs = [", 'inputs = [{ name = "image", shape = [1, 4] }, '),
    "an input of too many elements": ("[1, 1, 8, 8]", "[1, 1099511627776, 1099511627776]"),
    "an input of too many axes": ("[1, 1, 8, 8]", "[1, 1, 1, 1, 1, 1, 1, 8, 8]"),
    "threads beyond any CPU": ("epochs = 3", "epochs = 3\nthreads = 100000"),
    "epochs beyond any training": ("epochs = 3", "epochs = 1000000000000"),
    "learning rate beyond sense": ("epochs = 3", "epochs = 3\nlearning_rate = 1e300"),
    "temperature beyond sense": ("temperature = 4.0", "temperature = 1e300"),
    "epochs of 0": ("epochs = 3", "epochs = 0"),
    "epochs is text": ("epochs = 3", 'epochs = "3"'),
    "epochs is true": ("epochs = 3", "epochs = true"),
    "no losses": ('[{ kind = "kl", temperature = 4.0, weight = 0.9 }, { kind = "ce", weight = 0.1 }]', "[]"),
    "unknown loss": ('kind = "kl"', 'kind = "kld"'),
    "loss twice": ('{ kind = "ce", weight = 0.1 }', '{ kind = "kl", weight = 0.1 }'),
    "temperature of ce": ("weight = 0.1 }", "weight = 0.1, temperature = 2.0 }"),
    "temperature of 0": ("temperature = 4.0", "temperature = 0"),
    "weight below 0": ("weight = 0.9", "weight = -0.9"),
    "weight is text": ("weight = 0.9", 'weight = "atuo"'),
    "an alpha": ("weight = 0.9", "alpha = 0.9"),
    "budget is text": ("max_accuracy_drop_pp = 1.0", 'max_accuracy_drop_pp = "1 %"'),
    "budget is nan": ("max_accuracy_drop_pp = 1.0", "max_accuracy_drop_pp = nan"),
    "budget out of range": ("max_accuracy_drop_pp = 1.0", "max_accuracy_drop_pp = 101"),
    "latency of 0": ("max_accuracy_drop_pp = 1.0", "max_latency_p95_ms = 0"),
    "unknown optimizer": ("epochs = 3", 'epochs = 3\noptimizer = "adam"'),
    "unknown metric": ("[budget]", '[evaluate]\nmetric = "top5"\n[budget]'),
    "metric and score": ("[budget]", '[evaluate]\nmetric = "models.py:f1"\nscore = "models.py:score"\n[budget]'),
    "class budget of a whole-set metric": ("[budget]", '[evaluate]\nmetric = "models.py:f1"\n[budget]\nmax_class_drop_pp = 3'),
    "unknown scheme": ("[budget]", '[quantize]\nschemes = ["static-int8"]\n[budget]'),
    "schemes is text": ("[budget]", '[quantize]\nschemes = "static_wi8_ai8"\n[budget]'),
    "no schemes": ("[budget]", "[quantize]\nschemes = []\n[budget]"),
    "unknown io": ("[budget]", '[quantize]\nio = "uint8"\n[budget]'),
    "table of a target is misspelled": ("[budget]", "[target.rpi4.buget]\nmax_size_kib = 1\n[budget]"),
    "key of a target is misspelled": ("[budget]", "[target.rpi4.budget]\nmax_size_kb = 1\n[budget]"),
    "io of a list without a static scheme": ("[budget]", '[quantize]\nio = "int8"\nschemes = ["float32"]\n[budget]'),
    "scheme twice": ("[budget]", '[quantize]\nschemes = ["float32", "float32"]\n[budget]'),
    "runtimes is text": ("[budget]", '[quantize]\nruntimes = "litert"\n[budget]'),
    "io of a target without a static scheme": (
        "[budget]",
        '[quantize]\nschemes = ["float32"]\n[target.rpi4.quantize]\nio = "int8"\n[budget]',
    ),
    "class budget of a target with a whole-set metric": (
        "[budget]",
        '[evaluate]\nmetric = "models.py:f1"\n[target.rpi4.budget]\nmax_class_drop_pp = 3\n[budget]',
    ),
    "target with an invalid name": ("[budget]", '[target."rpi 4".budget]\nmax_size_kib = 1\n[budget]'),
    "budget of a target is a number": ("[budget]", "[target.rpi4]\nbudget = 4\n[budget]"),
    "teacher is empty": ('model = "models.py:teacher"\nweights = "teacher.safetensors"\n', ""),
    "teacher with weights and training": ('weights = "teacher.safetensors"', 'weights = "teacher.safetensors"\ntrain = { epochs = 1 }'),
    "whole model of another kind": ('model = "models.py:teacher"\nweights = "teacher.safetensors"', 'file = "teacher.h5"'),
    "TorchScript that is not trusted": ('model = "models.py:teacher"\nweights = "teacher.safetensors"', 'file = "teacher.ts"'),
    "torch.export that is not trusted": ('model = "models.py:teacher"\nweights = "teacher.safetensors"', 'file = "teacher.pt2"'),
    "trusted weights": ('weights = "teacher.safetensors"', 'weights = "teacher.safetensors"\ntrusted = true'),
    "weights in several files": ('"teacher.safetensors"', '"model.safetensors.index.json"'),
    "weights are a folder": ('"teacher.safetensors"', '"folder.bin"'),
    "shape that fills no memory": ("[1, 1, 8, 8]", "[1, 1099511627776, 1099511627776]"),
    "shape with many axes": ("[1, 1, 8, 8]", "[1, 1, 1, 1, 1, 1, 1, 1, 8]"),
    "shape with an axis of zero": ("[1, 1, 8, 8]", "[1, 0, 8, 8]"),
    "shape with a negative axis": ("[1, 1, 8, 8]", "[1, -1, 8, 8]"),
    "shape is empty": ("[1, 1, 8, 8]", "[]"),
    "a metric without function": ("[budget]", '[evaluate]\nmetric = "models.py"\n[budget]'),
    "a metric that is an array": ("[budget]", '[evaluate]\nmetric = ["top1"]\n[budget]'),
    "a date": ("epochs = 3", "epochs = 2026-01-01"),
    "budget is true": ("max_accuracy_drop_pp = 1.0", "max_size_kib = true"),
    "budget is infinite": ("max_accuracy_drop_pp = 1.0", "max_size_kib = inf"),
    "budget with more than 64 bits": ("max_accuracy_drop_pp = 1.0", f"max_size_kib = 1{'0' * 400}"),
    "number with many hexadecimal digits": ("epochs = 3", f"epochs = 0x{'f' * 5000}"),
    "number with too many digits": ("epochs = 3", f"epochs = {'9' * 5000}"),
    "nested too deeply": ("epochs = 3", f"epochs = {'[' * 5000}"),
    "line break in a key": ("epochs = 3", 'epochs = 3\n"a\\nb" = 1'),
    "line break in a value": ('"toy"', '"to\\ny"'),
    "name too long": ('"toy"', f'"{"y" * 300}"'),
    "key twice": ("epochs = 3", "epochs = 3\nepochs = 4"),
    "target is a number": ('name = "toy"', 'name = "toy"\ntarget = 4'),
}
TARGETS = {
    "scheme by another name": ('"static_wi8_ai8"', '"static-int8"'),
    "scheme twice": ('"static_wi8_ai8"', '"float32"'),
    "no schemes": ('["float32", "static_wi8_ai8"]', "[]"),
    "unknown runtime": ('name = "litert"', 'name = "tflite"'),
    "no runtimes": ('[{ name = "litert", package = "ai-edge-litert", threads = [1, 4] }]', "[]"),
    "threads of 0": ("[1, 4]", "[0, 4]"),
    "threads twice": ("[1, 4]", "[4, 4]"),
    "threads is a number": ("[1, 4]", "4"),
    "native where it is not allowed": ("min_runs = 300", 'min_runs = "native"'),
    "device kind twice": ('["ssh"]', '["ssh", "ssh"]'),
    "feature that the CPU has and lacks": ('features = ["asimd"]', 'features = ["asimd"], lacks = ["asimd"]'),
    "runtime twice": ("threads = [1, 4] }", 'threads = [1] }, { name = "litert", package = "ai-edge-litert", threads = [4] }'),
    "title is empty": ('"A board"', '""'),
    "memory without unit": ("memory_mib", "memory"),
    "memory below 1": ("memory_mib = 1024", "memory_mib = 0"),
    "unknown device kind": ('["ssh"]', '["telnet"]'),
    "unknown architecture": ('"aarch64"', '"arm64"'),
    "no title": ('title = "A board"\n', ""),
    "inherits": ("schema = 1", 'schema = 1\nbase = "rpi4"'),
    "protocol without runs": ("min_runs = 300, ", ""),
    "cpu is text": ('{ isa = "armv8-a", core = "cortex-a72", cores = 4, mhz = 1800, features = ["asimd"] }', '"cortex-a72"'),
}


def _write(folder, text):
    for name in ("data.py", "models.py", "teacher.safetensors", "teacher.onnx", "teacher.ts", "teacher.pt2"):
        (folder / name).write_text("")
    (folder / "folder.bin").mkdir(exist_ok=True)
    path = folder / "it.toml"
    path.write_text(text)
    return path


def _message(load, path):
    with pytest.raises(RecipeError) as caught:
        load(path)
    return str(caught.value)


def _messages(folder):
    yield "recipe: none", _message(config.load_recipe, Path("none.toml"))
    yield "recipe: a folder", _message(config.load_recipe, Path())
    yield "target: none", _message(config.load_target, "none.toml")
    yield "target: unknown name", _message(config.load_target, "rpi44")
    for what, base, changes, load in (
        ("recipe", RECIPE, RECIPES, config.load_recipe),
        ("target", TARGET, TARGETS, lambda path: config.load_target(str(path))),
    ):
        for name, (old, new) in changes.items():
            assert old in base, name
            yield f"{what}: {name}", _message(load, _write(folder, base.replace(old, new)))
    path = _write(folder, RECIPE)
    path.write_bytes(b"\xff\xfe")
    yield "recipe: not utf-8", _message(config.load_recipe, path)


def test_messages_match_the_golden_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    messages = list(_messages(tmp_path))
    assert len(messages) == 5 + len(RECIPES) + len(TARGETS) > 70
    text = "\n".join(f"[{name}]\n{message}\n" for name, message in messages)
    if os.environ.get("EDGEKD_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_the_unchanged_files_are_valid(tmp_path):
    assert config.load_recipe(_write(tmp_path, RECIPE)).name == "toy"
    assert config.load_target(str(_write(tmp_path, TARGET))).name == "board"


def test_every_problem_is_one_line_with_its_file():
    lines = [line for line in GOLDEN.read_text().splitlines() if line and not line.startswith("[")]
    assert len(lines) > 90
    assert not [
        line for line in lines if not line.startswith(("it.toml: ", "none.toml: ", ".: ", "target 'rpi44': ")) or line.endswith(".")
    ]


def test_all_problems_are_reported_together(tmp_path):
    text = RECIPE.replace("epochs = 3", "epochs = 0").replace('"toy"', '"t y"').replace("max_accuracy_drop_pp", "max_drop")
    assert len(_message(config.load_recipe, _write(tmp_path, text)).splitlines()) == 3
