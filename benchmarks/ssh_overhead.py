# SPDX-License-Identifier: Apache-2.0
"""A board over ssh: what a command costs after the first, how long a model of 14 MB takes, and whether latency is that of a local run.

The board is this machine, behind an sshd of its own on the loopback address. Interleaved with what a script would do: ``ssh true`` and
``scp`` over a connection that is multiplexed (ControlMaster). The last line compares blocks of 20 runs of one model, in pairs of harness
processes, one that ``local`` started and one that ``ssh`` started: the pair is the unit of the interval. Exits with 1 above the bars.

    python benchmarks/ssh_overhead.py [rounds]
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from operator import truediv
from pathlib import Path
from typing import TYPE_CHECKING

from distill_step import median_interval

sys.path.insert(0, str(Path(__file__).parents[1]))
from edgekd.devices import local, ssh
from edgekd.domain.device import DeviceSpec
from edgekd.stages.measure import harness
from tests import sshd

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekd.ports import Connection

ROUNDS, PAIRS, BLOCKS = 21, 15, 30
MODEL_BYTES = 14 * 10**6
BAR_COMMAND_S, BAR_PUSH_S, BAR_LATENCY = 0.010, 0.2, 0.01


def main() -> int:
    """Compare and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    with tempfile.TemporaryDirectory() as folder, sshd.running(Path(folder), "Subsystem sftp internal-sftp") as server:
        spec = server.spec
        started = time.perf_counter()
        with ssh.connect(spec) as connection:
            print(f"first connection: {time.perf_counter() - started:.3f} s")
            commands, pushes = _compare_transport(Path(folder), spec, connection, rounds)
            with local.connect(DeviceSpec("local")) as here:
                median, low, high = median_interval(_latency_ratios(Path(folder), here, connection))
    for name, rows in (("command", commands), ("push of 14 MB", pushes)):
        values = {key: 1000 * statistics.median(seconds) for key, seconds in rows.items()}
        ratio = median_interval(list(map(truediv, rows["edgekd"], rows["multiplexed"])))
        shown = ", ".join(f"{key} {value:.2f} ms" for key, value in values.items())
        print(f"{name}: {shown}; edgekd / multiplexed: {ratio[0]:.3f} [{ratio[1]:.3f}, {ratio[2]:.3f}]")
    command_s, push_s = statistics.median(commands["edgekd"]), statistics.median(pushes["edgekd"])
    print(f"p50, over ssh / local, {PAIRS} pairs of processes: {median:.4f} [{low:.4f}, {high:.4f}], bar 1 +- {BAR_LATENCY}")
    print(f"bars: command {1000 * BAR_COMMAND_S:.0f} ms, push {BAR_PUSH_S} s")
    return int(command_s > BAR_COMMAND_S or push_s > BAR_PUSH_S or low > 1 + BAR_LATENCY or high < 1 - BAR_LATENCY)


def _compare_transport(
    folder: Path, spec: DeviceSpec, connection: ssh.Ssh, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return the seconds of commands and of pushes, each by what did it."""
    control = ["-o", "ControlMaster=auto", "-o", "ControlPersist=60", "-o", f"ControlPath={folder}/%C"]
    options = ["-F", str(spec.ssh_config), *control]
    command = ["ssh", *options, "-p", str(spec.port), spec.address, "true"]
    new = ["ssh", "-F", str(spec.ssh_config), "-p", str(spec.port), spec.address, "true"]
    subprocess.run(command, check=True)
    commands: dict[str, list[float]] = {"edgekd": [], "multiplexed": [], "new connection": []}
    pushes: dict[str, list[float]] = {"edgekd": [], "multiplexed": []}
    for number in range(rounds):
        model = folder / f"model-{number}"
        model.write_bytes(os.urandom(MODEL_BYTES))
        copy = ["scp", "-q", *options, "-P", str(spec.port), str(model), f"{spec.address}:{folder}/copied"]
        commands["edgekd"].append(_seconds(connection.cpu_seconds))
        commands["multiplexed"].append(_seconds(lambda: subprocess.run(command, check=True)))
        commands["new connection"].append(_seconds(lambda: subprocess.run(new, check=True)))
        tasks = {
            "edgekd": lambda model=model: connection.push(model),
            "multiplexed": lambda copy=copy: subprocess.run(copy, check=True),
        }
        for name in tasks if number % 2 else reversed(tasks):
            pushes[name].append(_seconds(tasks[name]))
        model.unlink()
    subprocess.run([*command[:-2], "-O", "exit", spec.address], check=True, capture_output=True)
    return commands, pushes


def _seconds(task: Callable[[], object]) -> float:
    started = time.perf_counter()
    task()
    return time.perf_counter() - started


def _latency_ratios(folder: Path, here: Connection, board: Connection) -> list[float]:
    """Return the median ratio of neighbouring blocks of a small model, over ssh / local, of each pair of processes."""
    path = _write_model(folder / "m.onnx")
    return [_latency_ratio(path, here, board) for _ in range(PAIRS)]


def _latency_ratio(path: Path, here: Connection, board: Connection) -> float:
    subject = {"id": "m", "runtime": "onnxruntime"}
    with harness.start(here, subject) as first, harness.start(board, subject) as second:
        for process in (first, second):
            process.send(do="open", runtime="onnxruntime", path=process.connection.push(path), threads=1)
            process.send(do="block", runs=100)
        ratios = []
        for number in range(BLOCKS):
            medians = {}
            for process in (first, second) if number % 2 else (second, first):
                medians[process.connection.kind] = statistics.median(process.send(do="block", runs=20, settle=3)["ns"])
            ratios.append(medians[board.kind] / medians[here.kind])
    return statistics.median(ratios)


def _write_model(path: Path) -> Path:
    """Write a model of some matrix products, which takes about a millisecond."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = [numpy_helper.from_array(np.random.default_rng(i).standard_normal((512, 512), np.float32), f"w{i}") for i in range(16)]
    nodes = [helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(16)]
    edges = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 512]) for name in ("x0", "x16")]
    graph = helper.make_graph(nodes, "g", edges[:1], edges[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


if __name__ == "__main__":
    if os.getsid(0) != os.getpid():  # Linux shares the CPU out by sessions, and a login has one of its own: so has this program
        sys.exit(subprocess.run([sys.executable, *sys.argv], start_new_session=True, check=False).returncode)
    sys.exit(main())
