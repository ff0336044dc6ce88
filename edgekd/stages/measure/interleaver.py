# SPDX-License-Identifier: Apache-2.0
"""The interleaver, which all kinds of devices share: one harness process per subject, with interleaved blocks of runs."""

from __future__ import annotations

import random
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.stages.measure import harness

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgekd.domain.artifact import Json
    from edgekd.ports import Connection, Progress

BLOCK_NS = 40_000_000  # long enough to outweigh the switch between processes, short enough for the same background load
MAX_BLOCK_RUNS = 1000
MIN_BLOCK_RUNS = 5
MAX_SETTLE_RUNS = 3  # the first run after another process takes up to 3 times as long; from the fourth on, times are steady
MAX_RUNS = 20_000  # per subject: a model that takes microseconds does not need seconds of runs
MIN_ROUNDS = 4  # per generation: a round is the unit of the interval
MEMORY_RUNS = 10


@dataclass(slots=True)
class _Result:
    """The result of one subject so far: ``opened`` of its first process, ``rounds`` of each generation."""

    opened: Mapping[str, Json] = field(default_factory=dict)
    blocks_ns: list[list[int]] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    peak_rss_bytes: int | None = None


def measure(job: Mapping[str, Any], connection: Connection, progress: Progress) -> Mapping[str, Json]:
    """Measure the subjects on a device, interleaved with those of the same runtime, one runtime after the other.

    Args:
        job: ``subjects`` [{id, runtime, path, threads, inputs}], ``protocol`` {warmup_runs, min_runs, min_seconds},
            ``generations``: how many times all processes are started, ``max_seconds`` for all.
        connection: The device, to which this process has exclusive access.
        progress: Called after each round.

    Returns:
        ``subjects`` {id: {blocks_ns, rounds, load_ns, first_ns, peak_rss_bytes, rss_before_bytes, version}}, ``before`` and
        ``after`` (the device's facts), ``seconds`` between them, and ``cpu_s``: CPU time of the measurement itself.

    Raises:
        HarnessError: if a harness process fails or hangs; most likely within seconds, since each subject first runs alone.
        UnavailableError: if the device lacks the runtime, or the connection to it ends.
    """
    pushed = [_push(subject, connection) for subject in job["subjects"]]
    before, cpu_before, started = connection.facts(), connection.cpu_seconds(), time.monotonic()
    results = {subject["id"]: _Result() for subject in pushed}
    for subject in pushed:
        results[subject["id"]].peak_rss_bytes = _measure_peak_rss(subject, connection)
    runtimes = sorted({subject["runtime"] for subject in pushed})
    parts = [(runtime, generation) for runtime in runtimes for generation in range(job["generations"])]
    for number, (runtime, generation) in enumerate(parts):
        subjects = [subject for subject in pushed if subject["runtime"] == runtime]
        now, parts_left = time.monotonic(), len(parts) - number
        deadline = now + (job["max_seconds"] - (now - started)) / parts_left
        order = random.Random(generation)  # noqa: S311  (an order, not a secret)
        report = _partial_progress(progress, number, len(parts), runtime)
        with ExitStack() as stack:
            harnesses = {subject["id"]: stack.enter_context(harness.start(connection, subject)) for subject in subjects}
            _run_generation(harnesses, job, results, order, deadline, report)
    after, seconds, cpu_s = connection.facts(), time.monotonic() - started, connection.cpu_seconds() - cpu_before
    raw = {
        name: {**result.opened, "blocks_ns": result.blocks_ns, "rounds": result.rounds, "peak_rss_bytes": result.peak_rss_bytes}
        for name, result in results.items()
    }
    return {"subjects": raw, "before": before, "after": after, "seconds": seconds, "cpu_s": cpu_s}


def _partial_progress(progress: Progress, number: int, count: int, text: str) -> Callable[[float], None]:
    return lambda share: progress((number + share) / count, text)


def _push(subject: Mapping[str, Any], connection: Connection) -> Mapping[str, Any]:
    """Return the subject with the paths of its files on the device."""
    inputs = [connection.push(Path(path)) for path in subject["inputs"]]
    return {**subject, "path": connection.push(Path(subject["path"])), "inputs": inputs}


def _measure_peak_rss(subject: Mapping[str, Any], connection: Connection) -> int | None:
    """Return the peak memory of a process that only loads the model and runs one sample: no timing, no other samples."""
    with harness.start(connection, subject) as process:
        process.send(do="open", samples=1, **_open_arguments(subject))
        process.send(do="block", runs=MEMORY_RUNS)
        peak: int | None = process.send(do="stats")["peak_rss_bytes"]
    return peak


def _open_arguments(subject: Mapping[str, Any]) -> dict[str, Any]:
    return {key: subject[key] for key in ("runtime", "path", "threads", "inputs")}


def _run_generation(
    harnesses: Mapping[str, harness.Harness],
    job: Mapping[str, Any],
    results: Mapping[str, _Result],
    order: random.Random,
    deadline: float,
    progress: Callable[[float], None],
) -> None:
    protocol, generations = job["protocol"], job["generations"]
    for name, process in harnesses.items():
        opened = process.send(do="open", **_open_arguments(process.subject))
        results[name].opened = results[name].opened or opened
    runs = {name: runs_per_block(process.send(do="block", runs=protocol["warmup_runs"])["ns"]) for name, process in harnesses.items()}

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
