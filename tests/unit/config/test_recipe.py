# SPDX-License-Identifier: Apache-2.0
"""Recipes and targets as they are read: what comes out, what fills in, what is refused together, and that nothing else is raised."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekd import config
from edgekd.config import profiles
from edgekd.domain.losses import Loss
from edgekd.domain.recipe import Budget, Data, Distill, EntryPoint, Evaluate, Quantize, Recipe, Student, Teacher, TensorSpec
from edgekd.domain.target import Cpu, DeviceEntry, Limits, Protocol, RuntimeEntry, Target
from edgekd.errors import RecipeError

RECIPE = {
    "schema": 1,
    "name": "toy",
    "data": {"splits": "data.py:splits"},
    "teacher": {"model": "models.py:teacher", "weights": "teacher.safetensors"},
    "student": {"model": "models.py:student", "inputs": [{"name": "image", "shape": [1, 8, 8]}]},
    "distill": {"epochs": 3},
}
TARGET = {
    "schema": 1,
    "name": "board",
    "title": "A board",
    "cpu": {"isa": "x86-64-v3", "core": "any", "cores": 4, "mhz": 1800, "features": ["avx2"], "lacks": ["avx512f"]},
    "limits": {"memory_mib": 64, "storage_mib": 32},
    "runtimes": [{"name": "litert", "package": "ai-edge-litert", "threads": [1, 4]}],
    "schemes": ["float32"],
    "device": {"kinds": ["local", "ssh"], "arch": "x86_64"},
    "protocol": {"warmup_runs": 1, "min_runs": 300, "min_seconds": 2},
}
FACTS = {
    "arch": "x86_64",
    "core": "GenuineIntel-6-85",
    "features": ["avx2", "fma"],
    "instruction_set": "x86-64-v3",
    "cores": 8,
    "mhz": 2600,
    "memory_bytes": 4 * 2**30 + 1,
    "storage_bytes": 10 * 2**30,
}


def _toml(value):
    """Write a value as TOML; a table inline."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return str(value) if isinstance(value, float) else json.dumps(value)


def _write(folder, document, name="it.toml"):
    for file in ("data.py", "models.py", "teacher.safetensors", "teacher.onnx"):
        (folder / file).touch()
    path = folder / name
    path.write_text("\n".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in document.items()))
    return path


def _recipe(folder, **changes):
    return config.load_recipe(_write(folder, {**RECIPE, **changes}))


def _target(folder, facts=FACTS, **changes):
    return config.load_target(str(_write(folder, {**TARGET, **changes})), facts)


def _problems(load, *arguments, **changes):
    with pytest.raises(RecipeError) as caught:
        load(*arguments, **changes)
    return caught.value.problems


def test_a_short_recipe_is_filled_in(tmp_path):
    assert _recipe(tmp_path) == Recipe(
        schema=1,
        name="toy",
        data=Data(EntryPoint("data.py", "splits")),
        teacher=Teacher(EntryPoint("models.py", "teacher"), "teacher.safetensors"),
        student=Student(EntryPoint("models.py", "student"), (TensorSpec("image", (1, 8, 8)),)),
        distill=Distill(3, losses=(Loss("kl", 0.9), Loss("ce", 0.1))),
    )


def test_whole_numbers_stand_for_numbers(tmp_path):
    recipe = _recipe(tmp_path, distill={"epochs": 3, "learning_rate": 1, "losses": [{"kind": "kl"}]})
    assert type(recipe.distill.learning_rate) is float


def test_a_metric_may_be_a_word_or_code(tmp_path):
    assert _recipe(tmp_path, evaluate={"metric": "top1"}).evaluate == Evaluate()
    assert _recipe(tmp_path, evaluate={"metric": "models.py:f1"}).evaluate == Evaluate(EntryPoint("models.py", "f1"))
    assert _recipe(tmp_path, evaluate={"score": "models.py:iou"}).evaluate == Evaluate("top1", EntryPoint("models.py", "iou"))


def test_code_may_lie_in_another_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "code.py").touch()
    for file in ("sub/code.py", str(tmp_path / "sub" / "code.py")):
        assert _recipe(tmp_path, data={"splits": f"{file}:splits"}).data.splits == EntryPoint(file, "splits")


def test_a_target_changes_budget_and_quantization_key_by_key(tmp_path):
    recipe = _recipe(
        tmp_path,
        budget={"max_size_kib": 100, "max_accuracy_drop_pp": 1.0},
        quantize={"io": "int8"},
        target={"rpi4": {"budget": {"max_size_kib": 64}}, "my.own": {"quantize": {"schemes": ["static_wi8_ai8"]}}},
    )
    assert recipe.overrides_for("rpi4").budget == Budget(max_accuracy_drop_pp=1.0, max_size_kib=64.0)
    assert recipe.overrides_for("rpi4").quantize == Quantize(io="int8")
    assert recipe.overrides_for("my.own").budget == recipe.budget
    assert recipe.overrides_for("my.own").quantize == Quantize(("static_wi8_ai8",), io="int8")
    assert recipe.overrides_for("another").budget == recipe.budget


