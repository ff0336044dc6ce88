# SPDX-License-Identifier: Apache-2.0
"""Measuring on this machine: the stop rule on scripted samples, and a short real run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgekd import registry
from edgekd.devices import local
from edgekd.domain.recipe import TensorSpec
from edgekd.errors import StageError, UnavailableError

PROTOCOL = {"warmup_runs": 4, "min_runs": 60, "min_seconds": 0}


@pytest.mark.parametrize(("ns", "runs"), [(1, 200), (400_000, 100), (100_000_000, 5)])
def test_a_block_lasts_about_forty_milliseconds(ns, runs):
    assert local.runs_per_block([10**9, ns, ns, ns]) == runs


@pytest.mark.parametrize(
    ("blocks", "share", "enough"),
    [
        ([[1000] * 100] * 3, 1, False),  # three rounds only
        ([[1000] * 75] * 4, 1, False),  # 300 runs, but no 2 seconds
        ([[7_000_000] * 75] * 4, 1, True),
        ([[7_000_000] * 74] * 4, 1, False),  # 296 runs
        ([[7_000_000] * 25] * 4, 3, True),  # a third of it, in one of three generations
        ([[1000] * 200] * 100, 1, True),  # 20,000 runs of a microsecond
    ],
)
def test_when_a_subject_has_enough(blocks, share, enough):
    assert local.is_enough(blocks, {"min_runs": 300, "min_seconds": 2}, share) == enough


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("models"), {}
    torch.manual_seed(0)
    for name, width in (("small", 8), ("large", 512)):
        module = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)).eval()
        for runtime in registry.names("runtimes"):
            path = folder / f"{name}.{registry.runtime(runtime).FORMAT}"
            registry.runtime(runtime).export(module, (TensorSpec("x", (1, 64)),), path)
            found[name, runtime] = path
    return found


def test_a_short_real_run(models):
    subjects = [{"id": f"{n} {r}", "runtime": r, "path": str(path), "threads": 1, "inputs": []} for (n, r), path in models.items()]
    found = local.measure({"subjects": subjects, "protocol": PROTOCOL, "generations": 2}, lambda share, text: None)
    assert set(found["subjects"]) == {subject["id"] for subject in subjects}
    for raw in found["subjects"].values():
        assert sum(map(len, raw["blocks_ns"])) >= 60
        assert len(raw["blocks_ns"]) >= 2 * local.MIN_ROUNDS
        assert all(isinstance(ns, int) and ns > 0 for block in raw["blocks_ns"] for ns in block)
        assert raw["peak_rss_bytes"] > raw["rss_before_bytes"] > 2**20
    rounds = {subject["runtime"]: len(found["subjects"][subject["id"]]["blocks_ns"]) for subject in subjects}
    assert all(len(found["subjects"][s["id"]]["blocks_ns"]) == rounds[s["runtime"]] for s in subjects)  # pairs


def test_a_file_that_is_no_model_is_told_with_what_the_runtime_said(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"no model")
    job = {
        "subjects": [{"id": "m", "runtime": "onnxruntime", "path": str(tmp_path / "m.onnx"), "threads": 1, "inputs": []}],
        "protocol": PROTOCOL,
    }
    with pytest.raises(StageError, match="measure: m: the harness ended with exit code 1; it said last: .*InvalidProtobuf"):
        local.measure({**job, "generations": 1}, lambda share, text: None)


def test_a_runtime_that_is_missing_is_named(models, monkeypatch, tmp_path):
    (tmp_path / "onnxruntime.py").write_text("raise ModuleNotFoundError('onnxruntime')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    job = {"subjects": [{"id": "m", "runtime": "onnxruntime", "path": str(models["small", "onnxruntime"]), "threads": 1, "inputs": []}]}
    with pytest.raises(UnavailableError, match=r"onnxruntime is not installed.*pip install"):
        local.measure({**job, "protocol": PROTOCOL, "generations": 1}, lambda share, text: None)
