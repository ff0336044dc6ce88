# SPDX-License-Identifier: Apache-2.0
"""The one file that is shipped to a device: facts, a loaded model, and a measuring loop that speaks JSON lines.

Standard library, numpy and one runtime; imports nothing of edgekd; Python 3.9.

As a program it reads commands from stdin, one JSON object a line, and answers each with one line on stdout:
``open`` {runtime, path, threads, inputs, samples}, ``block`` {runs, settle} -> {"ns": [...]}, ``stats``, ``facts``, ``quit``.
``settle`` runs at the start of a block are not timed. The answer to ``quit`` is {"end": true}, the mark of a whole answer.
One inference is: inputs set, model invoked, outputs readable. Its time is wall time in integer nanoseconds.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time

PARTS = """
0xd03 cortex-a53  0xd04 cortex-a35  0xd05 cortex-a55  0xd07 cortex-a57  0xd08 cortex-a72  0xd09 cortex-a73  0xd0a cortex-a75
0xd0b cortex-a76  0xd0c neoverse-n1 0xd0d cortex-a77  0xd41 cortex-a78  0xd44 cortex-x1   0xd46 cortex-a510 0xd47 cortex-a710
0xd48 cortex-x2   0xd4d cortex-a715 0xd4e cortex-x3   0xd80 cortex-a520 0xd81 cortex-a720 0xd82 cortex-x4
"""
ARM_CORES = dict(zip(PARTS.split()[::2], PARTS.split()[1::2]))
ARM = "0x41"  # the implementer whose parts those are
CPUFREQ = "sys/devices/system/cpu/cpu%d/cpufreq/"
# psABI levels, by the flags of /proc/cpuinfo (x86-64 psABI supplement, table 3.1)
X86_LEVELS = (
    (2, {"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"}),
    (3, {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}),
    (4, {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
)


def facts(root="/"):
    """Return what this machine is, from files alone; what cannot be read is "unknown", or None for a number."""
    processor = _cpuinfo(root)
    arch = processor["arch"]
    features = sorted(set((processor.get("flags") or processor.get("Features") or "").split()))
    cores = processor["cores"] or os.cpu_count() or 1
    board = _read(root, "proc/device-tree/model", "").strip("\0\n ") or processor.get("Model")
    told = re.search(r"@ ([0-9.]+)GHz", processor.get("model name", ""))
    told_mhz = round(float(told.group(1)) * 1000) if told else None
    busy_s, steal_s = _processor_seconds(root)
    storage = os.statvfs(root)
    return {
        "arch": arch,
        "cpu_model": board or processor.get("model name") or processor.get("Hardware") or "unknown",
        "core": _core(arch, processor),
        "features": features,
        "instruction_set": instruction_set(arch, features),
        "cores": min(cores, len(os.sched_getaffinity(0))) if root == "/" else cores,
        "mhz": _mhz(root, cores, "cpuinfo_max_freq") or told_mhz,  # a momentary clock is no fact of the machine
        "memory_bytes": _memory_bytes(os.path.join(root, "proc/meminfo"), "MemTotal"),
        "storage_bytes": storage.f_blocks * storage.f_frsize,  # the size, not what is free: a fact, not a state
        "kernel": platform.release(),
        "libc": "-".join(filter(None, platform.libc_ver())) or "unknown",
        "python": platform.python_version(),
        "governor": "+".join(sorted({_read(root, CPUFREQ % cpu + "scaling_governor", "unknown").strip() for cpu in (0, cores - 1)})),
        "temp_c": _temp_c(root),
        "throttled": _throttled(root),
        "load": _number(_read(root, "proc/loadavg", "").partition(" ")[0]),
        "mhz_now": _mhz(root, cores, "scaling_cur_freq") or _number(processor.get("cpu MHz", "")),
        "busy_s": busy_s,
        "steal_s": steal_s,
    }


def identity(found):
    """Return the facts that identify a machine; its load, clock and temperature do not, nor does a kernel's patch level."""
    return {key: found[key] for key in ("arch", "cpu_model", "core", "features", "instruction_set", "cores")}


def instruction_set(arch, features):
    """Return the name of an instruction set as accuracies carry it."""
    have = set(features)
    if arch == "x86_64":
        level = 1
        for number, needed in X86_LEVELS:
            if not needed <= have:
                break
            level = number
        name = "x86-64-v%d" % level
        marks = [("avx512_vnni", "vnni"), ("avx_vnni", "avxvnni")]
    else:
        name = arch
        marks = [("asimddp", "asimddp"), ("i8mm", "i8mm")]
    return "+".join([name, *(mark for flag, mark in marks if flag in have)])


