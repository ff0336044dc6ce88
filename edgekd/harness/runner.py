# SPDX-License-Identifier: Apache-2.0
"""The one file that is shipped to a device: facts of the machine, model sessions, and a measuring loop controlled by JSON lines.

It needs the standard library, numpy and one runtime, imports nothing of edgekd, and runs on Python 3.9.

As a program it reads commands from stdin, one JSON object per line, and replies to each with one line on stdout:
``open`` {runtime, path, threads, inputs, samples}, ``block`` {runs, settle} -> {"ns": [...]}, ``stats``, ``facts``, ``quit``.
``settle`` runs at the start of a block are not timed. The reply to ``quit`` is {"end": true}, which marks complete output.
One inference is: set the inputs, invoke the model, make the outputs readable. Its time is wall time in integer nanoseconds.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time

ARM_PARTS = """
0xd03 cortex-a53  0xd04 cortex-a35  0xd05 cortex-a55  0xd07 cortex-a57  0xd08 cortex-a72  0xd09 cortex-a73  0xd0a cortex-a75
0xd0b cortex-a76  0xd0c neoverse-n1 0xd0d cortex-a77  0xd41 cortex-a78  0xd44 cortex-x1   0xd46 cortex-a510 0xd47 cortex-a710
0xd48 cortex-x2   0xd4d cortex-a715 0xd4e cortex-x3   0xd80 cortex-a520 0xd81 cortex-a720 0xd82 cortex-x4
"""
ARM_CORES = dict(zip(ARM_PARTS.split()[::2], ARM_PARTS.split()[1::2]))
ARM_IMPLEMENTER = "0x41"  # of these parts
CPUFREQ = "sys/devices/system/cpu/cpu%d/cpufreq/"
# psABI levels, by the flags of /proc/cpuinfo (x86-64 psABI supplement, table 3.1)
X86_LEVELS = (
    (2, {"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"}),
    (3, {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}),
    (4, {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
)


def facts(root="/"):
    """Return the facts of this machine, read from files; a text that cannot be read is "unknown", a number None."""
    cpuinfo = _cpuinfo(root)
    arch = cpuinfo["arch"]
    features = sorted(set((cpuinfo.get("flags") or cpuinfo.get("Features") or "").split()))
    cores = cpuinfo["cores"] or os.cpu_count() or 1
    board = _read(root, "proc/device-tree/model", "").strip("\0\n ") or cpuinfo.get("Model")
    nominal = re.search(r"@ ([0-9.]+)GHz", cpuinfo.get("model name", ""))
    nominal_mhz = round(float(nominal.group(1)) * 1000) if nominal else None
    busy_s, steal_s = _cpu_seconds(root)
    storage = os.statvfs(root)
    return {
        "arch": arch,
        "cpu_model": board or cpuinfo.get("model name") or cpuinfo.get("Hardware") or "unknown",
        "core": _core(arch, cpuinfo),
        "features": features,
        "instruction_set": instruction_set(arch, features),
        "cores": min(cores, len(os.sched_getaffinity(0))) if root == "/" else cores,
        "mhz": _mhz(root, cores, "cpuinfo_max_freq") or nominal_mhz,  # not the momentary clock: that is a state
        "memory_bytes": _memory_bytes(os.path.join(root, "proc/meminfo"), "MemTotal"),
        "storage_bytes": storage.f_blocks * storage.f_frsize,  # the size, not the free space: that is a state
        "kernel": platform.release(),
        "libc": "-".join(filter(None, platform.libc_ver())) or "unknown",
        "python": platform.python_version(),
        "governor": "+".join(sorted({_read(root, CPUFREQ % cpu + "scaling_governor", "unknown").strip() for cpu in (0, cores - 1)})),
        "temp_c": _temp_c(root),
        "throttled": _throttled(root),
        "load": _number(_read(root, "proc/loadavg", "").partition(" ")[0]),
        "mhz_now": _mhz(root, cores, "scaling_cur_freq") or _number(cpuinfo.get("cpu MHz", "")),
        "busy_s": busy_s,
        "steal_s": steal_s,
    }


def identity(machine):
    """Return the facts that identify a machine: not its load, clock, temperature or kernel version."""
    return {key: machine[key] for key in ("arch", "cpu_model", "core", "features", "instruction_set", "cores")}


def instruction_set(arch, features):
    """Return the name of an instruction set, as reports print it beside accuracies."""
    features = set(features)
    if arch == "x86_64":
        level = 1
        for number, needed in X86_LEVELS:
            if not needed <= features:
                break
            level = number
        name = "x86-64-v%d" % level
        marks = [("avx512_vnni", "vnni"), ("avx_vnni", "avxvnni")]
    else:
        name = arch
        marks = [("asimddp", "asimddp"), ("i8mm", "i8mm")]
    return "+".join([name, *(mark for flag, mark in marks if flag in features)])


def _read(root, path, missing):
    try:
        with open(os.path.join(root, path), encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return missing


def _cpuinfo(root):
    """Return the fields of the last core, a big one on big.LITTLE, and the architecture and number of cores."""
    fields, cores = {}, 0
    for line in _read(root, "proc/cpuinfo", "").splitlines():
        key, _, value = line.partition(":")
        key, value = key.strip(), value.strip()
        cores += key == "processor"
        if key:
            fields[key] = value
    fields["cores"] = cores
    if root != "/":
        fields["arch"] = "x86_64" if "flags" in fields else "aarch64" if "asimd" in fields.get("Features", "") else "armv7l"
    else:  # that of this process: a 32-bit system may run on a 64-bit kernel
        machine = platform.machine()
        fields["arch"] = "armv7l" if machine == "aarch64" and sys.maxsize < 2**32 else machine
    return fields


def _core(arch, cpuinfo):
    if arch == "x86_64":
        return "-".join(cpuinfo.get(key, "unknown") for key in ("vendor_id", "cpu family", "model"))
    implementer, part = cpuinfo.get("CPU implementer", ARM_IMPLEMENTER), cpuinfo.get("CPU part")
    if implementer == ARM_IMPLEMENTER and part in ARM_CORES:
        return ARM_CORES[part]
    return f"{implementer}-{part}" if part else "unknown"


def _mhz(root, cores, name):
    """Return a clock of the last core from the kernel's frequency driver, or None."""
    khz = _number(_read(root, CPUFREQ % (cores - 1) + name, ""))
    return None if khz is None else round(khz / 1000)


