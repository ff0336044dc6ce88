# SPDX-License-Identifier: Apache-2.0
"""Measuring on this machine: one harness process per subject, with interleaved blocks of runs."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from edgekd import registry
from edgekd.errors import HarnessError, UnavailableError, printable
from edgekd.harness import runner

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgekd.domain.artifact import Json
    from edgekd.ports import Progress

KIND = "local"
BLOCK_NS = 40_000_000  # long enough to outweigh the switch between processes, short enough for the same background load
MAX_BLOCK_RUNS = 1000
MIN_BLOCK_RUNS = 5
MAX_SETTLE_RUNS = 3  # the first run after another process takes up to 3 times as long; from the fourth on, times are steady
MAX_RUNS = 20_000  # per subject: a model that takes microseconds does not need seconds of runs
MIN_ROUNDS = 4  # per generation: a round is the unit of the interval
MEMORY_RUNS = 10
TIMEOUT_S = 600
# the variables that a harness inherits; others may change the numbers (LD_PRELOAD, OMP_NUM_THREADS, MALLOC_ARENA_MAX ...)
INHERITED_VARIABLES = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH", "TMPDIR", "VIRTUAL_ENV")


@dataclass(slots=True)
class _Result:
    """The result of one subject so far: ``opened`` of its first process, ``rounds`` of each generation."""

    opened: Mapping[str, Json] = field(default_factory=dict)
    blocks_ns: list[list[int]] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    peak_rss_bytes: int | None = None


def measure(job: Mapping[str, Any], progress: Progress) -> Mapping[str, Json]:
    """Measure the subjects, interleaved with those of the same runtime, one runtime after the other.

    Args:
        job: ``subjects`` [{id, runtime, path, threads, inputs}], ``protocol`` {warmup_runs, min_runs, min_seconds},
            ``generations``: how many times all processes are started, ``max_seconds`` for all.
        progress: Called after each round.

    Returns:
        ``subjects`` {id: {blocks_ns, rounds, load_ns, first_ns, peak_rss_bytes, rss_before_bytes, version}}, ``before`` and
        ``after`` (the machine's facts), ``seconds`` between them, and ``cpu_s``: CPU time of the measurement itself.

    Raises:
        HarnessError: if a harness process fails or hangs; most likely within seconds, since each subject first runs alone.
        UnavailableError: if it lacks the runtime.
    """
    before, cpu_before, started = runner.facts(), _cpu_seconds(), time.monotonic()
    results = {subject["id"]: _Result() for subject in job["subjects"]}
    for subject in job["subjects"]:
        results[subject["id"]].peak_rss_bytes = _measure_peak_rss(subject)
    runtimes = sorted({subject["runtime"] for subject in job["subjects"]})
    parts = [(runtime, generation) for runtime in runtimes for generation in range(job["generations"])]
    for number, (runtime, generation) in enumerate(parts):
        subjects = [subject for subject in job["subjects"] if subject["runtime"] == runtime]
        now, parts_left = time.monotonic(), len(parts) - number
        deadline = now + (job["max_seconds"] - (now - started)) / parts_left
        order = random.Random(generation)  # noqa: S311  (an order, not a secret)
        _run_generation(subjects, job, results, order, deadline, _partial_progress(progress, number, len(parts), runtime))
    after, seconds, cpu_s = runner.facts(), time.monotonic() - started, _cpu_seconds() - cpu_before
    raw = {
        name: {**result.opened, "blocks_ns": result.blocks_ns, "rounds": result.rounds, "peak_rss_bytes": result.peak_rss_bytes}
        for name, result in results.items()
    }
    return {"subjects": raw, "before": before, "after": after, "seconds": seconds, "cpu_s": cpu_s}


def _partial_progress(progress: Progress, number: int, count: int, text: str) -> Callable[[float], None]:
    return lambda share: progress((number + share) / count, text)


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _measure_peak_rss(subject: Mapping[str, Any]) -> int | None:
    """Return the peak memory of a process that only loads the model and runs one sample: no timing, no other samples."""
    with Harness(subject) as harness:
        harness.send(do="open", samples=1, **_open_arguments(subject))
        harness.send(do="block", runs=MEMORY_RUNS)
        peak: int | None = harness.send(do="stats")["peak_rss_bytes"]
    return peak


def _open_arguments(subject: Mapping[str, Any]) -> dict[str, Any]:
    return {key: subject[key] for key in ("runtime", "path", "threads", "inputs")}


def _run_generation(
    subjects: Sequence[Mapping[str, Any]],
    job: Mapping[str, Any],
    results: Mapping[str, _Result],
    order: random.Random,
    deadline: float,
    progress: Callable[[float], None],
) -> None:
    protocol, generations = job["protocol"], job["generations"]
    with ExitStack() as stack:
        harnesses = {subject["id"]: stack.enter_context(Harness(subject)) for subject in subjects}
        for subject in subjects:
            opened = harnesses[subject["id"]].send(do="open", **_open_arguments(subject))
            results[subject["id"]].opened = results[subject["id"]].opened or opened
        runs = {name: runs_per_block(harness.send(do="block", runs=protocol["warmup_runs"])["ns"]) for name, harness in harnesses.items()}

        def run_block(name: str) -> list[int]:
            block: list[int] = harnesses[name].send(do="block", runs=runs[name], settle=settling_runs(runs[name]))["ns"]
            return block

        for name in order.sample(sorted(harnesses), len(harnesses)):  # a warm-up round, which refines the number of runs per block
            runs[name] = runs_per_block(run_block(name))

        def stop(blocks_by_name: Mapping[str, Sequence[Sequence[int]]]) -> bool:
            progress(min(1.0, *(generations * sum(map(len, blocks)) / protocol["min_runs"] for blocks in blocks_by_name.values())))
            return time.monotonic() > deadline or all(is_enough(blocks, protocol, generations) for blocks in blocks_by_name.values())

        for name, blocks in interleave(run_block, sorted(harnesses), stop, order).items():
            results[name].blocks_ns += blocks
            results[name].rounds.append(len(blocks))


def interleave(
    run_block: Callable[[str], list[int]],
    names: Sequence[str],
    stop: Callable[[Mapping[str, Sequence[Sequence[int]]]], bool],
    order: random.Random,
) -> dict[str, list[list[int]]]:
    """Run one block of each name, in a random order, round by round until ``stop``."""
    blocks: dict[str, list[list[int]]] = {name: [] for name in names}
    while True:
        for name in order.sample(names, len(names)):
            blocks[name].append(run_block(name))
        if stop(blocks):
            return blocks


def runs_per_block(warmup_ns: Sequence[int]) -> int:
    """Return the number of runs of a block of about ``BLOCK_NS``, from the second half of the warm-up."""
    second_half = sorted(warmup_ns[len(warmup_ns) // 2 :])
    median_ns = second_half[len(second_half) // 2]
    return max(MIN_BLOCK_RUNS, min(MAX_BLOCK_RUNS, BLOCK_NS // max(median_ns, 1)))


def settling_runs(runs: int) -> int:
    """Return the number of runs at the start of a block that are not timed: CPU caches still hold another process's data.

    >>> settling_runs(5), settling_runs(20), settling_runs(400)
    (1, 2, 3)
    """
    return max(1, min(MAX_SETTLE_RUNS, runs // 10))


def is_enough(blocks: Sequence[Sequence[int]], protocol: Mapping[str, Any], generations: int) -> bool:
    """Return whether one of ``generations`` has its part of the runs, seconds and rounds that the protocol demands."""
    runs = sum(len(block) for block in blocks)
    seconds = sum(sum(block) for block in blocks) / 1e9
    is_long_enough = seconds * generations >= protocol["min_seconds"] or runs * generations >= MAX_RUNS
    return runs * generations >= protocol["min_runs"] and is_long_enough and len(blocks) >= MIN_ROUNDS


class Harness:
    """A harness process and its pipes; it ends when its input closes, so it does not outlive this process."""

    def __init__(self, subject: Mapping[str, Any]) -> None:
        self.subject = subject

    def __enter__(self) -> Self:
        """Start the process."""
        self.stderr = tempfile.TemporaryFile()  # a pipe that nobody reads would fill up
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(runner.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
            env={name: os.environ[name] for name in INHERITED_VARIABLES if name in os.environ},
        )
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # a command was not read
                    continue
        self.stderr.close()

    def send(self, **command: Any) -> dict[str, Any]:
        """Send a command and return the reply.

        Raises:
            HarnessError: if the process has ended or does not reply.
            UnavailableError: if the runtime is missing.
        """
        import select

        stdin, stdout = self.process.stdin, self.process.stdout
        if stdin is None or stdout is None:
            raise HarnessError(self.subject["id"], "the harness has no pipes")
        try:
            stdin.write(json.dumps(command) + "\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._exit_error() from None
        if not select.select([stdout], [], [], TIMEOUT_S)[0]:
            raise HarnessError(self.subject["id"], f"the harness did not reply to '{command['do']}' within {TIMEOUT_S} s")
        line = stdout.readline()
        if not line.endswith("\n"):
            raise self._exit_error()
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _exit_error(self) -> HarnessError | UnavailableError:
        code = self.process.wait(TIMEOUT_S)
        self.stderr.seek(0)
        lines = [line.strip() for line in self.stderr.read().decode(errors="replace").splitlines() if line.strip()]
        last_line = printable(lines[-1]) if lines else "none"
        runtime = self.subject["runtime"]
        if "ModuleNotFoundError" in last_line or "ImportError" in last_line:
            package = registry.runtime(runtime).PACKAGE
            return UnavailableError(f"measure: {runtime} cannot be imported ({last_line}); run: pip install {package}")
        status = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        return HarnessError(self.subject["id"], f"the harness ended with {status}; last line of its output: {last_line}")
