# SPDX-License-Identifier: Apache-2.0
"""Facts of recorded machines, model sessions, and the harness as a process."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgekd.harness import runner


def _arm(parts, features, tail=""):
    """Return a /proc/cpuinfo as ARM kernels write it, one part per core."""
    blocks = [
        f"processor\t: {number}\nBogoMIPS\t: 108.00\nFeatures\t: {features}\nCPU implementer\t: {implementer}\nCPU architecture: 8\n"
        f"CPU variant\t: 0x0\nCPU part\t: {part}\nCPU revision\t: 3\n"
        for number, (implementer, part) in enumerate(parts)
    ]
    return "\n".join(blocks) + f"\n{tail}"


def _x86(cores, vendor, family, model, name, mhz, flags):
    blocks = [
        f"processor\t: {number}\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: {name}\n"
        f"cpu MHz\t\t: {mhz}\nflags\t\t: {flags}\nbogomips\t: 1612.80\n"
        for number in range(cores)
    ]
    return "\n".join(blocks)


# features and flags from public listings of the boards
A76 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
X3 = f"{A76} jscvt fcma sha3 sm3 sm4 sha512 asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg dcpodp flagm2 frint i8mm bti"
V2 = "fpu vme cx8 sse sse2 syscall nx lm pni ssse3 cx16 sse4_1 sse4_2 movbe popcnt aes lahf_lm sha_ni"
V3 = f"{V2} fma avx f16c rdrand abm bmi1 avx2 bmi2 erms"
PI4 = _arm(
    [("0x41", "0xd08")] * 4,
    "fp asimd evtstrm crc32 cpuid",
    "Hardware\t: BCM2835\nRevision\t: c03114\nModel\t\t: Raspberry Pi 4 Model B Rev 1.4\n",
)
PI5 = _arm([("0x41", "0xd0b")] * 4, A76, "Revision\t: c04170\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n")
PIXEL8 = _arm([("0x41", "0xd46")] * 4 + [("0x41", "0xd4d")] * 4 + [("0x41", "0xd4e")], X3)
PI32 = _arm(
    [("0x41", "0xd08")] * 4,
    "half thumb fastmult vfp edsp neon vfpv3 tls vfpv4 idiva idivt vfpd32 lpae evtstrm crc32",
    "Hardware\t: BCM2711\n",
)
KRYO = _arm([("0x51", "0x803")] * 4 + [("0x51", "0x802")] * 4, "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp")
N100 = _x86(4, "GenuineIntel", 6, 190, "Intel(R) N100", "2925.072", f"{V3} avx_vnni")
I5 = _x86(8, "GenuineIntel", 6, 142, "Intel(R) Core(TM) i5-8250U CPU @ 1.60GHz", "700.001", V3)
EPYC = _x86(2, "AuthenticAMD", 25, 1, "AMD EPYC", "2445.404", f"{V3} sse4a vaes hypervisor")
ICELAKE = _x86(2, "GenuineIntel", 6, 106, "Intel(R) Xeon(R)", "2600.0", f"{V3} avx512f avx512dq avx512cd avx512bw avx512vl avx512_vnni")
N5105 = _x86(4, "GenuineIntel", 6, 156, "Intel(R) Celeron(R) N5105 @ 2.00GHz", "1996.8", V2)


def _facts(root, cpuinfo, files=None):
    for name, text in {"proc/cpuinfo": cpuinfo, **(files or {})}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return runner.facts(str(root))


@pytest.mark.parametrize(
    ("cpuinfo", "arch", "core", "instruction_set", "cores", "cpu_model", "mhz"),
    [
        (PI4, "aarch64", "cortex-a72", "aarch64", 4, "Raspberry Pi 4 Model B Rev 1.4", None),
        (PI5, "aarch64", "cortex-a76", "aarch64+asimddp", 4, "Raspberry Pi 5 Model B Rev 1.0", None),
        (PIXEL8, "aarch64", "cortex-x3", "aarch64+asimddp+i8mm", 9, "unknown", None),
        (PI32, "armv7l", "cortex-a72", "armv7l", 4, "BCM2711", None),
        (KRYO, "aarch64", "0x51-0x802", "aarch64", 8, "unknown", None),
        (N100, "x86_64", "GenuineIntel-6-190", "x86-64-v3+avxvnni", 4, "Intel(R) N100", None),
        (I5, "x86_64", "GenuineIntel-6-142", "x86-64-v3", 8, "Intel(R) Core(TM) i5-8250U CPU @ 1.60GHz", 1600),
        (EPYC, "x86_64", "AuthenticAMD-25-1", "x86-64-v3", 2, "AMD EPYC", None),
        (ICELAKE, "x86_64", "GenuineIntel-6-106", "x86-64-v4+vnni", 2, "Intel(R) Xeon(R)", None),
        (N5105, "x86_64", "GenuineIntel-6-156", "x86-64-v2", 4, "Intel(R) Celeron(R) N5105 @ 2.00GHz", 2000),
    ],
)
def test_facts_of_recorded_machines(tmp_path, cpuinfo, arch, core, instruction_set, cores, cpu_model, mhz):
    facts = _facts(tmp_path, cpuinfo)
    assert (facts["arch"], facts["core"], facts["instruction_set"]) == (arch, core, instruction_set)
    assert (facts["cores"], facts["cpu_model"], facts["mhz"]) == (cores, cpu_model, mhz)


@pytest.mark.parametrize(("missing", "level"), [("popcnt", 1), ("movbe", 2), ("fma", 2), ("avx512vl", 3)])
def test_an_x86_level_needs_all_its_flags_and_all_lower_ones(missing, level):
    flags = f"{V3} avx512f avx512dq avx512cd avx512bw avx512vl".split()
    assert runner.instruction_set("x86_64", flags) == "x86-64-v4"
    assert runner.instruction_set("x86_64", [flag for flag in flags if flag != missing]) == f"x86-64-v{level}"


def test_state_of_the_machine_is_read(tmp_path):
    facts = _facts(
        tmp_path,
        PI4,
        {
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
            "sys/devices/system/cpu/cpu3/cpufreq/scaling_governor": "ondemand\n",
            "sys/devices/system/cpu/cpu3/cpufreq/cpuinfo_max_freq": "1800000\n",
            "sys/devices/system/cpu/cpu3/cpufreq/scaling_cur_freq": "600000\n",
            "sys/class/thermal/thermal_zone0/temp": "61234\n",
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
            "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
            "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.5\0",
            "proc/meminfo": "MemTotal:        1946000 kB\nMemFree:          946000 kB\n",
            "proc/loadavg": "0.42 0.3 0.2 1/100 1\n",
            "proc/stat": "cpu  1000 200 300 9999 50 0 7 25 0 0\ncpu0 500 100 150 5000 25 0 3 12 0 0\n",
        },
    )
    assert (facts["governor"], facts["mhz"], facts["mhz_now"], facts["temp_c"]) == ("ondemand", 1800, 600, 61.234)
    assert (facts["throttled"], facts["load"]) == (0x50005, 0.42)
    assert (facts["cpu_model"], facts["memory_bytes"]) == ("Raspberry Pi 4 Model B Rev 1.5", 1946000 * 1024)
    assert (facts["busy_s"], facts["steal_s"]) == (15.07, 0.25)  # a tick is a hundredth of a second


def test_both_governors_are_reported_and_the_clock_of_the_big_core(tmp_path):
    facts = _facts(
        tmp_path,
        PIXEL8,
        {
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "sched_pixel\n",
            "sys/devices/system/cpu/cpu8/cpufreq/scaling_governor": "performance\n",
            "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "1704000\n",
            "sys/devices/system/cpu/cpu8/cpufreq/cpuinfo_max_freq": "2914000\n",
        },
    )
    assert (facts["governor"], facts["mhz"]) == ("performance+sched_pixel", 2914)


def test_temperature_is_the_highest_of_the_cpu_zones(tmp_path):
    zones = {"acpitz": "20000", "x86_pkg_temp": "48000", "soc-thermal": "51000", "battery": "90000"}
    files = {}
    for number, (kind, temperature) in enumerate(zones.items()):
        files[f"sys/class/thermal/thermal_zone{number}/type"] = kind
        files[f"sys/class/thermal/thermal_zone{number}/temp"] = temperature
    files["sys/class/thermal/thermal_zone9/type"] = "cpu-off"
    files["sys/class/thermal/thermal_zone9/temp"] = ""
    assert _facts(tmp_path, N100, files)["temp_c"] == 51.0


def test_facts_that_cannot_be_read_are_unknown(tmp_path):
    facts = _facts(tmp_path, "")
    assert (facts["governor"], facts["cpu_model"], facts["core"]) == ("unknown", "unknown", "unknown")
    numbers = ("mhz", "mhz_now", "temp_c", "memory_bytes", "load", "throttled", "busy_s", "steal_s")
    assert {facts[name] for name in numbers} == {None}
    assert facts["features"] == []


def test_facts_of_this_machine_are_json():
    facts = runner.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cores"] >= 1
    assert facts["busy_s"] > 0
    assert facts["arch"] in {"x86_64", "aarch64", "armv7l"}


def test_identity_contains_no_state(tmp_path):
    first = runner.identity(_facts(tmp_path, PI4))
    later = runner.identity(_facts(tmp_path, PI4, {"proc/loadavg": "7 7 7 1/1 1", "sys/class/thermal/thermal_zone0/temp": "80000"}))
    assert first == later
    assert set(first) == {"arch", "cpu_model", "core", "features", "instruction_set", "cores"}


def test_the_harness_is_python_3_9_and_imports_nothing_of_edgekd():
    text = Path(runner.__file__).read_text()
    tree = ast.parse(text, feature_version=(3, 9))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    standard = {name.partition(".")[0] for name in imported} & sys.stdlib_module_names
    assert {name.partition(".")[0] for name in imported} - standard == {"numpy", "onnxruntime", "ai_edge_litert", "tflite_runtime"}


def _model(path, nodes, inputs, outputs, initializers=()):
    def tensors(values):
        return [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in values]

    graph = helper.make_graph(nodes, "g", tensors(inputs), tensors(outputs), list(initializers))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(path))
    return path


@pytest.fixture
def doubling(tmp_path):
    add = helper.make_node("Add", ["x", "x"], ["y"])
    return _model(tmp_path / "m.onnx", [add], [("x", TensorProto.FLOAT, [1, 3])], [("y", TensorProto.FLOAT, [1, 3])])


def _send(*commands):
    """Return the replies of a harness process, and its stderr."""
    text = "".join(json.dumps(command) + "\n" for command in commands)
    process = subprocess.run([sys.executable, runner.__file__], input=text, capture_output=True, text=True, check=True, timeout=120)
    return [json.loads(line) for line in process.stdout.splitlines()], process.stderr


def test_a_session_describes_tensors_and_runs(doubling):
    session = runner.open_session("onnxruntime", doubling, 1)
    assert session.inputs == [{"name": "x", "shape": [1, 3], "dtype": "float32", "scale": None, "zero_point": None}]
    assert session.outputs == [{"name": "y", "shape": [1, 3], "dtype": "float32", "scale": None, "zero_point": None}]
    assert session.run([np.array([[1, 2, 3]], np.float32)])[0].tolist() == [[2, 4, 6]]
    assert session.version.count(".") == 2


def test_a_double_is_a_float64(tmp_path):
    node = helper.make_node("Identity", ["x"], ["y"])
    path = _model(tmp_path / "m.onnx", [node], [("x", TensorProto.DOUBLE, [1])], [("y", TensorProto.DOUBLE, [1])])
    assert runner.open_session("onnxruntime", path, 1).inputs[0]["dtype"] == "float64"


def test_a_process_replies_with_one_line_per_command_and_marks_its_end(doubling):
    replies, _ = _send(
        {"do": "open", "runtime": "onnxruntime", "path": str(doubling), "threads": 1, "inputs": []},
        {"do": "block", "runs": 7, "settle": 2},
        {"do": "stats"},
        {"do": "facts"},
        {"do": "quit"},
        {"do": "block", "runs": 1},
    )
    opened, block, stats, facts, end = replies
    assert len(block["ns"]) == 7
    assert all(isinstance(ns, int) and ns > 0 for ns in block["ns"])
    assert min(opened["load_ns"], opened["first_ns"]) > 0
    assert stats["peak_rss_bytes"] >= opened["rss_before_bytes"] > 2**20
    assert facts["arch"] == runner.facts()["arch"]
    assert end == {"end": True}


def test_samples_of_a_file_are_converted_to_the_input_type_and_cycled(tmp_path):
    cast = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)
    path = _model(tmp_path / "m.onnx", [cast], [("x", TensorProto.INT8, [1, 2])], [("y", TensorProto.FLOAT, [1, 2])])
    model = onnx.load(str(path))
    entry = model.metadata_props.add()
    entry.key, entry.value = "edgekd.edges", json.dumps({"x": {"scale": 0.5, "zero_point": -1}})
    onnx.save(model, str(path))
    np.save(tmp_path / "x.npy", np.array([[1, 2], [-500, 500], [0, 0.3]], np.float32))
    session = runner.open_session("onnxruntime", path, 1)
    samples = runner.samples(session, [tmp_path / "x.npy"], 2)
    assert [sample[0].tolist() for sample in samples] == [[[1, 3]], [[-128, 127]]]
    inputs = []
    session.run = inputs.append
    runner._block({"session": session, "samples": samples, "next": 1}, 3)
    assert [sample[0].tolist() for sample in inputs] == [[[-128, 127]], [[1, 3]], [[-128, 127]]]


def test_settling_runs_are_not_timed(doubling):
    session, inputs = runner.open_session("onnxruntime", doubling, 1), []
    session.run = inputs.append
    state = {"session": session, "samples": [["a"], ["b"], ["c"]], "next": 0}
    reply = runner._reply(state, {"do": "block", "runs": 2, "settle": 3})
    assert len(reply["ns"]) == 2
    assert inputs == [["a"], ["b"], ["c"], ["a"], ["b"]]


def test_random_inputs_are_the_same_each_time(doubling):
    session = runner.open_session("onnxruntime", doubling, 1)
    first, second = runner.samples(session, [], 64), runner.samples(session, [], 64)
    assert len(first) == 16
    assert np.array_equal(first, second)
    assert len({sample[0].tobytes() for sample in first}) == 16


def test_a_broken_litert_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "ai_edge_litert").mkdir()
    (tmp_path / "ai_edge_litert" / "__init__.py").write_text("")
    (tmp_path / "ai_edge_litert" / "interpreter.py").write_text("raise ImportError('libc is too old')")
    process = subprocess.run(
        [sys.executable, "-c", "from edgekd.harness import runner; runner.open_session('litert', 'm.tflite', 1)"],
        capture_output=True, text=True, check=False, env={"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert process.stderr.splitlines()[-1] == "ImportError: libc is too old"
