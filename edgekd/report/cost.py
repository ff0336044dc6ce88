# SPDX-License-Identifier: Apache-2.0
"""The cost of a student: everything that was computed to train it, whenever that was, and after how many inferences it breaks even."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from edgekd.domain.recipe import BASELINES, DISTILLED, PSEUDO_LABELS
from edgekd.report.target_run import teacher_measurement

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgekd.domain.measurement import Measurement
    from edgekd.report.target_run import TargetRun

PARTS = ("teach", "soft_targets", "search", "distill", "sizes", "baselines")


def training_cost(target_run: TargetRun, chosen: Measurement | None, measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Return the cost by parts, and the number of inferences on the device that save as much time, compared with the teacher.

    ``samples`` counts every pass over a sample, in training or through the teacher; ``bytes`` are those in the cache.
    """
    from edgekd.stats import intervals

    rows: dict[str, dict[str, Any]] = {name: {"part": name, "seconds": 0.0, "samples": 0, "bytes": 0} for name in PARTS}
    for name, completed in target_run.completed.items():
        if (part := _cost_part(name, completed.step.stage)) is not None:
            rows[part]["seconds"] += completed.entry.seconds
            rows[part]["samples"] += completed.entry.metrics.get("samples", 0)
            rows[part]["bytes"] += sum(artifact.size_bytes for artifact in completed.entry.artifacts.values())
    parts = [{**row, "seconds": round(row["seconds"], 3)} for row in rows.values() if row["bytes"]]
    teacher = teacher_measurement(chosen, measurements)
    saved_ns = 0.0 if teacher is None or chosen is None else intervals.median(teacher.samples_ns()) - intervals.median(chosen.samples_ns())
    seconds = sum(row["seconds"] for row in parts)
    return {"parts": parts, "break_even_inferences": math.ceil(seconds * 1e9 / saved_ns) if saved_ns > 0 else None}


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