def _number(text):
    try:
        return float(text)
    except ValueError:
        return None


def _memory_bytes(path, key):
    """Return a size that a file of /proc states in kB, or None."""
    match = re.search("^%s:\\s+([0-9]+) kB" % key, _read("", path, ""), re.MULTILINE)
    return int(match.group(1)) * 1024 if match else None


def _temp_c(root):
    """Return the highest temperature of the zones that are named after a CPU, else that of the first zone."""
    folder = os.path.join(root, "sys/class/thermal")
    zones = sorted(name for name in (os.listdir(folder) if os.path.isdir(folder) else ()) if name.startswith("thermal_zone"))
    named = [zone for zone in zones if any(word in _read(folder, zone + "/type", "").lower() for word in ("cpu", "soc", "x86_pkg"))]
    temperatures = [_number(_read(folder, zone + "/temp", "")) for zone in named or zones[:1]]
    return max((value / 1000 for value in temperatures if value is not None), default=None)


def _throttled(root):
    """Return the firmware's flags (Raspberry Pi: bits 0-3 now, 16-19 since boot) or the count of the package (x86), or None."""
    flags = _read(root, "sys/devices/platform/soc/soc:firmware/get_throttled", "").strip()
    count = _read(root, "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count", "").strip()
    return int(flags, 16) if flags else int(count) if count else None


def _cpu_seconds(root):
    """Return the busy seconds of all cores since boot, and the seconds that a hypervisor took from them (steal)."""
    ticks = [int(text) / os.sysconf("SC_CLK_TCK") for text in _read(root, "proc/stat", "").partition("\n")[0].split()[1:]]
    if not ticks:
        return None, None
    user, nice, system, _idle, _wait, irq, softirq, steal = ticks[:8]
    return user + nice + system + irq + softirq, steal


class Session:
    """A loaded model that runs one sample at a time. ``inputs`` and ``outputs`` describe the tensors in the file's order."""

    def __init__(self, version, inputs, outputs, run):
        self.version, self.inputs, self.outputs, self.run = version, inputs, outputs, run


def open_session(runtime, path, threads, options=None):
    """Load a model file; ``run(list of arrays) -> list of arrays``. ImportError if the runtime is missing, else its own errors."""
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
    quantization = json.loads(session.get_modelmeta().custom_metadata_map.get("edgekd.edges", "{}"))  # no field in ONNX

    def describe(item):
        dtype = dtypes.get(item.type, item.type[len("tensor(") : -1])
        shape = [size if isinstance(size, int) else 1 for size in item.shape]
        return {"name": item.name, "shape": shape, "dtype": dtype, **quantization.get(item.name, {"scale": None, "zero_point": None})}

    def run(arrays):
        return session.run(None, dict(zip(names, arrays)))

    return Session(ort.__version__, [describe(i) for i in session.get_inputs()], [describe(o) for o in session.get_outputs()], run)


