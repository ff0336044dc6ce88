# SPDX-License-Identifier: Apache-2.0
"""Every kind of device: a short real measurement of models of every runtime."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from edgekd import registry
from edgekd.domain.recipe import TensorSpec
from edgekd.errors import StageError

DEVICES = registry.names("devices")
PROTOCOL = {"warmup_runs": 4, "min_runs": 60, "min_seconds": 0}
RESULT = {"blocks_ns", "first_ns", "load_ns", "peak_rss_bytes", "rounds", "rss_before_bytes", "version"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return model files by name and runtime."""
    folder, paths = tmp_path_factory.mktemp("models"), {}
    torch.manual_seed(0)
    for name, width in (("small", 8), ("large", 256)):
        module = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)).eval()
        for runtime in registry.names("runtimes"):
            path = folder / f"{name}.{registry.runtime(runtime).FORMAT}"
            registry.runtime(runtime).export(module, (TensorSpec("x", (1, 64)),), path)
            paths[name, runtime] = path
    return paths


def _subject(name, runtime, path):
    return {"id": f"{name} {runtime}", "runtime": runtime, "path": str(path), "threads": 1, "inputs": []}


def test_devices_are_registered():
    assert DEVICES == ("local",)
    assert [registry.device(kind).KIND for kind in DEVICES] == list(DEVICES)


@pytest.mark.parametrize("kind", DEVICES)
def test_a_short_measurement(kind, models):
    subjects, calls = [_subject(name, runtime, path) for (name, runtime), path in models.items()], []
    job = {"subjects": subjects, "protocol": PROTOCOL, "generations": 2, "max_seconds": 60}
    result = registry.device(kind).measure(job, lambda share, text: calls.append((share, text)))
    assert json.loads(json.dumps(result)) == result
    assert set(result["subjects"]) == {subject["id"] for subject in subjects}
    for subject in subjects:
        raw = result["subjects"][subject["id"]]
        assert set(raw) == RESULT
        assert sum(map(len, raw["blocks_ns"])) >= 60
        assert all(isinstance(ns, int) and ns > 0 for block in raw["blocks_ns"] for ns in block)
        assert raw["peak_rss_bytes"] > raw["rss_before_bytes"] > 2**20
        assert min(raw["load_ns"], raw["first_ns"]) > 0
        assert len(raw["rounds"]) == 2
        assert sum(raw["rounds"]) == len(raw["blocks_ns"])
    for runtime in registry.names("runtimes"):  # a round has a block of each subject
        assert len({tuple(result["subjects"][s["id"]]["rounds"]) for s in subjects if s["runtime"] == runtime}) == 1
    assert {"arch", "governor", "load", "temp_c"} <= set(result["before"]) == set(result["after"])
    assert result["seconds"] > 0
    assert result["cpu_s"] > 0
    shares = [share for share, _ in calls]
    assert shares == sorted(shares)
    assert 0 < shares[0] <= shares[-1] <= 1


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("runtime", registry.names("runtimes"))
def test_an_invalid_file_is_reported_with_the_error_of_the_runtime(kind, runtime, tmp_path):
    path = tmp_path / f"m.{registry.runtime(runtime).FORMAT}"
    path.write_bytes(b"not a model")
    job = {"subjects": [_subject("m", runtime, path)], "protocol": PROTOCOL, "generations": 1, "max_seconds": 60}
    with pytest.raises(
        StageError, match=f"measure: m {runtime}: the harness ended with exit code 1; last line of its output: .*(Protobuf|Flatbuffer)"
    ):
        registry.device(kind).measure(job, lambda share, text: None)
