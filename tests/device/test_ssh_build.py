# SPDX-License-Identifier: Apache-2.0
"""Whole builds of a small recipe whose board is behind a real sshd."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from tests import sshd, toy

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.device


class Project:
    """The toy recipe, a profile ``board`` of this machine's kind that is reached by ssh, and a ``devices.toml``."""

    def __init__(self, folder, server):
        self.folder, self.server = folder, server
        for name, text in (("edgekd.toml", toy.RECIPE), ("data.py", toy.DATA), ("models.py", toy.MODELS)):
            (folder / name).write_text(text)
        profile = (ROOT / "targets" / "host.toml").read_text()
        profile = (
            profile.replace('name = "host"', 'name = "board"').replace('["local"]', '["ssh"]').replace("min_seconds = 2", "min_seconds = 0")
        )
        (folder / "board.toml").write_text(profile)
        spec = server.spec
        (folder / "devices.toml").write_text(
            f'[bench]\nkind = "ssh"\naddress = "{spec.address}"\nport = {spec.port}\npython = "{spec.python}"\nssh_config = "{spec.ssh_config}"\n'
        )

    def build(self, *arguments, targets=("board.toml",)):
        command = [sys.executable, "-m", "edgekd", "build", *(part for name in targets for part in ("--target", name)), *arguments]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)

    def report(self):
        return json.loads((self.folder / "build" / "board" / "report.json").read_text())


@pytest.fixture
def project(tmp_path):
    for name in ("sshd", "project"):
        (tmp_path / name).mkdir()
    with sshd.running(tmp_path / "sshd") as server:
        yield Project(tmp_path / "project", server)


def test_a_build_measures_on_the_board_and_caches_the_verdict_of_the_board(project):
    built = project.build("--device", "bench")
    assert built.returncode in {0, 1}, built.stderr
    assert f"target board: is measured on ssh:{project.server.spec.address}:{project.server.port}" in built.stderr
    report = project.report()
    assert {candidate["latency"][0]["runs"] > 0 for candidate in report["candidates"]} == {True}
    assert project.server.leftovers() == []
    again = project.build("--device", "bench")
    assert again.returncode == built.returncode
    assert "measure:" not in again.stderr
    without = project.build("--inconclusive-ok")
    assert without.returncode == 0
    assert "board is reached by ssh, and no device was named" in without.stdout
    assert "measure:" in project.build("--device", "bench").stderr  # the last verdict is that without a device


def test_a_board_that_is_gone_is_an_error_before_anything_runs(project):
    (project.folder / "devices.toml").write_text('[bench]\nkind = "ssh"\naddress = "pi@127.0.0.1"\nport = 9\n')
    built = project.build("--device", "bench")
    assert built.returncode == 3
    assert "edgekd: device ssh:pi@127.0.0.1:9: it refused the connection" in built.stderr
    assert "inspect" not in built.stderr
    assert not list(Path(os.environ["EDGEKD_CACHE"]).glob("objects/*/*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_measurement_that_is_ended_leaves_nothing(project, number):
    onnx.save(_relu_model(), str(project.folder / "m.onnx"))
    command = [sys.executable, "-m", "edgekd", "measure", "m.onnx", "m.onnx", "--target", "board.toml", "--device", "bench"]
    process = subprocess.Popen(command, cwd=project.folder, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while len(project.server.processes()) < 2 and process.poll() is None:  # a harness beside the program that starts it
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(30) == (130 if number == signal.SIGINT else -number)
    assert project.server.wait_until_clean() == []


def _relu_model():
    edges = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", edges[:1], edges[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_a_board_of_another_architecture_is_refused_with_the_difference(project):
    refused = project.build("--device", "bench", targets=["rpi4"])
    assert refused.returncode == 3
    assert (
        f"is not what the profile says: rpi4 is aarch64, ssh:{project.server.spec.address}:{project.server.port} is x86_64"
        in refused.stderr
    )
