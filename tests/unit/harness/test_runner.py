# SPDX-License-Identifier: Apache-2.0
"""Facts from recorded machines, and the harness as a process."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from edgekd.harness import runner

# cut from the boards' own /proc/cpuinfo
PI4 = "processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm crc32 cpuid\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: 0xd08\n\n"
PI5 = (
    "processor\t: 0\nFeatures\t: fp asimd evtstrm aes crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp\nCPU part\t: 0xd0b\n\n"
)
PIXEL8 = (
    "processor\t: 0\nFeatures\t: fp asimd asimddp asimdhp i8mm\nCPU part\t: 0xd46\n\n"
    "processor\t: 8\nFeatures\t: fp asimd asimddp asimdhp i8mm\nCPU part\t: 0xd4e\n\n"
)
PI32 = "processor\t: 0\nFeatures\t: half thumb fastmult vfp edsp neon vfpv3 tls vfpv4 idiva idivt vfpd32 lpae evtstrm crc32\nCPU part\t: 0xd08\n\n"
V2 = "sse4_1 sse4_2 ssse3 popcnt cx16 lahf_lm"
V3 = f"{V2} avx avx2 bmi1 bmi2 f16c fma abm movbe"
N100 = f"processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 190\nmodel name\t: Intel(R) N100\ncpu MHz\t\t: 700.0\nflags\t\t: {V3} avx_vnni\n\n"
MILAN = f"processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\nflags\t\t: {V3}\n\n"
ICELAKE = f"processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: {V3} avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni\n\n"
N5105 = f"processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: {V2}\n\n"


def _facts(tmp_path, cpuinfo, **files):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text(cpuinfo)
    for name, text in files.items():
        path = tmp_path / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return runner.facts(str(tmp_path))


@pytest.mark.parametrize(
    ("cpuinfo", "arch", "core", "instruction_set"),
    [
        (PI4, "aarch64", "cortex-a72", "aarch64"),
        (PI5, "aarch64", "cortex-a76", "aarch64+asimddp"),
        (PIXEL8, "aarch64", "cortex-x3", "aarch64+asimddp+i8mm"),
        (PI32, "armv7l", "cortex-a72", "armv7l"),
        (N100, "x86_64", "GenuineIntel-6-190", "x86-64-v3+avxvnni"),
        (MILAN, "x86_64", "AuthenticAMD-25-1", "x86-64-v3"),
        (ICELAKE, "x86_64", "GenuineIntel-unknown-unknown", "x86-64-v4+vnni"),
        (N5105, "x86_64", "GenuineIntel-unknown-unknown", "x86-64-v2"),
    ],
)
def test_what_a_machine_is(tmp_path, cpuinfo, arch, core, instruction_set):
    found = _facts(tmp_path, cpuinfo)
    assert (found["arch"], found["core"], found["instruction_set"]) == (arch, core, instruction_set)


def test_state_is_read_where_there_is_any(tmp_path):
    found = _facts(
        tmp_path,
        PI4 * 4,
        **{
            "sys__devices__system__cpu__cpu0__cpufreq__scaling_governor": "ondemand\n",
            "sys__devices__system__cpu__cpu0__cpufreq__cpuinfo_max_freq": "1800000\n",
            "sys__class__thermal__thermal_zone0__temp": "61234\n",
            "proc__device-tree__model": "Raspberry Pi 4 Model B Rev 1.4\0",
            "proc__meminfo": "MemTotal:        1946000 kB\n",
            "proc__loadavg": "0.42 0.3 0.2 1/100 1\n",
        },
    )
    assert (found["governor"], found["mhz"], found["temp_c"], found["load"]) == ("ondemand", 1800, 61.234, 0.42)
    assert (found["cpu_model"], found["cores"], found["memory_bytes"]) == ("Raspberry Pi 4 Model B Rev 1.4", 4, 1946000 * 1024)


def test_what_cannot_be_read_is_unknown(tmp_path):
    found = _facts(tmp_path, "")
    assert (found["governor"], found["cpu_model"], found["core"]) == ("unknown", "unknown", "unknown")
    assert (found["mhz"], found["temp_c"], found["memory_bytes"], found["load"]) == (None, None, None, None)


def test_identity_leaves_out_what_changes_by_itself(tmp_path):
    found = runner.identity(_facts(tmp_path, PI4))
    assert not {"load", "temp_c", "mhz", "governor", "storage_bytes"} & set(found)
    assert {"core", "features", "cores", "kernel"} <= set(found)


def test_the_harness_is_python_3_9_and_imports_nothing_of_edgekd():
    text = Path(runner.__file__).read_text()
    tree = ast.parse(text, feature_version=(3, 9))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name for name in imported if name.startswith("edgekd")}
    assert "match " not in text
