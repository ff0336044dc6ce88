# SPDX-License-Identifier: Apache-2.0
"""A board with ARM64 code: everything that a Raspberry Pi does for a build, under qemu."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgekd.devices import ssh
from edgekd.errors import UnavailableError
from tests import raspberry, toy

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.device


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    with raspberry.running(tmp_path_factory.mktemp("raspberry")) as (server, spec):
        yield server, spec


@pytest.fixture
def project(tmp_path, board):
    """Return a folder with the toy recipe, a short profile of a Raspberry Pi 4, and a ``devices.toml``."""
    spec = board[1]
    for name, text in (("edgekd.toml", toy.RECIPE), ("data.py", toy.DATA), ("models.py", toy.MODELS)):
        (tmp_path / name).write_text(text)
    lines = (ROOT / "targets" / "rpi4.toml").read_text().replace("threads = [1, 4]", "threads = [1]").splitlines()
    changed = {"name": 'name = "pi"', "schemes": 'schemes = ["float32"]'}
    changed["protocol"] = "protocol = { warmup_runs = 4, min_runs = 300, min_seconds = 0 }"
    lines = [changed.get(line.partition(" = ")[0], line) for line in lines if "onnxruntime" not in line]
    (tmp_path / "pi.toml").write_text("\n".join(lines) + "\n")
    (tmp_path / "devices.toml").write_text(
        f'[pi]\nkind = "ssh"\naddress = "{spec.address}"\nport = {spec.port}\nssh_config = "{spec.ssh_config}"\n'
    )
    return tmp_path


def _run(folder, *arguments):
    return subprocess.run([sys.executable, "-m", "edgekd", *arguments], cwd=folder, capture_output=True, text=True, check=False)


def test_its_facts_are_those_of_the_board_and_not_of_this_machine(board):
    with ssh.connect(board[1]) as connection:
        facts = connection.facts()
        versions = connection.versions(["ai-edge-litert", "onnxruntime", "numpy"])
    assert (facts["arch"], facts["core"], facts["cpu_model"]) == ("aarch64", "cortex-a72", "Raspberry Pi 4 Model B Rev 1.4")
    assert facts["libc"].startswith("glibc-2.")
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert versions == {name: pinned[name] for name in versions}


def test_a_build_for_a_raspberry_pi_runs_the_arm64_code_of_the_board(project, board):
    built = _run(project, "build", "--target", "pi.toml", "--device", "pi")
    assert built.returncode in {0, 1, 4}, built.stderr
    assert f"target pi: is measured on {board[1].label}" in built.stderr
    report = json.loads((project / "build" / "pi" / "report.json").read_text())
    (latency,) = report["candidates"][0]["latency"]
    assert latency["runs"] >= 300
    assert latency["peak_rss_mib"] > 20
    assert latency["runtime_version"].startswith("ai-edge-litert")
    assert "Raspberry Pi 4 Model B Rev 1.4" in json.dumps(report)
    assert board[0].wait_until_clean() == []


def test_another_board_than_the_profile_says_is_refused_before_anything_runs(project):
    refused = _run(project, "build", "--target", "rpi5", "--device", "pi")
    assert refused.returncode == 3
    assert "lacks asimddp, asimdhp, which rpi5 has" in refused.stderr
    assert "inspect" not in refused.stderr


def test_a_board_that_loses_its_power_is_clean_after_the_next_connection(board):
    server, spec = board
    with ssh.connect(spec) as connection, connection.lease(), connection.start() as process:
        for pid in server.processes():
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(UnavailableError, match="the connection ended"):
            process.exchange('{"do": "facts"}', 60)
    with ssh.connect(spec) as connection, connection.lease():
        assert connection.facts()["arch"] == "aarch64"
    assert server.wait_until_clean() == []