def _litert():
    """Return the interpreter and its version, of ai-edge-litert or else of tflite-runtime; a broken ai-edge-litert is an error."""
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

    interpreter_class, version = _litert()
    interpreter = interpreter_class(model_path=path, num_threads=threads, **options)
    interpreter.allocate_tensors()
    inputs = sorted(interpreter.get_input_details(), key=_tensor_order)
    outputs = interpreter.get_output_details()
    input_indices = [item["index"] for item in inputs]
    output_indices = [item["index"] for item in outputs]
    dtypes = [np.dtype(item["dtype"]) for item in inputs]  # int64 inputs become int32 at export; floats are not cast

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
        for index, array, dtype in zip(input_indices, arrays, dtypes):
            interpreter.set_tensor(index, array.astype(dtype) if array.dtype != dtype and array.dtype.kind == dtype.kind == "i" else array)
        interpreter.invoke()
        return [interpreter.get_tensor(index) for index in output_indices]

    return Session(version, [describe(item) for item in inputs], [describe(item) for item in outputs], run)


def _tensor_order(item):
    """Return the sort key of an input: its number from the exporter (``serving_default_args_1:0``), else its index."""
    digits = "".join(c for c in item["name"].rsplit("args_", 1)[-1].split(":")[0] if c.isdigit()) if "args_" in item["name"] else ""
    return int(digits) if digits else item["index"]


OPENERS = {"onnxruntime": _open_onnxruntime, "litert": _open_litert}
IMPORTERS = {"onnxruntime": lambda: __import__("onnxruntime"), "litert": _litert}
PEAK_RSS = "/proc/self/status", "VmHWM"  # of this process
MAX_SAMPLES = 64  # a block cycles through them; more would only use memory


def samples(session, paths, count):
    """Return the first samples of .npy files (one file per input, samples on axis 0), else random ones from a fixed seed."""
    import numpy as np

    if paths:
        arrays = [np.array(np.load(path, mmap_mode="r", allow_pickle=False)[:count]) for path in paths]
        arrays = [to_input_type(np, array, item) for array, item in zip(arrays, session.inputs)]
        return [[np.ascontiguousarray(array[row : row + 1]) for array in arrays] for row in range(len(arrays[0]))]
    generator = np.random.default_rng(0)
    samples = []
    for _ in range(min(count, 16)):
        row = []
        for item in session.inputs:
            if item["dtype"].startswith("float"):
                row.append(generator.standard_normal(item["shape"]).astype(item["dtype"]))
            else:  # small integers are valid token ids and valid quantized inputs
                row.append(generator.integers(0, 2, item["shape"]).astype(item["dtype"]))
        samples.append(row)
    return samples


def to_input_type(np, array, item):
    """Return an array as an input of a model file takes it: quantized by the tensor's scale and zero point where it has them."""
    if item["dtype"] == array.dtype.name or item["scale"] is None:
        return array.astype(item["dtype"])
    limits = np.iinfo(item["dtype"])
    return np.clip(np.round(array / item["scale"]) + item["zero_point"], limits.min, limits.max).astype(item["dtype"])


def serve(stdin, stdout):
    """Reply to commands until ``quit`` or the end of the input."""
    state = {}
    for line in stdin:
        command = json.loads(line)
        stdout.write(json.dumps(_reply(state, command)) + "\n")
        stdout.flush()
        if command["do"] == "quit":
            break


def _reply(state, command):
    if command["do"] == "open":
        return _open(state, command)
    if command["do"] == "block":
        _block(state, command.get("settle", 0))
        return {"ns": _block(state, command["runs"])}
    return {"stats": {"peak_rss_bytes": _memory_bytes(*PEAK_RSS)}, "facts": facts(), "quit": {"end": True}}[command["do"]]


def _open(state, command):
    import numpy as np  # noqa: F401  (imported before the load time is measured, as is the runtime)

    IMPORTERS[command["runtime"]]()
    rss_before_bytes = _memory_bytes(*PEAK_RSS)
    started = time.perf_counter_ns()
    session = open_session(command["runtime"], command["path"], command["threads"])
    load_ns = time.perf_counter_ns() - started
    state.update(session=session, samples=samples(session, command.get("inputs"), command.get("samples", MAX_SAMPLES)), next=0)
    first_ns = _block(state, 1)[0]
    return {"load_ns": load_ns, "first_ns": first_ns, "version": session.version, "rss_before_bytes": rss_before_bytes}


def _block(state, runs):
    run, samples, start = state["session"].run, state["samples"], state["next"]
    clock, count, times_ns = time.perf_counter_ns, len(samples), []
    for index in range(start, start + runs):
        sample = samples[index % count]
        started = clock()
        run(sample)
        times_ns.append(clock() - started)
    state["next"] = start + runs
    return times_ns


if __name__ == "__main__":
    # output of native libraries goes to stderr; only replies go to the real stdout
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, replies)
