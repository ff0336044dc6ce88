# SPDX-License-Identifier: Apache-2.0
"""Target profiles: values, what "native" becomes, and whether this machine is a target."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgekd import config
from edgekd.config import profiles
from edgekd.domain.target import Cpu, DeviceEntry, Limits, Protocol, RuntimeEntry, Target
from tests.unit.config.documents import FACTS, NATIVE, TARGET, problems_of, write_toml


def _target(folder, facts=FACTS, **changes):
    return config.load_target(str(write_toml(folder, {**TARGET, **changes})), facts)


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


def test_native_is_this_machine(tmp_path):
    target = _target(tmp_path, **NATIVE)
    assert target.cpu == Cpu("x86-64-v3", "GenuineIntel-6-85", 8, 2600, ("avx2", "fma"))
    assert target.limits == Limits(4096, 10240)
    assert target.device.arch == "x86_64"


@pytest.mark.parametrize(
    ("threads", "cores", "expected"),
    [
        ([1, "native"], 8, (1, 8)),
        ([1, "native"], 1, (1,)),
        (["native", 8], 8, (8,)),
        (["native"], 2, (2,)),
        ([1, 4], 8, (1, 4)),
    ],
)
def test_native_threads_are_all_cores_once(tmp_path, threads, cores, expected):
    runtimes = [{**TARGET["runtimes"][0], "threads": threads}]
    assert _target(tmp_path, {**FACTS, "cores": cores}, runtimes=runtimes).runtimes[0].threads == expected


def test_native_is_refused_if_the_value_cannot_be_read(tmp_path):
    facts = {**FACTS, "mhz": None, "memory_bytes": None, "storage_bytes": None, "arch": "riscv64"}
    problems = problems_of(_target, tmp_path, facts, **NATIVE)
    assert [problem.split(": ")[1] for problem in problems] == ["limits.memory_mib", "limits.storage_mib", "device.arch"]
    assert _target(tmp_path, facts, cpu=NATIVE["cpu"]).cpu.mhz == 1


def test_facts_are_read_only_for_native(tmp_path, monkeypatch):
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
def test_whether_this_machine_is_the_target(tmp_path, changes, facts, reason):
    target, machine = _target(tmp_path, **changes), {**FACTS, **facts}
    assert config.why_not_this_machine(target, machine) == reason
    assert config.is_this_machine(target, machine) is (reason is None)


def test_a_target_is_a_name_or_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.find_target("rpi4").name == "rpi4.toml"
    assert config.find_target("rpi4").is_file()
    assert config.find_target("rpi4.toml") == Path("rpi4.toml")
    assert config.find_target(f"boards{os.sep}rpi4") == Path("boards/rpi4")
    for name in ("rpi", "", "..", ".", "x" * 300, "RPI4"):
        assert f"target '{name}': no such profile; expected one of android-arm64, " in problems_of(config.find_target, name)[0]


def test_profiles_of_the_wheel_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(profiles, "PACKAGE", tmp_path / "edgekd")
    for folder, name in (("targets", "checkout"), ("edgekd/_targets", "wheel")):
        (tmp_path / folder).mkdir(parents=True)
        write_toml(tmp_path / folder, TARGET, f"{name}.toml")
        assert config.target_names() == (name,)
    assert "expected the file's name, 'wheel'" in problems_of(config.load_target, "wheel", FACTS)[0]
