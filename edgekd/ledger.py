# SPDX-License-Identifier: Apache-2.0
"""The cost of a student: what was trained and asked for it, whenever that was, and how many inferences win it back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from edgekd.case import teacher_of
from edgekd.domain.recipe import DISTILLED, PSEUDO, TWINS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgekd.case import Case
    from edgekd.domain.measurement import Measurement

    Cost = dict[str, Any]

PARTS = ("teach", "supervise", "search", "distill", "sizes", "twins")


def cost(case: Case, chosen: Measurement | None, measurements: Sequence[Measurement]) -> Cost:
    """Return the cost by parts, for a report, and after how many inferences on the device it is won back against the teacher's.

    ``samples`` are those that were answered or trained on, as often as they were; ``bytes`` lie in the cache.
    """
    from edgekd import stats

    rows: dict[str, dict[str, Any]] = {name: {"part": name, "seconds": 0.0, "samples": 0, "bytes": 0} for name in PARTS}
    for name, item in case.done.items():
        if (part := _part(name, item.step.stage)) is not None:
            rows[part]["seconds"] += item.entry.seconds
            rows[part]["samples"] += item.entry.metrics.get("samples", 0)
            rows[part]["bytes"] += sum(artifact.size_bytes for artifact in item.entry.artifacts.values())
    parts = [{**row, "seconds": round(row["seconds"], 3)} for row in rows.values() if row["bytes"]]
    teacher = teacher_of(chosen, measurements)
    saved_ns = 0.0 if teacher is None or chosen is None else stats.median(teacher.samples_ns()) - stats.median(chosen.samples_ns())
    seconds = sum(row["seconds"] for row in parts)
    return {"parts": parts, "paid_back_after": math.ceil(seconds * 1e9 / saved_ns) if saved_ns > 0 else None}


def unpaid(case: Case, found: Cost) -> str | None:
    """Return the remark that training is not won back within the inferences that the recipe allows, as measured, or None."""
    limit, after = case.plan.recipe.distill.paid_back_within, found["paid_back_after"]
    if limit is None or (after is not None and after <= limit):
        return None
    told = "is unknown without a latency of both" if after is None else f"takes {after:,} inferences as measured"
    return f"to win back all training, the teacher's and the twins' too, {told}; distill.paid_back_within = {limit:,}"


def _part(name: str, stage: str) -> str | None:
    """Return the part of the ledger to which a step belongs, or None."""
    words = set(name.split("/")[1:])
    if words & {DISTILLED, PSEUDO, *TWINS}:
        return "twins" if stage in {"supervise", "distill"} else None
    if stage == "distill":
        return "search" if "search" in words else "sizes" if "size" in words else stage
    return stage if stage in PARTS else None
