# SPDX-License-Identifier: Apache-2.0
"""Measure: candidates and the teacher in float32 on the same runtime, interleaved, on a device. Never from the cache."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekd import locks, registry
from edgekd.digests import file_digest
from edgekd.domain.measurement import Measurement
from edgekd.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from edgekd.domain.target import Protocol, Target
    from edgekd.ports import Device, Progress

GENERATIONS = 3  # processes are started anew so often: what differs from process to process is part of the interval
BUSY_LOAD = 0.5  # of a core, beside our own: above it a note is made


@dataclass(frozen=True, slots=True)
class Subject:
    """One model file to measure at one setting; ``name`` is a candidate's id or ``teacher``."""

    name: str
    runtime: str
    path: Path
    threads: int
    inputs: Sequence[Path] = ()

    @property
    def key(self) -> str:
        """Return a name that is unique in a job."""
        return f"{self.name} on {self.runtime}, {self.threads} threads"


def measure(
    subjects: Sequence[Subject], protocol: Protocol, device: Device, progress: Progress, waiting: Callable[[], None] | None = None
) -> list[Measurement]:
    """Measure subjects; the machine is held alone meanwhile.

    Raises:
        UnavailableError: if the device or a runtime is not there.
        StageError: if the harness fails.
    """
    job: dict[str, Any] = {
        "subjects": [
            {
                "id": subject.key,
                "runtime": subject.runtime,
                "path": str(subject.path),
                "threads": subject.threads,
                "inputs": [str(path) for path in subject.inputs],
            }
            for subject in subjects
        ],
        "protocol": {"warmup_runs": protocol.warmup_runs, "min_runs": protocol.min_runs, "min_seconds": protocol.min_seconds},
        "generations": GENERATIONS,
    }
    with locks.machine_exclusive(waiting):
        begun = time.monotonic()
        found: Any = device.measure(job, progress)
    environment = {
        "before": found["before"],
        "after": found["after"],
        "device": device.KIND,
        "generations": GENERATIONS,
        "seconds": time.monotonic() - begun,
    }
    notes = remarks(found["before"], found["after"], protocol)
    return [_measurement(subject, found["subjects"][subject.key], protocol, environment, notes) for subject in subjects]


def measure_files(paths: Sequence[Path], target: Target, threads: Sequence[int], device: Device, progress: Progress) -> list[Measurement]:
    """Measure model files without a recipe, on random inputs; the runtime follows from the suffix.

    Raises:
        UsageError: if a file is missing or of no known format.
    """
    formats = {registry.runtime(name).FORMAT: name for name in registry.names("runtimes")}
    problems = [f"{path}: no such file" for path in paths if not path.is_file()]
    problems += [
        f"{path}: is no model file; expected one that ends in .{' or .'.join(sorted(formats))}"
        for path in paths
        if path.suffix[1:] not in formats
    ]
    if problems:
        raise UsageError("\n".join(problems))
    settings = {entry.name: entry.threads for entry in target.runtimes}
    subjects = []
    for path in paths:
        name = formats[path.suffix[1:]]
        subjects += [Subject(str(path), name, path, count) for count in (tuple(threads) or settings.get(name, (1,)))]
    return measure(subjects, target.protocol, device, progress)


def remarks(before: Mapping[str, Any], after: Mapping[str, Any], protocol: Protocol) -> tuple[str, ...]:
    """Return what about the machine's state may have moved the numbers."""
    notes = []
    if (before["load"] or 0) > BUSY_LOAD:
        notes.append(f"the machine was busy before measuring (load average {before['load']:.2f} on {before['cores']} cores)")
    if protocol.governor and before["governor"] not in {protocol.governor, "unknown"}:
        notes.append(f"the governor is {before['governor']}; the profile asks for {protocol.governor}")
    if before["governor"] == "unknown":
        notes.append("the governor cannot be read on this machine: unknown")
    hottest = max((fact["temp_c"] for fact in (before, after) if fact["temp_c"] is not None), default=None)
    if protocol.max_temp_c is not None and hottest is not None and hottest > protocol.max_temp_c:
        notes.append(f"the machine was at {hottest:.0f} C; the profile allows {protocol.max_temp_c} C")
    return tuple(notes)


def _measurement(
    subject: Subject, raw: Mapping[str, Any], protocol: Protocol, environment: Mapping[str, Any], notes: tuple[str, ...]
) -> Measurement:
    return Measurement(
        subject=subject.name,
        runtime=subject.runtime,
        runtime_version=raw["version"],
        threads=subject.threads,
        model_digest=file_digest(subject.path),
        blocks_ns=tuple(tuple(block) for block in raw["blocks_ns"]),
        warmup_runs=protocol.warmup_runs,
        load_ns=raw["load_ns"],
        first_ns=raw["first_ns"],
        peak_rss_bytes=raw["peak_rss_bytes"],
        environment={**environment, "rss_before_bytes": raw["rss_before_bytes"]},
        notes=notes,
    )