def test_problems_of_all_parts_are_told_at_once(tmp_path):
    problems = _problems(
        _recipe,
        tmp_path,
        nme="x",
        data={"splits": "dta.py:splits"},
        teacher={"model": "models.py:teacher"},
        student={"model": "models.py:student", "inputs": [{"name": "image", "shape": [2, 8]}, {"name": 3, "shape": [1]}]},
        distill={"epochs": 0, "losses": [{"kind": "ce", "temperature": 2.0}]},
        quantize={"schemes": ["float32"], "io": "int8"},
        evaluate={"metric": "top5"},
        target={"rpi4": {"budget": {"max_size": 3}}},
    )
    keys = sorted(problem.split(": ")[1] for problem in problems)
    assert keys == [
        "data.splits",
        "distill.epochs",
        "distill.losses[0].temperature",
        "evaluate.metric",
        "nme",
        "quantize.io",
        "student.inputs[0].shape",
        "student.inputs[1].name",
        "target.rpi4.budget.max_size",
        "teacher",
    ]


def test_a_problem_of_the_recipe_is_not_told_again_for_its_targets(tmp_path):
    problems = _problems(_recipe, tmp_path, quantize={"schemes": "all"}, target={"rpi4": {"budget": {"max_size_kib": 3}}})
    assert [problem.split(": ")[1] for problem in problems] == ["quantize.schemes"]


@pytest.mark.parametrize(
    ("teacher", "good"),
    [
        ({"model": "models.py:teacher", "weights": "teacher.safetensors"}, True),
        ({"model": "models.py:teacher", "train": {"epochs": 1}}, True),
        ({"file": "teacher.onnx"}, True),
        ({}, False),
        ({"weights": "teacher.safetensors"}, False),
        ({"train": {"epochs": 1}}, False),
        ({"model": "models.py:teacher"}, False),
        ({"model": "models.py:teacher", "weights": "teacher.safetensors", "train": {"epochs": 1}}, False),
        ({"model": "models.py:teacher", "file": "teacher.onnx"}, False),
        ({"weights": "teacher.safetensors", "file": "teacher.onnx"}, False),
    ],
)
def test_a_teacher_is_given_in_one_of_three_ways(tmp_path, teacher, good):
    if good:
        assert _recipe(tmp_path, teacher=teacher).teacher
    else:
        assert any("it.toml: teacher: has" in problem for problem in _problems(_recipe, tmp_path, teacher=teacher))


