# SPDX-License-Identifier: Apache-2.0
"""Measure: candidates and the float32 teacher on the same runtime, interleaved, on a device. Never cached."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekd import registry
from edgekd.domain.measurement import TEACHER, Measurement
from edgekd.errors import HarnessError, StageError, StorageError, UsageError
from edgekd.stages.measure import interleaver
from edgekd.store.digests import file_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from edgekd.domain.target import Protocol, Target
    from edgekd.ports import Connection, Progress

GENERATIONS = 3  # so many processes, one after another: what differs between processes is part of the interval
MAX_SECONDS = 600.0  # for all subjects of a job: a slow model gets fewer runs than the protocol asks for, and a note
BUSY_CORES = 0.1  # used by other processes during the measurement: more than this is noted
STEAL_SHARE = 0.02  # of CPU time taken by a hypervisor: more than this is noted
PI_THROTTLED_NOW = 0xF  # under-voltage, frequency capped, throttled, soft temperature limit


@dataclass(frozen=True, slots=True)
class Subject:
    """One model file to measure at one setting; ``name`` is a candidate's id or ``teacher``. ``inputs``: random if empty."""

    name: str
    runtime: str
    path: Path
    threads: int
    inputs: Sequence[Path] = ()


def measure(
    subjects: Sequence[Subject],
    protocol: Protocol,
    connection: Connection,
    progress: Progress,
    on_wait: Callable[[str], None] | None = None,
) -> list[Measurement]:
    """Measure subjects, with exclusive access to the device; ``on_wait`` is called if it must be waited for.

    Raises:
        UnavailableError: if the connection to the device ends, or a runtime is missing.
        HarnessError: if the harness of a subject fails.
    """
    named = _name_subjects(subjects)
    job: dict[str, Any] = {
        "subjects": [
            {
                "id": name,
                "runtime": subject.runtime,
                "path": str(subject.path),
                "threads": subject.threads,
                "inputs": [str(path) for path in subject.inputs],
            }
            for name, subject in named.items()
        ],
        "protocol": {"warmup_runs": protocol.warmup_runs, "min_runs": protocol.min_runs, "min_seconds": protocol.min_seconds},
        "generations": GENERATIONS,
        "max_seconds": MAX_SECONDS,
    }
    with connection.lease(on_wait):
        output: Any = interleaver.measure(job, connection, progress)
    environment = {name: output[name] for name in ("before", "after", "seconds", "cpu_s")}
    environment |= {"device": connection.kind, "generations": GENERATIONS}
    notes = environment_notes(environment, protocol)
    return [_measurement(subject, output["subjects"][name], protocol, environment, notes) for name, subject in named.items()]


def measure_sound(
    subjects: Sequence[Subject],
    protocol: Protocol,
    connection: Connection,
    progress: Progress,
    on_wait: Callable[[str], None] | None = None,
) -> tuple[list[Measurement], dict[tuple[str, str], str]]:
    """Measure the model files that the device can run; nothing if it can run no candidate.

    Returns:
        The measurements, and why others have none, by the subject's name and runtime.

    Raises:
        UnavailableError: if the device or a runtime is missing.
    """
    failures: dict[tuple[str, str], str] = {}
    while any(subject.name != TEACHER for subject in subjects):
        try:
            return measure(subjects, protocol, connection, progress, on_wait), failures
        except HarnessError as error:
            failed = _name_subjects(subjects)[error.subject]
            failures[failed.name, failed.runtime] = str(error)
        subjects = [subject for subject in subjects if (subject.name, subject.runtime) not in failures]
    return [], failures


