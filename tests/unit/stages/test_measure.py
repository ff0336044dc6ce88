# SPDX-License-Identifier: Apache-2.0
"""Measure: the job that a device gets, the Measurement made of its output, and the notes; on a scripted device."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from edgekd import config, registry
from edgekd.domain.device import DeviceSpec
from edgekd.domain.target import Protocol
from edgekd.errors import HarnessError, StageError, UsageError
from edgekd.stages import measure
from edgekd.store import locks
from edgekd.store.digests import file_digest

PROTOCOL = Protocol(warmup_runs=20, min_runs=4, min_seconds=2.0)
QUIET = {
    "arch": "aarch64", "cores": 2, "governor": "performance", "temp_c": 50.0, "throttled": 0, "load": 0.1, "busy_s": 100.0, "steal_s": 1.0,
}  # fmt: skip
UNREADABLE = {**QUIET, "governor": "unknown", "temp_c": None, "throttled": None, "load": None, "busy_s": None, "steal_s": None}


class Scripted:
    """A device that stores its job and returns the same output for each subject."""

    kind = "scripted"

    def __init__(self, blocks=((5, 6), (7, 8)), fails=None):
        self.blocks, self.fails, self.job, self.shared_waits = blocks, fails, None, None

    def lease(self, on_wait):
        return locks.machine_exclusive(on_wait)

    def measure(self, job, progress):
        self.job, self.shared_waits = job, _shared_waits()
        if self.fails:
            raise self.fails
        raw = {"blocks_ns": [list(block) for block in self.blocks], "rounds": [1, 1], "load_ns": 1, "first_ns": 2, "version": "9.9"}
        subjects = {subject["id"]: {**raw, "peak_rss_bytes": 30, "rss_before_bytes": 20} for subject in job["subjects"]}
        return {"subjects": subjects, "before": QUIET, "after": {**QUIET, "busy_s": 110.0}, "seconds": 10.0, "cpu_s": 9.9}


def _shared_waits():
    program = "import os; from edgekd.store import locks\nwith locks.machine_shared(lambda _: os._exit(7)): pass"
    return subprocess.run([sys.executable, "-c", program], check=False).returncode == 7


@pytest.fixture(autouse=True)
def _scripted_devices(monkeypatch):
    """A scripted device returns the interleaver's output."""
    real = measure.interleaver.measure

    def run(job, connection, progress):
        return connection.measure(job, progress) if isinstance(connection, Scripted) else real(job, connection, progress)

    monkeypatch.setattr(measure.interleaver, "measure", run)


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "m.tflite"
    path.write_bytes(b"a model")
    return path


def _measure(device, subjects, protocol=PROTOCOL, **keywords):
    return measure.measure(subjects, protocol, device, lambda share, text: None, **keywords)


def test_the_job_that_a_device_gets(model):
    device = Scripted()
    subjects = [measure.Subject("teacher", "litert", model, 1, [Path("x.npy")]), measure.Subject("teacher", "litert", model, 4)]
    _measure(device, subjects)
    first, second = device.job["subjects"]
    assert first == {"id": "teacher on litert, 1 thread", "runtime": "litert", "path": str(model), "threads": 1, "inputs": ["x.npy"]}
    assert (second["id"], second["threads"], second["inputs"]) == ("teacher on litert, 4 threads", 4, [])
    assert device.job["protocol"] == {"warmup_runs": 20, "min_runs": 4, "min_seconds": 2.0}
    assert device.job["generations"] == 3
    assert device.job["max_seconds"] > 0


def test_the_measurement_holds_the_output_of_the_device(model):
    (measurement,) = _measure(Scripted(), [measure.Subject("a/candidate", "litert", model, 4)])
    assert (measurement.subject, measurement.runtime, measurement.runtime_version, measurement.threads) == (
        "a/candidate",
        "litert",
        "9.9",
        4,
    )
    assert measurement.model_digest == file_digest(model)
    assert measurement.blocks_ns == ((5, 6), (7, 8))
    assert (measurement.warmup_runs, measurement.load_ns, measurement.first_ns, measurement.peak_rss_bytes) == (20, 1, 2, 30)
    assert (measurement.environment["rss_before_bytes"], measurement.environment["rounds"], measurement.environment["device"]) == (
        20,
        [1, 1],
        "scripted",
    )
    assert measurement.environment["before"] == QUIET
    assert measurement.notes == ()


def test_measuring_has_exclusive_access_to_the_machine_and_releases_it(model):
    device = Scripted()
    _measure(device, [measure.Subject("m", "litert", model, 1)])
    assert device.shared_waits
    assert not _shared_waits()
    with pytest.raises(StageError, match="it broke"):
        _measure(Scripted(fails=StageError("it broke")), [measure.Subject("m", "litert", model, 1)])
    assert not _shared_waits()


