# SPDX-License-Identifier: Apache-2.0
"""The cost of a student: what was trained and asked for it, whenever that was, and how many inferences win it back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from edgekd.domain.recipe import BASELINES, DISTILLED, PSEUDO_LABELS
from edgekd.report.target_run import teacher_measurement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgekd.domain.measurement import Measurement
    from edgekd.report.target_run import TargetRun

    Cost = dict[str, Any]

PARTS = ("teach", "soft_targets", "search", "distill", "sizes", "twins")


def training_cost(case: TargetRun, chosen: Measurement | None, measurements: Sequence[Measurement]) -> Cost:
    """Return the cost by parts, for a report, and after how many inferences on the device it is won back against the teacher's.

    ``samples`` are those that were answered or trained on, as often as they were; ``bytes`` lie in the cache.
    """
    from edgekd.stats import intervals

    rows: dict[str, dict[str, Any]] = {name: {"part": name, "seconds": 0.0, "samples": 0, "bytes": 0} for name in PARTS}
    for name, item in case.done.items():
        if (part := _part(name, item.step.stage)) is not None:
            rows[part]["seconds"] += item.entry.seconds
            rows[part]["samples"] += item.entry.metrics.get("samples", 0)
            rows[part]["bytes"] += sum(artifact.size_bytes for artifact in item.entry.artifacts.values())
    parts = [{**row, "seconds": round(row["seconds"], 3)} for row in rows.values() if row["bytes"]]
    teacher = teacher_measurement(chosen, measurements)
    saved_ns = 0.0 if teacher is None or chosen is None else intervals.median(teacher.samples_ns()) - intervals.median(chosen.samples_ns())
    seconds = sum(row["seconds"] for row in parts)
    return {"parts": parts, "break_even_inferences": math.ceil(seconds * 1e9 / saved_ns) if saved_ns > 0 else None}


def break_even_note(case: TargetRun, found: Cost) -> str | None:
    """Return the remark that training is not won back within the inferences that the recipe allows, as measured, or None."""
    limit, after = case.plan.recipe.distill.break_even_inferences, found["break_even_inferences"]
    if limit is None or (after is not None and after <= limit):
        return None
    told = "is unknown without a latency of both" if after is None else f"takes {after:,} inferences as measured"
    return f"to win back all training, the teacher's and the twins' too, {told}; distill.break_even_inferences = {limit:,}"


def _part(name: str, stage: str) -> str | None:
    """Return the part of the ledger to which a step belongs, or None."""
    words = set(name.split("/")[1:])
    if words & {DISTILLED, PSEUDO_LABELS, *BASELINES}:
        return "twins" if stage in {"soft_targets", "distill"} else None
    if stage == "distill":
        return "search" if "search" in words else "sizes" if "size" in words else stage
    return stage if stage in PARTS else None
