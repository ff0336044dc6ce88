# SPDX-License-Identifier: Apache-2.0
"""This machine: the harness runs in processes of its own, one a subject, their blocks interleaved."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from edgekd.errors import StageError, UnavailableError
from edgekd.harness import runner

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgekd.domain.artifact import Json
    from edgekd.ports import Progress

KIND = "local"
BLOCK_NS = 40_000_000  # a block is long enough to outlast the switch between processes, short enough to share the weather
MAX_BLOCK_RUNS = 200
MIN_BLOCK_RUNS = 5
MAX_RUNS = 20_000  # of one subject: a model of microseconds needs no seconds to be known
MIN_ROUNDS = 4  # of each generation: the unit of the interval is the round
TIMEOUT_S = 600


def measure(job: Mapping[str, Any], progress: Progress) -> Mapping[str, Json]:
    """Measure subjects that share a runtime in turns, runtimes one after the other.

    Args:
        job: ``subjects`` [{id, runtime, path, threads, inputs}], ``protocol`` {warmup_runs, min_runs, min_seconds},
            ``generations``: how many times all processes are started anew.
        progress: Told after each round.

    Returns:
        ``subjects`` {id: {blocks_ns, load_ns, first_ns, peak_rss_bytes, rss_before_bytes, version}}, ``before`` and ``after``
        (the machine's facts).

    Raises:
        StageError: if a harness process fails or hangs.
        UnavailableError: if it lacks the runtime.
    """
    before = runner.facts()
    found: dict[str, Any] = {subject["id"]: {"blocks_ns": []} for subject in job["subjects"]}
    runtimes = sorted({subject["runtime"] for subject in job["subjects"]})
    total = len(runtimes) * job["generations"]
    for number, runtime in enumerate(runtimes):
        group = [subject for subject in job["subjects"] if subject["runtime"] == runtime]
        for generation in range(job["generations"]):
            begun = number * job["generations"] + generation
            _generation(group, job, found, random.Random(generation), lambda share, b=begun: progress((b + share) / total, f"{runtime}"))  # noqa: S311,B023  (an order, no secret; called at once)
    return {"subjects": found, "before": before, "after": runner.facts()}


def _generation(
    group: Sequence[Mapping[str, Any]], job: Mapping[str, Any], found: dict[str, Any], order: random.Random, progress: Any
) -> None:
    protocol = job["protocol"]
    share = job["generations"]
    with ExitStack() as stack:
        harnesses = {subject["id"]: stack.enter_context(Harness(subject)) for subject in group}
        for subject in group:
            opened = harnesses[subject["id"]].ask(do="open", **{key: subject[key] for key in ("runtime", "path", "threads", "inputs")})
            for key in ("load_ns", "first_ns", "version", "rss_before_bytes"):
                found[subject["id"]].setdefault(key, opened[key])  # of the first generation
        runs = {name: runs_per_block(harness.ask(do="block", runs=protocol["warmup_runs"])["ns"]) for name, harness in harnesses.items()}
        taken: dict[str, list[list[int]]] = {name: [] for name in harnesses}
        while not all(is_enough(blocks, protocol, share) for blocks in taken.values()):
            for name in order.sample(sorted(harnesses), len(harnesses)):
                taken[name].append(harnesses[name].ask(do="block", runs=runs[name])["ns"])
            progress(min(1.0, *(len(b) * len(b[0]) * share / protocol["min_runs"] for b in taken.values())))
        for name, harness in harnesses.items():
            found[name]["blocks_ns"] += taken[name]
            peak = harness.ask(do="stats")["peak_rss_bytes"]
            found[name]["peak_rss_bytes"] = max(found[name].get("peak_rss_bytes") or 0, peak or 0) or None


def runs_per_block(warmup_ns: Sequence[int]) -> int:
    """Return how many runs make a block of about ``BLOCK_NS``, by the second half of the warm-up."""
    late = sorted(warmup_ns[len(warmup_ns) // 2 :])
    middle = late[len(late) // 2]
    return max(MIN_BLOCK_RUNS, min(MAX_BLOCK_RUNS, BLOCK_NS // max(middle, 1)))


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
        command = [sys.executable, str(Path(runner.__file__))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None and not pipe.closed:
                pipe.close()
        self.process.kill()
        self.process.wait()

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
        said = [line for line in self.process.communicate()[1].splitlines() if line.strip()]
        last = said[-1] if said else "nothing"
        if "ModuleNotFoundError" in last or "ImportError" in last:
            return UnavailableError(f"measure: {self.subject['runtime']} is not installed ({last}); run: pip install 'edgekd[litert,onnx]'")
        return StageError(
            f"measure: {self.subject['id']}: the harness ended with exit code {self.process.returncode}; it said last: {last}"
        )
