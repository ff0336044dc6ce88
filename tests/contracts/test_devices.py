# SPDX-License-Identifier: Apache-2.0
"""Every device kind: models of every runtime, measured for real, and shortly."""

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
    folder, found = tmp_path_factory.mktemp("models"), {}
    torch.manual_seed(0)
    for name, width in (("small", 8), ("large", 256)):
        module = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)).eval()
        for runtime in registry.names("runtimes"):
            path = folder / f"{name}.{registry.runtime(runtime).FORMAT}"
            registry.runtime(runtime).export(module, (TensorSpec("x", (1, 64)),), path)
            found[name, runtime] = path
    return found


def _subject(name, runtime, path):
    return {"id": f"{name} {runtime}", "runtime": runtime, "path": str(path), "threads": 1, "inputs": []}


def test_there_are_as_many_as_are_told():
    assert DEVICES == ("local",)
    assert [registry.device(kind).KIND for kind in DEVICES] == list(DEVICES)


@pytest.mark.parametrize("kind", DEVICES)
def test_a_short_measurement(kind, models):
    subjects, told = [_subject(name, runtime, path) for (name, runtime), path in models.items()], []
    job = {"subjects": subjects, "protocol": PROTOCOL, "generations": 2, "max_seconds": 60}
    found = registry.device(kind).measure(job, lambda share, text: told.append((share, text)))
    assert json.loads(json.dumps(found)) == found
    assert set(found["subjects"]) == {subject["id"] for subject in subjects}
    for subject in subjects:
        raw = found["subjects"][subject["id"]]
        assert set(raw) == RESULT
        assert sum(map(len, raw["blocks_ns"])) >= 60
        assert all(isinstance(ns, int) and ns > 0 for block in raw["blocks_ns"] for ns in block)
        assert raw["peak_rss_bytes"] > raw["rss_before_bytes"] > 2**20
        assert min(raw["load_ns"], raw["first_ns"]) > 0
        assert len(raw["rounds"]) == 2
        assert sum(raw["rounds"]) == len(raw["blocks_ns"])
    for runtime in registry.names("runtimes"):  # rounds are pairs
        assert len({tuple(found["subjects"][s["id"]]["rounds"]) for s in subjects if s["runtime"] == runtime}) == 1
    assert {"arch", "governor", "load", "temp_c"} <= set(found["before"]) == set(found["after"])
    assert found["seconds"] > 0
    assert found["own_s"] > 0
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert 0 < shares[0] <= shares[-1] <= 1


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("runtime", registry.names("runtimes"))
def test_a_file_that_is_no_model_is_told_with_what_the_runtime_said(kind, runtime, tmp_path):
    path = tmp_path / f"m.{registry.runtime(runtime).FORMAT}"
    path.write_bytes(b"no model at all")
    job = {"subjects": [_subject("m", runtime, path)], "protocol": PROTOCOL, "generations": 1, "max_seconds": 60}
    with pytest.raises(
        StageError, match=f"measure: m {runtime}: the harness ended with exit code 1; it said last: .*(Protobuf|Flatbuffer)"
    ):
        registry.device(kind).measure(job, lambda share, text: None)
