# SPDX-License-Identifier: Apache-2.0
"""The one file that is shipped to a device: facts, a loaded model, and a measuring loop that speaks JSON lines.

Standard library, numpy and one runtime; imports nothing of edgekd; Python 3.9.

As a program it reads commands from stdin, one JSON object a line, and answers each with one line on stdout:
``open`` {runtime, path, threads, inputs}, ``warmup`` {runs}, ``block`` {runs} -> {"ns": [...]}, ``stats``, ``quit``.
One inference is: inputs set, model invoked, outputs readable. Its time is wall time in integer nanoseconds.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time

ARM_CORES = {
    "0xd03": "cortex-a53",
    "0xd04": "cortex-a35",
    "0xd05": "cortex-a55",
    "0xd07": "cortex-a57",
    "0xd08": "cortex-a72",
    "0xd09": "cortex-a73",
    "0xd0a": "cortex-a75",
    "0xd0b": "cortex-a76",
    "0xd0c": "neoverse-n1",
    "0xd0d": "cortex-a77",
    "0xd41": "cortex-a78",
    "0xd44": "cortex-x1",
    "0xd46": "cortex-a510",
    "0xd47": "cortex-a710",
    "0xd48": "cortex-x2",
    "0xd4d": "cortex-a715",
    "0xd4e": "cortex-x3",
}
# psABI levels, by the flags of /proc/cpuinfo (x86-64 psABI supplement, table 3.1)
X86_LEVELS = (
    (2, {"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"}),
    (3, {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}),
    (4, {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
)


def facts(root="/"):
    """Return what this machine is, from files alone; what cannot be read is "unknown", or None for a number."""
    processor = _cpuinfo(root)
    arch = processor.get("arch") or platform.machine()
    features = sorted(set((processor.get("flags") or processor.get("Features") or "").split()))
    core = ARM_CORES.get(processor.get("CPU part", ""), "unknown")
    if arch == "x86_64":
        core = "-".join(processor.get(key, "unknown") for key in ("vendor_id", "cpu family", "model"))
    return {
        "arch": arch,
        "cpu_model": processor.get("model name") or _read(root, "proc/device-tree/model", "unknown").strip("\0"),
        "core": core,
        "features": features,
        "instruction_set": instruction_set(arch, features),
        "cores": processor.get("cores") or os.cpu_count() or 1,
        "mhz": _mhz(root, processor),
        "memory_bytes": _memory_bytes(root),
        "storage_bytes": _storage_bytes(root),
        "kernel": platform.release(),
        "libc": "-".join(platform.libc_ver()) or "unknown",
        "python": platform.python_version(),
        "governor": _read(root, "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "unknown").strip(),
        "temp_c": _temp_c(root),
        "load": _load(root),
    }


def identity(found):
    """Return the facts that identify a machine; its load, clock and temperature do not."""
    return {key: found[key] for key in ("arch", "cpu_model", "core", "features", "instruction_set", "cores", "kernel", "libc")}


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
    found["cores"] = cores or None
    if root != "/":
        found["arch"] = "x86_64" if "flags" in found else "aarch64" if "asimd" in found.get("Features", "") else "armv7l"
    return found


def _mhz(root, processor):
    khz = _read(root, "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq", "").strip()
    if khz.isdigit():
        return int(khz) // 1000
    try:
        return round(float(processor["cpu MHz"]))
    except (KeyError, ValueError):
        return None


def _memory_bytes(root):
    for line in _read(root, "proc/meminfo", "").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return None


def _storage_bytes(root):
    try:
        stat = os.statvfs(root)
    except OSError:
        return None
    return stat.f_blocks * stat.f_frsize  # the size, not what is free: a fact, not a state


def _temp_c(root):
    text = _read(root, "sys/class/thermal/thermal_zone0/temp", "").strip()
    return int(text) / 1000 if text.lstrip("-").isdigit() else None


def _load(root):
    text = _read(root, "proc/loadavg", "").split()
    return float(text[0]) if text else None


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
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    for key, value in options.items():
        settings.add_session_config_entry(key, str(value))
    session = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    dtypes = {"tensor(float)": "float32"}
    edges = json.loads(session.get_modelmeta().custom_metadata_map.get("edgekd.edges", "{}"))  # ONNX has no place for scales

    def describe(item):
        dtype = dtypes.get(item.type, item.type[len("tensor(") : -1])
        shape = [size if isinstance(size, int) else 1 for size in item.shape]
        return {"name": item.name, "shape": shape, "dtype": dtype, **edges.get(item.name, {"scale": None, "zero_point": None})}

    def run(arrays):
        return session.run(None, dict(zip(names, arrays)))

    return Session(ort.__version__, [describe(i) for i in session.get_inputs()], [describe(o) for o in session.get_outputs()], run)


def _open_litert(path, threads, options):
    try:
        from importlib.metadata import version

        from ai_edge_litert.interpreter import Interpreter

        release = "ai-edge-litert " + version("ai-edge-litert")
    except ImportError:
        import tflite_runtime
        from tflite_runtime.interpreter import Interpreter

        release = "tflite-runtime " + tflite_runtime.__version__
    import numpy as np

    interpreter = Interpreter(model_path=path, num_threads=threads, **options)
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


def _samples(session, paths):
    """Return up to 64 samples: the first of .npy files (one an input, leading sample axis), else random ones."""
    import numpy as np

    if paths:
        arrays = [np.array(np.load(path, mmap_mode="r", allow_pickle=False)[:64]) for path in paths]
        arrays = [_as_wanted(np, array, item) for array, item in zip(arrays, session.inputs)]
        return [[np.ascontiguousarray(array[row : row + 1]) for array in arrays] for row in range(len(arrays[0]))]
    made = np.random.default_rng(0)
    samples = []
    for _ in range(16):
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


def peak_rss_bytes():
    """Return the peak resident memory of this process (VmHWM), or None."""
    for line in _read("/", "proc/self/status", "").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def serve(stdin, stdout):
    """Answer commands until ``quit`` or the end of input."""
    state = {}
    for line in stdin:
        command = json.loads(line)
        if command["do"] == "quit":
            break
        answer = COMMANDS[command["do"]](state, command)
        stdout.write(json.dumps(answer) + "\n")
        stdout.flush()


def _do_open(state, command):
    import numpy as np  # noqa: F401  (so that its import is not counted as loading)

    before = peak_rss_bytes()
    started = time.perf_counter_ns()
    session = open_session(command["runtime"], command["path"], command["threads"])
    load_ns = time.perf_counter_ns() - started
    state.update(session=session, samples=_samples(session, command.get("inputs")), next=0)
    first_ns = _block(state, 1)[0]
    return {"load_ns": load_ns, "first_ns": first_ns, "version": session.version, "rss_before_bytes": before}


def _do_block(state, command):
    return {"ns": _block(state, command["runs"])}


def _do_stats(state, command):
    return {"peak_rss_bytes": peak_rss_bytes()}


def _do_facts(state, command):
    return facts()


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


COMMANDS = {"open": _do_open, "block": _do_block, "stats": _do_stats, "facts": _do_facts}


if __name__ == "__main__":
    # chatter of native libraries goes to stderr; answers alone go to the real stdout
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, answers)
