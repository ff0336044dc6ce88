# SPDX-License-Identifier: Apache-2.0
"""The cost of a student: everything that was computed to train it, whenever that was, and after how many inferences it breaks even."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from edgekd.domain.recipe import BASELINES, DISTILLED, PSEUDO_LABELS
from edgekd.report.target_run import teacher_measurement

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgekd.domain.artifact import CacheEntry
    from edgekd.domain.measurement import Measurement
    from edgekd.report.target_run import TargetRun

BUSY_SHARE = 0.1  # of the time in which threads could have run; on a machine with a core for each of them they hardly wait
BUSY_SECONDS = 1.0
PARTS = ("teach", "soft_targets", "search", "distill", "sizes", "baselines")


def training_cost(target_run: TargetRun, chosen: Measurement | None, measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Return the cost by parts, and the number of inferences on the device that save as much time, compared with the teacher.

    ``samples`` counts every pass over a sample, in training or through the teacher; ``bytes`` are those in the cache. Times are those
    when a step ran: ``seconds`` that passed, ``cpu_seconds``, and ``waited_seconds`` of its threads for a core; None if unknown.
    """
    from edgekd.stats import intervals

    entries: dict[str, list[CacheEntry]] = {name: [] for name in PARTS}
    for name, completed in target_run.completed.items():
        if (part := _cost_part(name, completed.step.stage)) is not None:
            entries[part].append(completed.entry)
    parts = [_part_row(part, steps) for part, steps in entries.items() if steps]
    teacher = teacher_measurement(chosen, measurements)
    saved_ns = 0.0 if teacher is None or chosen is None else intervals.median(teacher.samples_ns()) - intervals.median(chosen.samples_ns())
    seconds = sum(row["seconds"] for row in parts)
    return {"parts": parts, "break_even_inferences": math.ceil(seconds * 1e9 / saved_ns) if saved_ns > 0 else None}


def _part_row(part: str, entries: Sequence[CacheEntry]) -> dict[str, Any]:
    metrics: list[Mapping[str, Any]] = [entry.metrics for entry in entries]

    def total(name: str) -> float | None:
        values = [item.get(name) for item in metrics]
        return None if None in values else round(sum(values), 3)  # type: ignore[arg-type]  # numbers

    return {
        "part": part,
        "seconds": round(sum(entry.seconds for entry in entries), 3),
        "cpu_seconds": total("cpu_seconds"),
        "waited_seconds": total("waited_seconds"),
        "samples": sum(item.get("samples", 0) for item in metrics),
        "bytes": sum(artifact.size_bytes for entry in entries for artifact in entry.artifacts.values()),
    }


def busy_note(cost: Mapping[str, Any]) -> str | None:
    """Return a note that training took longer than its CPU time explains, because other processes had the cores, or None.

    Where the kernel does not say how long threads waited for a core, it is at least the time that passed without CPU time.
    """
    texts = []
    for row in cost["parts"]:
        seconds, cpu, waited = row["seconds"], row["cpu_seconds"], row["waited_seconds"]
        if cpu is None:  # a step of an older cache
            continue
        waited = max(0.0, seconds - cpu) if waited is None else waited
        if waited > max(BUSY_SECONDS, BUSY_SHARE * (cpu + waited)):
            texts.append(
                f"{row['part']} {seconds:.0f} s, with {cpu:.0f} s of CPU time and {waited:.0f} s in which threads waited for a core"
            )
    return f"the machine was busy, so training took longer than it needs: {'; '.join(texts)}" if texts else None


def break_even_note(target_run: TargetRun, cost: Mapping[str, Any]) -> str | None:
    """Return a note that training does not break even within the inferences that the recipe allows, as measured, or None."""
    limit, inferences = target_run.plan.recipe.distill.break_even_inferences, cost["break_even_inferences"]
    if limit is None or (inferences is not None and inferences <= limit):
        return None
    measured = "is unknown without a latency of both" if inferences is None else f"takes {inferences:,} inferences as measured"
    training = "all training, that of the teacher and the baselines included"
    return f"to break even with {training}, {measured}; distill.break_even_inferences = {limit:,}"


def _cost_part(name: str, stage: str) -> str | None:
    """Return the part of the cost to which a step belongs, or None."""
    words = set(name.split("/")[1:])
    if words & {DISTILLED, PSEUDO_LABELS, *BASELINES}:
        return "baselines" if stage in {"soft_targets", "distill"} else None
    if stage == "distill":
        return "search" if "search" in words else "sizes" if "size" in words else stage
    return stage if stage in PARTS else None
