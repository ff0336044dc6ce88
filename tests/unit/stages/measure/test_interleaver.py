# SPDX-License-Identifier: Apache-2.0
"""The interleaver on this machine: order, the stop rule, and harness processes that fail."""

from __future__ import annotations

import random

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgekd.devices import local
from edgekd.domain.device import DeviceSpec
from edgekd.errors import HarnessError, StageError, UnavailableError
from edgekd.stages.measure import harness, interleaver


@pytest.mark.parametrize(("ns", "runs"), [(1, 1000), (50_000, 800), (400_000, 100), (100_000_000, 5)])
def test_a_block_lasts_about_forty_milliseconds(ns, runs):
    assert interleaver.runs_per_block([10**9, 10**9, 10**9, ns, ns, ns]) == runs


@pytest.mark.parametrize(("runs", "settle"), [(5, 1), (19, 1), (20, 2), (30, 3), (1000, 3)])
def test_settling_takes_a_tenth_of_a_block_or_one_run(runs, settle):
    assert interleaver.settling_runs(runs) == settle


@pytest.mark.parametrize(
    ("blocks", "generations", "expected"),
    [
        ([[1000] * 100] * 3, 1, False),  # only three rounds
        ([[1000] * 75] * 4, 1, False),  # 300 runs, but less than 2 seconds
        ([[7_000_000] * 75] * 4, 1, True),
        ([[7_000_000] * 74] * 4, 1, False),  # 296 runs
        ([[7_000_000] * 25] * 4, 3, True),  # a third, in one of three generations
        ([[1000] * 200] * 100, 1, True),  # 20,000 runs of a microsecond
    ],
)
def test_when_a_subject_has_enough_runs(blocks, generations, expected):
    assert interleaver.is_enough(blocks, {"min_runs": 300, "min_seconds": 2}, generations) == expected


def _interleave(seed, rounds, names=("a", "b", "c")):
    """Return the calls in their order, and the blocks; the n-th call takes n nanoseconds."""
    calls = []

    def run_block(name):
        calls.append(name)
        return [len(calls)]

    blocks = interleaver.interleave(run_block, names, lambda blocks: len(blocks["a"]) == rounds, random.Random(seed))
    return calls, blocks


def test_each_round_has_one_block_of_every_subject():
    calls, blocks_by_name = _interleave(0, 20)
    assert len(calls) == 3 * 20
    assert all(sorted(calls[start : start + 3]) == ["a", "b", "c"] for start in range(0, len(calls), 3))
    for name, blocks in blocks_by_name.items():
        assert blocks == [[number] for number, called in enumerate(calls, 1) if called == name]


def test_the_order_is_random_and_reproducible():
    first, again, other = _interleave(0, 20)[0], _interleave(0, 20)[0], _interleave(1, 20)[0]
    assert first == again != other
    assert len({tuple(first[start : start + 3]) for start in range(0, len(first), 3)}) > 3


def _model(path, size):
    """Write a model without weights that sums ``size`` numbers."""
    node = helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)
    tensors = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, size]), helper.make_tensor_value_info("y", TensorProto.FLOAT, [])
    model = helper.make_model(
        helper.make_graph([node], "g", tensors[:1], tensors[1:]), opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    )
    onnx.save(model, str(path))
    return path


def _subject(path, inputs=()):
    return {"id": path.stem, "runtime": "onnxruntime", "path": str(path), "threads": 1, "inputs": [str(item) for item in inputs]}


def _job(*subjects, **changes):
    protocol = {"warmup_runs": 4, "min_runs": 60, "min_seconds": 0}
    return {"subjects": list(subjects), "protocol": protocol, "generations": 1, "max_seconds": 60, **changes}


def _measure(job):
    with local.connect(DeviceSpec("local")) as connection:
        return interleaver.measure(job, connection, lambda share, text: None)


def test_a_job_ends_at_its_time_limit_after_complete_rounds(tmp_path):
    subjects = [_subject(_model(tmp_path / f"{name}.onnx", 4)) for name in ("a", "b")]
    protocol = {"warmup_runs": 4, "min_runs": 10**9, "min_seconds": 0}
    results = _measure(_job(*subjects, protocol=protocol, generations=3, max_seconds=0))
    assert all(raw["rounds"] == [1, 1, 1] and len(raw["blocks_ns"]) == 3 for raw in results["subjects"].values())


def test_peak_memory_excludes_the_samples(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((64, 2**18), np.float32))  # 64 MiB
    subject = _subject(_model(tmp_path / "m.onnx", 2**18), [tmp_path / "x.npy"])
    raw = _measure(_job(subject))["subjects"]["m"]
    assert 2**20 < raw["peak_rss_bytes"] - raw["rss_before_bytes"] < 2**25


def _replace_onnxruntime(monkeypatch, folder, program):
    """Replace onnxruntime by a program, for harness processes."""
    (folder / "onnxruntime.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_a_missing_runtime_is_reported_with_its_package(monkeypatch, tmp_path):
    _replace_onnxruntime(monkeypatch, tmp_path, "raise ModuleNotFoundError(\"No module named 'onnxruntime'\")")
    with pytest.raises(UnavailableError, match=r"measure: onnxruntime cannot be imported.*run: pip install onnxruntime$"):
        _measure(_job(_subject(_model(tmp_path / "m.onnx", 4))))


def test_the_last_line_of_a_failed_harness_is_reported_after_much_output(monkeypatch, tmp_path):
    _replace_onnxruntime(
        monkeypatch,
        tmp_path,
        "import os\nfor _ in range(2000): os.write(2, b'a warning ' * 100 + b'\\n')\nraise ValueError('no such kernel')",
    )
    with pytest.raises(
        StageError, match="^measure: m: the harness ended with exit code 1; last line of its output: ValueError: no such kernel$"
    ):
        _measure(_job(_subject(_model(tmp_path / "m.onnx", 4))))


def test_a_killed_harness_is_reported_with_the_signal(monkeypatch, tmp_path):
    _replace_onnxruntime(monkeypatch, tmp_path, "import os; os.kill(os.getpid(), 11)")
    with pytest.raises(StageError, match="^measure: m: the harness ended with SIGSEGV; last line of its output: none$"):
        _measure(_job(_subject(_model(tmp_path / "m.onnx", 4))))


def test_a_hanging_harness_is_an_error(monkeypatch, tmp_path):
    _replace_onnxruntime(monkeypatch, tmp_path, "import signal; signal.pause()")
    monkeypatch.setattr(harness, "TIMEOUT_S", 0.2)
    with pytest.raises(StageError, match=r"measure: m: the harness did not reply to 'open' within 0.2 s"):
        _measure(_job(_subject(_model(tmp_path / "m.onnx", 4))))


def test_a_subject_that_cannot_be_opened_is_reported_before_the_others_are_measured(monkeypatch, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    subjects = [_subject(_model(tmp_path / "m.onnx", 4)), {**_subject(tmp_path / "bad.onnx"), "id": "bad"}]
    monkeypatch.setattr(interleaver, "_run_generation", None)
    with pytest.raises(HarnessError) as caught:
        _measure(_job(*subjects))
    assert caught.value.subject == "bad"


def test_a_harness_inherits_no_variable_that_changes_the_numbers(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    _replace_onnxruntime(monkeypatch, tmp_path, "import os; raise ValueError(' '.join(sorted(os.environ)))")
    with pytest.raises(StageError) as caught:
        _measure(_job(_subject(_model(tmp_path / "m.onnx", 4))))
    assert "PYTHONPATH" in str(caught.value)
    assert "OMP_NUM_THREADS" not in str(caught.value)