def test_paths_are_shown_as_seen_from_here(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    path = _write(tmp_path / "sub", {**RECIPE, "name": ""})
    monkeypatch.chdir(tmp_path)
    for given_path in (path, Path("sub/it.toml")):
        assert _problems(config.load_recipe, given_path)[0].startswith("sub/it.toml: name: ")
    monkeypatch.chdir(tmp_path / "sub")
    (tmp_path / "elsewhere").mkdir()
    assert _problems(config.load_recipe, path)[0].startswith("it.toml: ")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert _problems(config.load_recipe, path)[0].startswith(f"{path}: ")


def test_a_folder_that_is_gone_does_not_hide_the_problem(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert _problems(config.load_recipe, Path("it.toml"))[0] == "it.toml: no such recipe; edgekd init writes one"


def test_a_byte_order_mark_is_no_problem(tmp_path):
    path = _write(tmp_path, RECIPE)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert config.load_recipe(path).name == "toy"


def test_a_target_is_read(tmp_path):
    assert _target(tmp_path) == Target(
        schema=1,
        name="board",
        title="A board",
        cpu=Cpu("x86-64-v3", "any", 4, 1800, ("avx2",), ("avx512f",)),
        limits=Limits(64, 32),
        runtimes=(RuntimeEntry("litert", "ai-edge-litert", (1, 4)),),
        schemes=("float32",),
        device=DeviceEntry(("local", "ssh"), "x86_64"),
        protocol=Protocol(1, 300, 2.0),
    )


NATIVE = {
    "cpu": {"isa": "native", "core": "native", "cores": "native", "mhz": "native", "features": "native"},
    "limits": {"memory_mib": "native", "storage_mib": "native"},
    "device": {"kinds": ["local"], "arch": "native"},
}


def test_native_is_this_machine(tmp_path):
    target = _target(tmp_path, **NATIVE)
    assert target.cpu == Cpu("x86-64-v3", "GenuineIntel-6-85", 8, 2600, ("avx2", "fma"))
    assert target.limits == Limits(4096, 10240)
    assert target.device.arch == "x86_64"


@pytest.mark.parametrize(
    ("threads", "cores", "read"),
    [
        ([1, "native"], 8, (1, 8)),
        ([1, "native"], 1, (1,)),
        (["native", 8], 8, (8,)),
        (["native"], 2, (2,)),
        ([1, 4], 8, (1, 4)),
    ],
)
def test_native_threads_are_all_cores_once(tmp_path, threads, cores, read):
    runtimes = [{**TARGET["runtimes"][0], "threads": threads}]
    assert _target(tmp_path, {**FACTS, "cores": cores}, runtimes=runtimes).runtimes[0].threads == read


def test_native_is_refused_where_the_machine_does_not_tell(tmp_path):
    facts = {**FACTS, "mhz": None, "memory_bytes": None, "storage_bytes": None, "arch": "riscv64"}
    problems = _problems(_target, tmp_path, facts, **NATIVE)
    assert [problem.split(": ")[1] for problem in problems] == ["limits.memory_mib", "limits.storage_mib", "device.arch"]
    assert _target(tmp_path, facts, cpu=NATIVE["cpu"]).cpu.mhz == 1


def test_facts_are_looked_up_only_for_native(tmp_path, monkeypatch):
    from edgekd.harness import runner

    monkeypatch.setattr(runner, "facts", lambda: {**FACTS, "cores": 3})
    assert _target(tmp_path, None, **NATIVE).cpu.cores == 3
    monkeypatch.setattr(runner, "facts", None)
    assert _target(tmp_path, None).cpu.cores == 4


@pytest.mark.parametrize(
    ("changes", "facts", "reason"),
    [
        ({}, {}, None),
        ({}, {"features": ["avx2", "fma", "avx_vnni"]}, None),
        ({"device": {"kinds": ["ssh"], "arch": "x86_64"}}, {}, "board is reached by ssh, and no device was named"),
        ({}, {"arch": "aarch64"}, "board is x86_64, this machine is aarch64"),
        ({}, {"features": ["fma"]}, "this machine lacks avx2, which board has"),
        ({}, {"features": ["avx2", "avx512f"]}, "this machine has avx512f, which board lacks, so other kernels would run"),
    ],
)
def test_which_machine_a_target_is(tmp_path, changes, facts, reason):
    target, machine = _target(tmp_path, **changes), {**FACTS, **facts}
    assert config.why_not_this_machine(target, machine) == reason
    assert config.is_this_machine(target, machine) is (reason is None)


def test_a_target_is_named_or_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.find_target("rpi4").name == "rpi4.toml"
    assert config.find_target("rpi4").is_file()
    assert config.find_target("rpi4.toml") == Path("rpi4.toml")
    assert config.find_target(f"here{os.sep}rpi4") == Path("here/rpi4")
    for name in ("rpi", "", "..", ".", "x" * 300, "RPI4"):
        assert f"target '{name}': no such profile; expected one of android-arm64, " in _problems(config.find_target, name)[0]


def test_the_wheel_s_profiles_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(profiles, "PACKAGE", tmp_path / "edgekd")
    for folder, name in (("targets", "checkout"), ("edgekd/_targets", "wheel")):
        (tmp_path / folder).mkdir(parents=True)
        _write(tmp_path / folder, TARGET, f"{name}.toml")
        assert config.target_names() == (name,)
    assert "expected the file's name, 'wheel'" in _problems(config.load_target, "wheel", FACTS)[0]


def _paths(value, prefix=()):
    """Return the path of each value of a document, tables and arrays included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix, *(path for key, item in items for path in _paths(item, (*prefix, key)))]


FULL = {
    **RECIPE,
    "distill": {"epochs": 3, "losses": [{"kind": "kl", "temperature": 2.0}], "threads": 1},
    "quantize": {"schemes": ["float32"], "runtimes": ["litert"], "io": "float32"},
    "evaluate": {"metric": "top1"},
    "budget": {"max_size_kib": 1},
    "target": {"rpi4": {"budget": {"max_size_kib": 2}, "quantize": {"io": "float32"}}},
}
SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.sampled_from(["native", "auto", "data.py:splits", "a.py:b", "float32", "", "\0", "../x"]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab.\n", max_size=2), inner, max_size=2), max_leaves=4
)


@pytest.mark.parametrize(
    ("document", "load"),
    [(FULL, config.load_recipe), ({**TARGET, **NATIVE}, lambda path: config.load_target(str(path), FACTS))],
    ids=["recipe", "target"],
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_stands_there_is_read_or_refused(tmp_path, document, load, data):
    changed = copy.deepcopy(document)
    for _ in range(data.draw(st.integers(1, 3))):
        *steps, last = data.draw(st.sampled_from([path for path in _paths(changed) if path]))
        holder = changed
        for step in steps:
            holder = holder[step]
        holder[last] = data.draw(VALUES)
    try:
        read = load(_write(tmp_path, changed))
    except RecipeError as error:
        assert min(len(problem.splitlines()) == 1 < problem.count(": ") for problem in error.problems)  # noqa: PT017  (or it is read)
    else:
        assert json.dumps(dataclasses.asdict(read), allow_nan=False)
