# SPDX-License-Identifier: Apache-2.0
"""This machine: the harness runs in processes of its own, one a subject, their blocks interleaved."""

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
from edgekd.errors import StageError, UnavailableError
from edgekd.harness import runner

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgekd.domain.artifact import Json
    from edgekd.ports import Progress

KIND = "local"
BLOCK_NS = 40_000_000  # a block is long enough to outlast the switch between processes, short enough to share the weather
MAX_BLOCK_RUNS = 1000
MIN_BLOCK_RUNS = 5
MAX_SETTLE_RUNS = 3  # the first run after another process ran takes up to 3 times as long, from the fourth on it is steady
MAX_RUNS = 20_000  # of one subject: a model of microseconds needs no seconds to be known
MIN_ROUNDS = 4  # of each generation: the unit of the interval is the round
MEMORY_RUNS = 10
TIMEOUT_S = 600
# what a harness inherits; all else might move the numbers (LD_PRELOAD, OMP_NUM_THREADS, MALLOC_ARENA_MAX ...)
INHERITED = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH", "TMPDIR", "VIRTUAL_ENV")


@dataclass(slots=True)
class _Taken:
    """What one subject gave so far; ``rounds`` are those of each generation."""

    first: Mapping[str, Json] = field(default_factory=dict)
    blocks: list[list[int]] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    peak_rss_bytes: int | None = None


def measure(job: Mapping[str, Any], progress: Progress) -> Mapping[str, Json]:
    """Measure subjects that share a runtime in turns, runtimes one after the other.

    Args:
        job: ``subjects`` [{id, runtime, path, threads, inputs}], ``protocol`` {warmup_runs, min_runs, min_seconds},
            ``generations``: how many times all processes are started anew, ``max_seconds`` for all.
        progress: Told after each round.

    Returns:
        ``subjects`` {id: {blocks_ns, rounds, load_ns, first_ns, peak_rss_bytes, rss_before_bytes, version}}, ``before`` and
        ``after`` (the machine's facts), ``seconds`` between them, and ``own_s``, the processor time that measuring took.

    Raises:
        StageError: if a harness process fails or hangs.
        UnavailableError: if it lacks the runtime.
    """
    before, own_before, began = runner.facts(), _own_seconds(), time.monotonic()
    found = {subject["id"]: _Taken() for subject in job["subjects"]}
    runtimes = sorted({subject["runtime"] for subject in job["subjects"]})
    turns = [(runtime, generation) for runtime in runtimes for generation in range(job["generations"])]
    for number, (runtime, generation) in enumerate(turns):
        group = [subject for subject in job["subjects"] if subject["runtime"] == runtime]
        if generation == 0:
            for subject in group:
                found[subject["id"]].peak_rss_bytes = _peak_rss_bytes(subject)
        now, left = time.monotonic(), len(turns) - number
        deadline = now + (job["max_seconds"] - (now - began)) / left
        order = random.Random(generation)  # noqa: S311  (an order, no secret)
        _generation(group, job, found, order, deadline, _part(progress, number, len(turns), runtime))
    after, seconds, own_s = runner.facts(), time.monotonic() - began, _own_seconds() - own_before
    subjects = {
        name: {**taken.first, "blocks_ns": taken.blocks, "rounds": taken.rounds, "peak_rss_bytes": taken.peak_rss_bytes}
        for name, taken in found.items()
    }
    return {"subjects": subjects, "before": before, "after": after, "seconds": seconds, "own_s": own_s}


def _part(progress: Progress, number: int, count: int, what: str) -> Callable[[float], None]:
    return lambda share: progress((number + share) / count, what)


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _peak_rss_bytes(subject: Mapping[str, Any]) -> int | None:
    """Return the peak of a process that does nothing but load the model and run one sample: no timing, no other samples."""
    with Harness(subject) as harness:
        harness.ask(do="open", samples=1, **_opening(subject))
        harness.ask(do="block", runs=MEMORY_RUNS)
        peak: int | None = harness.ask(do="stats")["peak_rss_bytes"]
    return peak


def _opening(subject: Mapping[str, Any]) -> dict[str, Any]:
    return {key: subject[key] for key in ("runtime", "path", "threads", "inputs")}


