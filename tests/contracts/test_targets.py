# SPDX-License-Identifier: Apache-2.0
"""Every profile of edgekd."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekd import config, registry
from edgekd.harness import runner

PROFILES = sorted((Path(__file__).parents[2] / "targets").glob("*.toml"))
X86 = {
    "arch": "x86_64", "core": "any", "features": ["avx2", "fma", "sse4_2", "ssse3", "popcnt", "avx"], "instruction_set": "x86-64-v3",
    "cores": 2, "mhz": 2000, "memory_bytes": 2**33, "storage_bytes": 2**36,
}  # fmt: skip


def test_all_profiles_are_listed():
    assert len(PROFILES) == 15
    assert config.target_names() == tuple(sorted(path.stem for path in PROFILES))


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_a_profile_is_valid_and_has_a_candidate_on_each_runtime(path):
    target = config.load_target(path.stem, X86)
    assert target.name == path.stem
    for entry in target.runtimes:
        assert set(target.schemes) & set(registry.runtime(entry.name).SCHEMES)
    assert len(path.read_text().splitlines()) <= 45
    assert ("qemu" in target.device.kinds) == (target.device.qemu_cpu is not None)
    assert all(entry.package and entry.threads[0] == 1 for entry in target.runtimes)
    assert target.protocol.min_runs >= 299  # a p99 needs as many


@pytest.mark.parametrize("path", [path for path in PROFILES if path.stem != "host"], ids=lambda path: path.stem)
def test_a_profile_names_sources(path):
    assert any(word in path.read_text() for word in ("Sources:", "developer.android.com", "psABI"))


def test_a_runtime_without_kernels_for_dynamic_schemes_does_not_list_them():
    target = config.load_target("rpi4-32")
    assert {(entry.package, entry.version) for entry in target.runtimes} == {("tflite-runtime", "==2.14.*")}
    assert target.schemes == ("float32", "static_wi8_ai8")


def test_host_is_this_machine():
    facts = runner.facts()
    target = config.load_target("host")
    assert (target.cpu.cores, target.device.arch) == (facts["cores"], facts["arch"])
    assert config.why_not_this_machine(target, facts) is None


@pytest.mark.parametrize(
    ("name", "features", "reason"),
    [
        ("x86-64-v3", ["avx2", "fma"], None),
        ("x86-64-v3", ["avx2"], "lacks fma"),
        ("x86-64-v3", ["avx2", "fma", "avx512f"], "has avx512f"),
        ("x86-64-v2", ["sse4_2", "ssse3", "popcnt", "avx2"], "has avx2"),
        ("rpi4", ["avx2"], "reached by ssh or qemu"),
        ("pixel8", ["avx2"], "reached by adb"),
    ],
)
def test_whether_this_machine_is_a_target(name, features, reason):
    problem = config.why_not_this_machine(config.load_target(name, X86), {**X86, "features": features})
    assert problem is None if reason is None else reason in problem