def measure_files(
    paths: Sequence[Path],
    target: Target,
    threads: Sequence[int],
    connection: Connection,
    progress: Progress,
    on_wait: Callable[[str], None] | None = None,
) -> list[Measurement]:
    """Measure model files without a recipe, on random inputs; the runtime follows from the suffix.

    A file that is named twice is measured twice, which shows the noise. ``threads`` replaces the target's thread counts.

    Raises:
        UsageError: if a file is missing, of no known format, or one that its runtime cannot load and run.
        UnavailableError: if a runtime is not installed.
    """
    formats = {registry.runtime(name).FORMAT: name for name in registry.names("runtimes")}
    problems = [f"{path}: {'is not a file' if path.exists() else 'no such file'}" for path in paths if not path.is_file()]
    problems += [
        f"{path}: is not a model file; expected one that ends in .{' or .'.join(sorted(formats))}"
        for path in paths
        if path.suffix[1:] not in formats
    ]
    problems += [f"{path}: cannot be read; its permissions forbid it" for path in paths if path.is_file() and not os.access(path, os.R_OK)]
    if problems:
        raise UsageError("\n".join(problems))
    settings = {entry.name: entry.threads for entry in target.runtimes}
    subjects = []
    for path in paths:
        name = formats[path.suffix[1:]]
        subjects += [Subject(str(path), name, path, count) for count in (tuple(threads) or settings.get(name, (1,)))]
    try:
        return measure(subjects, target.protocol, connection, progress, on_wait)
    except StorageError:
        raise
    except StageError as error:  # the harness is a process of its own, which only loads and runs the user's file
        raise UsageError(f"{error}; expected model files that their runtime loads and runs") from error


def environment_notes(environment: Mapping[str, Any], protocol: Protocol) -> tuple[str, ...]:
    """Return notes on whatever in the machine's state may have affected the numbers.

    Args:
        environment: ``before`` and ``after`` (facts), ``seconds`` between them, ``cpu_s``: CPU time of the measurement itself,
            ``device``: its kind.
        protocol: The target's.
    """
    before, after, seconds = environment["before"], environment["after"], environment["seconds"]
    notes = []
    if before["busy_s"] is not None and after["busy_s"] is not None:
        busy_cores = (after["busy_s"] - before["busy_s"] - environment["cpu_s"]) / seconds
        if busy_cores > BUSY_CORES:
            notes.append(f"noisy: other processes used {busy_cores:.1f} of {before['cores']} cores while measuring")
        steal_share = (after["steal_s"] - before["steal_s"]) / seconds / before["cores"]
        if steal_share > STEAL_SHARE:
            notes.append(f"noisy: the hypervisor took {100 * steal_share:.0f} % of the CPU time while measuring")
    if protocol.governor and before["governor"] not in {protocol.governor, "unknown"}:
        notes.append(f"the governor is {before['governor']}; the profile asks for {protocol.governor}")
    if before["governor"] == "unknown":
        machine = "this machine" if environment["device"] == "local" else "the device"
        notes.append(f"the governor cannot be read on {machine}: unknown")
    hottest = max((fact["temp_c"] for fact in (before, after) if fact["temp_c"] is not None), default=None)
    if protocol.max_temp_c is not None and hottest is not None and hottest > protocol.max_temp_c:
        notes.append(f"the machine was at {hottest:.0f} C; the profile allows {protocol.max_temp_c} C")
    if after["throttled"] is not None and (before["throttled"] != after["throttled"] or _is_throttled(after)):
        notes.append(f"noisy: the CPU was throttled while measuring (state {before['throttled']} -> {after['throttled']})")
    return tuple(notes)


def _is_throttled(fact: Mapping[str, Any]) -> bool:
    return fact["arch"] != "x86_64" and bool(fact["throttled"] & PI_THROTTLED_NOW)  # on x86 it is a count since boot


def _name_subjects(subjects: Sequence[Subject]) -> dict[str, Subject]:
    """Return the subjects by names that are unique in the job."""
    named: dict[str, Subject] = {}
    for subject in subjects:
        name = f"{subject.name} on {subject.runtime}, {subject.threads} thread{'s' if subject.threads > 1 else ''}"
        named[f"{name}, again ({len(named)})" if name in named else name] = subject
    return named


def _measurement(
    subject: Subject, raw: Mapping[str, Any], protocol: Protocol, environment: Mapping[str, Any], notes: tuple[str, ...]
) -> Measurement:
    runs = sum(map(len, raw["blocks_ns"]))
    if runs < protocol.min_runs:
        notes = (
            *notes,
            f"{subject.name}: {runs} runs in the {MAX_SECONDS:.0f} s that a measurement may take; the profile asks for {protocol.min_runs}",
        )
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
        environment={**environment, "rss_before_bytes": raw["rss_before_bytes"], "rounds": raw["rounds"]},
        notes=notes,
    )