def _generation(
    group: Sequence[Mapping[str, Any]],
    job: Mapping[str, Any],
    found: Mapping[str, _Taken],
    order: random.Random,
    deadline: float,
    progress: Callable[[float], None],
) -> None:
    protocol, share = job["protocol"], job["generations"]
    with ExitStack() as stack:
        harnesses = {subject["id"]: stack.enter_context(Harness(subject)) for subject in group}
        for subject in group:
            opened = harnesses[subject["id"]].ask(do="open", **_opening(subject))
            found[subject["id"]].first = found[subject["id"]].first or opened
        runs = {name: runs_per_block(harness.ask(do="block", runs=protocol["warmup_runs"])["ns"]) for name, harness in harnesses.items()}

        def take(name: str) -> list[int]:
            block: list[int] = harnesses[name].ask(do="block", runs=runs[name], settle=settling_runs(runs[name]))["ns"]
            return block

        for name in order.sample(sorted(harnesses), len(harnesses)):  # a round that warms up; it knows better how long a run takes
            runs[name] = runs_per_block(take(name))

        def stop(taken: Mapping[str, Sequence[Sequence[int]]]) -> bool:
            progress(min(1.0, *(share * sum(map(len, blocks)) / protocol["min_runs"] for blocks in taken.values())))
            return time.monotonic() > deadline or all(is_enough(blocks, protocol, share) for blocks in taken.values())

        for name, blocks in in_turns(take, sorted(harnesses), stop, order).items():
            found[name].blocks += blocks
            found[name].rounds.append(len(blocks))


def in_turns(
    take: Callable[[str], list[int]],
    names: Sequence[str],
    stop: Callable[[Mapping[str, Sequence[Sequence[int]]]], bool],
    order: random.Random,
) -> dict[str, list[list[int]]]:
    """Take one block of each name, in a random order, round by round until ``stop``."""
    taken: dict[str, list[list[int]]] = {name: [] for name in names}
    while True:
        for name in order.sample(names, len(names)):
            taken[name].append(take(name))
        if stop(taken):
            return taken


def runs_per_block(warmup_ns: Sequence[int]) -> int:
    """Return how many runs make a block of about ``BLOCK_NS``, by the second half of a warm-up."""
    late = sorted(warmup_ns[len(warmup_ns) // 2 :])
    middle = late[len(late) // 2]
    return max(MIN_BLOCK_RUNS, min(MAX_BLOCK_RUNS, BLOCK_NS // max(middle, 1)))


def settling_runs(runs: int) -> int:
    """Return how many runs at the start of a block are not timed: caches are another process's then.

    >>> settling_runs(5), settling_runs(20), settling_runs(400)
    (1, 2, 3)
    """
    return max(1, min(MAX_SETTLE_RUNS, runs // 10))


def is_enough(blocks: Sequence[Sequence[int]], protocol: Mapping[str, Any], share: int) -> bool:
    """Return whether one of ``share`` equal parts of a measurement has the runs, seconds and rounds that the protocol asks for."""
    runs = sum(len(block) for block in blocks)
    seconds = sum(sum(block) for block in blocks) / 1e9
    long_enough = seconds * share >= protocol["min_seconds"] or runs * share >= MAX_RUNS
    return runs * share >= protocol["min_runs"] and long_enough and len(blocks) >= MIN_ROUNDS


class Harness:
    """A harness process and its pipe; it ends when its input closes, so it never outlives us."""

    def __init__(self, subject: Mapping[str, Any]) -> None:
        self.subject = subject

    def __enter__(self) -> Self:
        """Start the process."""
        self.said = tempfile.TemporaryFile()  # a pipe that nobody reads would fill
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(runner.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            env={name: os.environ[name] for name in INHERITED if name in os.environ},
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
                except BrokenPipeError:  # a command that it did not read
                    continue
        self.said.close()

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command and return the answer.

        Raises:
            StageError: if the process has died or does not answer.
            UnavailableError: if the runtime is missing.
        """
        import select

        stdin, stdout = self.process.stdin, self.process.stdout
        if stdin is None or stdout is None:
            raise StageError(f"measure: {self.subject['id']}: the harness has no pipes")
        try:
            stdin.write(json.dumps(command) + "\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        if not select.select([stdout], [], [], TIMEOUT_S)[0]:
            raise StageError(f"measure: {self.subject['id']}: the harness did not answer '{command['do']}' within {TIMEOUT_S} s")
        line = stdout.readline()
        if not line:
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _died(self) -> StageError | UnavailableError:
        code = self.process.wait(TIMEOUT_S)
        self.said.seek(0)
        said = [line.strip() for line in self.said.read().decode(errors="replace").splitlines() if line.strip()]
        last = said[-1] if said else "nothing"
        runtime = self.subject["runtime"]
        if "ModuleNotFoundError" in last or "ImportError" in last:
            package = registry.runtime(runtime).PACKAGE
            return UnavailableError(f"measure: {runtime} cannot be imported ({last}); run: pip install {package}")
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        return StageError(f"measure: {self.subject['id']}: the harness ended with {how}; it said last: {last}")