class Refusing(Scripted):
    """A device whose harness ends for the subjects with some word in their ids."""

    def __init__(self, *words):
        super().__init__()
        self.words, self.calls = words, 0

    def measure(self, job, progress):
        self.calls += 1
        for subject in job["subjects"]:
            if any(word in subject["id"] for word in self.words):
                raise HarnessError(subject["id"], "the harness ended with SIGABRT")
        return super().measure(job, progress)


def _measure_sound(device, model, names):
    subjects = [measure.Subject(name, runtime, model, threads) for name, runtime in names for threads in (1, 4)]
    measurements, failures = measure.measure_sound(subjects, PROTOCOL, device, lambda share, text: None)
    return [(item.subject, item.runtime, item.threads) for item in measurements], failures


def test_a_candidate_whose_harness_ends_has_no_measurement_and_the_others_have(model):
    names = [("a", "litert"), ("b", "litert"), ("teacher", "litert")]
    measured, failures = _measure_sound(Refusing("b on litert, 4"), model, names)
    assert measured == [("a", "litert", 1), ("a", "litert", 4), ("teacher", "litert", 1), ("teacher", "litert", 4)]
    assert failures == {("b", "litert"): "measure: b on litert, 4 threads: the harness ended with SIGABRT"}


def test_a_teacher_whose_harness_ends_is_measured_on_the_other_runtimes(model):
    names = [("a", "litert"), ("b", "onnxruntime"), ("teacher", "litert"), ("teacher", "onnxruntime")]
    measured, failures = _measure_sound(Refusing("teacher on litert"), model, names)
    assert {(name, runtime) for name, runtime, _ in measured} == {*names} - {("teacher", "litert")}
    assert list(failures) == [("teacher", "litert")]


def test_nothing_is_measured_when_no_candidate_is_left(model):
    device = Refusing("a on", "b on")
    measured, failures = _measure_sound(device, model, [("a", "litert"), ("b", "litert"), ("teacher", "litert")])
    assert (measured, list(failures), device.calls) == ([], [("a", "litert"), ("b", "litert")], 2)


def test_waiting_for_the_machine_is_reported(model):
    program = "from edgekd.store import locks\nwith locks.machine_shared(): print(flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child.stdout.readline()
    calls = []

    def on_wait(_):
        calls.append("waits")
        child.communicate("\n")

    _measure(Scripted(), [measure.Subject("m", "litert", model, 1)], on_wait=on_wait)
    assert calls == ["waits"]


def test_fewer_runs_than_asked_for_are_a_note_of_that_subject(model):
    (measurement,) = _measure(Scripted([[5], [6]]), [measure.Subject("slow", "litert", model, 1)])
    assert measurement.notes == ("slow: 2 runs in the 600 s that a measurement may take; the profile asks for 4",)


def _notes(before=QUIET, after=None, seconds=10.0, cpu_s=9.0, protocol=PROTOCOL, device="local"):
    after = {**before, "busy_s": None if before["busy_s"] is None else before["busy_s"] + cpu_s} if after is None else after
    environment = {"before": before, "after": after, "seconds": seconds, "cpu_s": cpu_s, "device": device}
    return measure.environment_notes(environment, protocol)


def test_a_quiet_machine_has_no_notes():
    assert _notes() == ()


def test_state_that_cannot_be_read_is_noted_once_and_is_not_noise():
    assert _notes(UNREADABLE) == ("the governor cannot be read on this machine: unknown",)
    assert _notes(UNREADABLE, device="ssh") == ("the governor cannot be read on the device: unknown",)


@pytest.mark.parametrize(("busy_s", "noisy"), [(109.9, False), (110.1, True)])
def test_cpu_time_of_other_processes_is_noise(busy_s, noisy):
    notes = _notes(after={**QUIET, "busy_s": busy_s})  # in 10 s, 9 s of them our own
    assert (notes == ("noisy: other processes used 0.1 of 2 cores while measuring",)) == noisy
    assert bool(notes) == noisy


def test_cpu_time_taken_by_a_hypervisor_is_noise():
    notes = _notes(after={**QUIET, "busy_s": 109.0, "steal_s": 2.0})
    assert notes == ("noisy: the hypervisor took 5 % of the CPU time while measuring",)


@pytest.mark.parametrize(
    ("before", "after", "arch", "noisy"),
    [
        (0, 0x4, "aarch64", True),
        (0x4, 0x4, "aarch64", True),
        (0x50000, 0x50000, "aarch64", False),  # throttled earlier
        (0, 0x50000, "aarch64", True),  # throttled during the measurement
        (7, 7, "x86_64", False),  # a count since boot
        (7, 9, "x86_64", True),
    ],
)
def test_throttling_is_noise(before, after, arch, noisy):
    fact = {**QUIET, "arch": arch}
    notes = _notes({**fact, "throttled": before}, {**fact, "throttled": after, "busy_s": 109.0})
    assert [note.partition(":")[0] for note in notes] == ["noisy"] * noisy


