# SPDX-License-Identifier: Apache-2.0
"""Every kind of device: a short real measurement of models of every runtime."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgekd import registry
from edgekd.domain.device import DeviceSpec
from edgekd.domain.recipe import TensorSpec
from edgekd.errors import StageError
from edgekd.harness import runner
from edgekd.stages.measure import interleaver
from tests import sshd

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


@pytest.fixture(scope="module", params=DEVICES)
def connection(request, tmp_path_factory):
    """Yield an open device of each kind; the board of ssh is this machine, behind a real sshd."""
    with ExitStack() as stack:
        specs = {
            "local": lambda: DeviceSpec("local"),
            "ssh": lambda: stack.enter_context(sshd.running(tmp_path_factory.mktemp("sshd"))).spec,
        }
        yield stack.enter_context(registry.device(request.param).connect(specs[request.param]()))


def _subject(name, runtime, path):
    return {"id": f"{name} {runtime}", "runtime": runtime, "path": str(path), "threads": 1, "inputs": []}


def test_devices_are_registered():
    assert DEVICES == ("local", "ssh")
    assert [registry.device(kind).KIND for kind in DEVICES] == list(DEVICES)


def test_a_short_measurement(connection, models):
    subjects, calls = [_subject(name, runtime, path) for (name, runtime), path in models.items()], []
    job = {"subjects": subjects, "protocol": PROTOCOL, "generations": 2, "max_seconds": 60}
    with connection.lease():
        result = interleaver.measure(job, connection, lambda share, text: calls.append((share, text)))
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


@pytest.mark.parametrize("runtime", registry.names("runtimes"))
def test_an_invalid_file_is_reported_with_the_error_of_the_runtime(connection, runtime, tmp_path):
    path = tmp_path / f"m.{registry.runtime(runtime).FORMAT}"
    path.write_bytes(b"not a model")
    job = {"subjects": [_subject("m", runtime, path)], "protocol": PROTOCOL, "generations": 1, "max_seconds": 60}
    with pytest.raises(
        StageError, match=f"measure: m {runtime}: the harness ended with exit code 1; last line of its output: .*(Protobuf|Flatbuffer)"
    ):
        interleaver.measure(job, connection, lambda share, text: None)


def test_facts_and_versions_are_those_of_this_machine(connection):
    assert runner.identity(connection.facts()) == runner.identity(runner.facts())
    versions = connection.versions(["numpy", "no-such-distribution"])
    assert versions == {"numpy": np.__version__, "no-such-distribution": None}


def test_a_file_is_pushed_and_pulled(connection, tmp_path):
    content = np.random.default_rng(0).bytes(3 * 2**20)
    (tmp_path / "m.bin").write_bytes(content)
    path = connection.push(tmp_path / "m.bin")
    assert connection.pull(path) == content
    assert connection.push(tmp_path / "m.bin") == path


def test_a_device_has_one_lease(connection):
    program = "from edgekd.store import locks\nwith locks.machine_exclusive(): print(flush=True); input()"
    folder = Path(os.environ["EDGEKD_LOCK_DIR"]) if connection.kind == "local" else Path(connection.spec.ssh_config).parent / "tmp"
    holder = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "EDGEKD_LOCK_DIR": str(folder)},
    )
    holder.stdout.readline()
    calls = []

    def on_wait(text):
        calls.append(text)
        holder.communicate("\n")

    with connection.lease(on_wait):
        assert len(calls) == 1