def _read(root, path, missing):
    try:
        with open(os.path.join(root, path), encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return missing


def _cpuinfo(root):
    """Return the fields of the last processor: on big.LITTLE the last is a big core."""
    found, cores = {}, 0
    for line in _read(root, "proc/cpuinfo", "").splitlines():
        key, _, value = line.partition(":")
        key, value = key.strip(), value.strip()
        cores += key == "processor"
        if key:
            found[key] = value
    found["cores"] = cores
    if root != "/":
        found["arch"] = "x86_64" if "flags" in found else "aarch64" if "asimd" in found.get("Features", "") else "armv7l"
    else:  # what this process can load decides: a 32-bit system may run on a 64-bit kernel
        machine = platform.machine()
        found["arch"] = "armv7l" if machine == "aarch64" and sys.maxsize < 2**32 else machine
    return found


def _core(arch, processor):
    if arch == "x86_64":
        return "-".join(processor.get(key, "unknown") for key in ("vendor_id", "cpu family", "model"))
    implementer, part = processor.get("CPU implementer", ARM), processor.get("CPU part")
    if implementer == ARM and part in ARM_CORES:
        return ARM_CORES[part]
    return f"{implementer}-{part}" if part else "unknown"


def _mhz(root, cores, name):
    """Return a clock of the last core from the kernel's frequency driver."""
    khz = _number(_read(root, CPUFREQ % (cores - 1) + name, ""))
    return None if khz is None else round(khz / 1000)


def _number(text):
    try:
        return float(text)
    except ValueError:
        return None


def _memory_bytes(path, key):
    """Return a size that a file of /proc tells in kB, or None."""
    found = re.search("^%s:\\s+([0-9]+) kB" % key, _read("", path, ""), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def _temp_c(root):
    """Return the hottest of the zones that are named after a processor, else the first zone."""
    folder = os.path.join(root, "sys/class/thermal")
    zones = sorted(name for name in (os.listdir(folder) if os.path.isdir(folder) else ()) if name.startswith("thermal_zone"))
    named = [zone for zone in zones if any(word in _read(folder, zone + "/type", "").lower() for word in ("cpu", "soc", "x86_pkg"))]
    read = [_number(_read(folder, zone + "/temp", "")) for zone in named or zones[:1]]
    return max((value / 1000 for value in read if value is not None), default=None)


def _throttled(root):
    """Return the firmware's flags (Raspberry Pi: bits 0-3 now, 16-19 since the start) or the package's count (x86), or None."""
    flags = _read(root, "sys/devices/platform/soc/soc:firmware/get_throttled", "").strip()
    count = _read(root, "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count", "").strip()
    return int(flags, 16) if flags else int(count) if count else None


def _processor_seconds(root):
    """Return how long all cores together have worked since the start, and how long a hypervisor kept them from it."""
    ticks = [int(text) / os.sysconf("SC_CLK_TCK") for text in _read(root, "proc/stat", "").partition("\n")[0].split()[1:]]
    if not ticks:
        return None, None
    user, nice, system, _idle, _wait, irq, softirq, steal = ticks[:8]
    return user + nice + system + irq + softirq, steal


class Session:
    """A loaded model, one sample at a time. ``inputs`` and ``outputs`` describe the tensors in the file's order."""

    def __init__(self, version, inputs, outputs, run):
        self.version, self.inputs, self.outputs, self.run = version, inputs, outputs, run


def open_session(runtime, path, threads, options=None):
    """Load a model file; ``run(list of arrays) -> list of arrays``. ImportError if the runtime is missing, else what it raises."""
    return OPENERS[runtime](str(path), threads, options or {})


def _open_onnxruntime(path, threads, options):
    import onnxruntime as ort

    ort.set_default_logger_severity(3)
    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    for key, value in options.items():
        settings.add_session_config_entry(key, str(value))
    session = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    dtypes = {"tensor(float)": "float32", "tensor(double)": "float64"}
    edges = json.loads(session.get_modelmeta().custom_metadata_map.get("edgekd.edges", "{}"))  # ONNX has no place for scales

    def describe(item):
        dtype = dtypes.get(item.type, item.type[len("tensor(") : -1])
        shape = [size if isinstance(size, int) else 1 for size in item.shape]
        return {"name": item.name, "shape": shape, "dtype": dtype, **edges.get(item.name, {"scale": None, "zero_point": None})}

    def run(arrays):
        return session.run(None, dict(zip(names, arrays)))

    return Session(ort.__version__, [describe(i) for i in session.get_inputs()], [describe(o) for o in session.get_outputs()], run)


def _litert():
    """Return the interpreter and its release, of ai-edge-litert or else of tflite-runtime; a broken one is not passed over."""
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("ai_edge_litert"):
            raise
    else:
        from importlib.metadata import version

        return Interpreter, "ai-edge-litert " + version("ai-edge-litert")
    import tflite_runtime
    from tflite_runtime.interpreter import Interpreter

    return Interpreter, "tflite-runtime " + tflite_runtime.__version__


def _open_litert(path, threads, options):
    import numpy as np

    make, release = _litert()
    interpreter = make(model_path=path, num_threads=threads, **options)
    interpreter.allocate_tensors()
    inputs = sorted(interpreter.get_input_details(), key=_tensor_order)
    outputs = interpreter.get_output_details()
    sets = [item["index"] for item in inputs]
    gets = [item["index"] for item in outputs]
    casts = [np.dtype(item["dtype"]) for item in inputs]  # the exporter narrows int64 inputs to int32; a float stays an error

    def describe(item):
        scale, zero_point = item["quantization"]
        return {
            "name": item["name"],
            "shape": [int(size) for size in item["shape"]],
            "dtype": np.dtype(item["dtype"]).name,
            "scale": float(scale) or None,
            "zero_point": int(zero_point) if scale else None,
        }

    def run(arrays):
        for index, array, cast in zip(sets, arrays, casts):
            interpreter.set_tensor(index, array.astype(cast) if array.dtype != cast and array.dtype.kind == cast.kind == "i" else array)
        interpreter.invoke()
        return [interpreter.get_tensor(index) for index in gets]

    return Session(release, [describe(item) for item in inputs], [describe(item) for item in outputs], run)


def _tensor_order(item):
    """Order inputs as the exporter numbered them (``serving_default_args_1:0``); others keep their place."""
    digits = "".join(c for c in item["name"].rsplit("args_", 1)[-1].split(":")[0] if c.isdigit()) if "args_" in item["name"] else ""
    return int(digits) if digits else item["index"]


OPENERS = {"onnxruntime": _open_onnxruntime, "litert": _open_litert}


IMPORTERS = {"onnxruntime": lambda: __import__("onnxruntime"), "litert": _litert}
PEAK = "/proc/self/status", "VmHWM"  # the peak resident memory of this process
MAX_SAMPLES = 64  # that are cycled; more would only fill memory


def _samples(session, paths, count):
    """Return samples: the first of .npy files (one an input, leading sample axis), else random ones from a fixed seed."""
    import numpy as np

    if paths:
        arrays = [np.array(np.load(path, mmap_mode="r", allow_pickle=False)[:count]) for path in paths]
        arrays = [_as_wanted(np, array, item) for array, item in zip(arrays, session.inputs)]
        return [[np.ascontiguousarray(array[row : row + 1]) for array in arrays] for row in range(len(arrays[0]))]
    made = np.random.default_rng(0)
    samples = []
    for _ in range(min(count, 16)):
        row = []
        for item in session.inputs:
            if item["dtype"].startswith("float"):
                row.append(made.standard_normal(item["shape"]).astype(item["dtype"]))
            else:  # small integers are valid for token ids and for quantized inputs alike
                row.append(made.integers(0, 2, item["shape"]).astype(item["dtype"]))
        samples.append(row)
    return samples


def _as_wanted(np, array, item):
    if item["dtype"] == array.dtype.name or item["scale"] is None:
        return array.astype(item["dtype"])
    limits = np.iinfo(item["dtype"])
    return np.clip(np.round(array / item["scale"]) + item["zero_point"], limits.min, limits.max).astype(item["dtype"])


def serve(stdin, stdout):
    """Answer commands until ``quit`` or the end of input."""
    state = {}
    for line in stdin:
        command = json.loads(line)
        stdout.write(json.dumps(_answer(state, command)) + "\n")
        stdout.flush()
        if command["do"] == "quit":
            break


def _answer(state, command):
    if command["do"] == "open":
        return _open(state, command)
    if command["do"] == "block":
        _block(state, command.get("settle", 0))
        return {"ns": _block(state, command["runs"])}
    return {"stats": {"peak_rss_bytes": _memory_bytes(*PEAK)}, "facts": facts(), "quit": {"end": True}}[command["do"]]


def _open(state, command):
    import numpy as np  # noqa: F401  (no part of loading, as the runtime's import)

    IMPORTERS[command["runtime"]]()
    before = _memory_bytes(*PEAK)
    started = time.perf_counter_ns()
    session = open_session(command["runtime"], command["path"], command["threads"])
    load_ns = time.perf_counter_ns() - started
    state.update(session=session, samples=_samples(session, command.get("inputs"), command.get("samples", MAX_SAMPLES)), next=0)
    first_ns = _block(state, 1)[0]
    return {"load_ns": load_ns, "first_ns": first_ns, "version": session.version, "rss_before_bytes": before}


def _block(state, runs):
    run, samples, start = state["session"].run, state["samples"], state["next"]
    clock, count, times = time.perf_counter_ns, len(state["samples"]), []
    for index in range(start, start + runs):
        sample = samples[index % count]
        begun = clock()
        run(sample)
        times.append(clock() - begun)
    state["next"] = start + runs
    return times


if __name__ == "__main__":
    # chatter of native libraries goes to stderr; answers alone go to the real stdout
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, answers)