def test_a_governor_and_a_temperature_outside_the_profile_are_noted():
    protocol = Protocol(warmup_runs=20, min_runs=4, min_seconds=2.0, governor="performance", max_temp_c=75)
    assert _notes(protocol=protocol) == ()
    notes = _notes({**QUIET, "governor": "ondemand"}, {**QUIET, "busy_s": 109.0, "temp_c": 80.4}, protocol=protocol)
    assert notes == ("the governor is ondemand; the profile asks for performance", "the machine was at 80 C; the profile allows 75 C")


@contextmanager
def _local():
    with registry.device("local").connect(DeviceSpec("local")) as connection:
        yield connection


def _measure_files(paths, device, threads=()):
    return measure.measure_files(paths, config.load_target("rpi4"), threads, device, lambda share, text: None)


def test_the_runtime_of_a_file_follows_from_its_suffix_and_the_threads_from_the_profile(tmp_path, model):
    other = tmp_path / "m.onnx"
    other.write_bytes(b"another")
    measurements = _measure_files([model, other], Scripted())
    assert [(item.runtime, item.threads) for item in measurements] == [("litert", 1), ("litert", 4), ("onnxruntime", 1), ("onnxruntime", 4)]
    assert [(item.runtime, item.threads) for item in _measure_files([model], Scripted(), [2])] == [("litert", 2)]


def test_a_file_that_is_named_twice_is_measured_twice(model):
    device = Scripted()
    assert len(_measure_files([model, model], device)) == 4
    assert len({subject["id"] for subject in device.job["subjects"]}) == 4


def test_all_files_that_cannot_be_measured_are_reported_at_once(tmp_path):
    (tmp_path / "data.py").write_text("")
    with pytest.raises(UsageError) as caught:
        _measure_files([tmp_path / "none.onnx", tmp_path / "data.py"], Scripted())
    none, other = str(caught.value).splitlines()
    assert none.endswith("none.onnx: no such file")
    assert other.endswith("data.py: is not a model file; expected one that ends in .onnx or .tflite")


@pytest.mark.parametrize("content", [b"", b"this is text\n" * 50, b"\x00\x01\x02" * 100])
@pytest.mark.parametrize("name", ["m.onnx", "m.tflite"])
def test_a_file_that_its_runtime_cannot_load_is_the_users_mistake(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    expected = rf"{name} on \w+, 1 thread: the harness ended with .*; expected model files that their runtime"
    with _local() as device, pytest.raises(UsageError, match=expected) as caught:
        _measure_files([tmp_path / name], device, [1])
    assert "\n" not in str(caught.value)


def test_a_file_that_ends_its_harness_is_the_users_mistake(model, monkeypatch, tmp_path):
    harness = tmp_path / "harness.py"
    harness.write_text("import os\nos.abort()\n")
    monkeypatch.setattr("edgekd.harness.runner.__file__", str(harness))
    with _local() as device, pytest.raises(UsageError, match="the harness ended with SIGABRT"):
        _measure_files([model], device, [1])


def test_a_folder_is_not_a_model_file(tmp_path):
    (tmp_path / "m.onnx").mkdir()
    with pytest.raises(UsageError, match="m.onnx: is not a file"):
        _measure_files([tmp_path / "m.onnx"], Scripted())


def test_a_model_file_is_measured_without_torch_and_the_converters(tmp_path):
    node = helper.make_node("Relu", ["x"], ["y"])
    edges = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8]) for name in ("x", "y")]
    model = helper.make_model(
        helper.make_graph([node], "g", edges[:1], edges[1:]), opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    )
    onnx.save(model, str(tmp_path / "m.onnx"))
    program = (
        "import sys\nfor name in ('torch', 'onnx', 'litert_torch', 'ai_edge_quantizer', 'scipy'): sys.modules[name] = None\n"
        "from pathlib import Path\nfrom edgekd import config, registry\nfrom edgekd.domain.device import DeviceSpec\n"
        "from edgekd.stages import measure\nfrom dataclasses import replace\n"
        "target = config.load_target('host')\n"
        "target = replace(target, protocol=replace(target.protocol, min_runs=8, min_seconds=0))\n"
        "with registry.device('local').connect(DeviceSpec('local')) as device:\n"
        "    (it,) = measure.measure_files([Path('m.onnx')], target, (1,), device, lambda share, text: None)\n"
        "print(len(it.samples_ns()) >= 8, it.runtime)"
    )
    process = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (process.stdout, process.stderr) == ("True onnxruntime\n", "")
