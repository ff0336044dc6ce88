# SPDX-License-Identifier: Apache-2.0
"""Numbers in words, for people; shared by the terminal and Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def number(value: float | None, unit: str = "") -> str:
    """Return a number with four significant digits, or ``unknown``."""
    if value is None:
        return "unknown"
    text = f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"  # noqa: PLR2004  (from there on digits are noise)
    return f"{text} {unit}".rstrip() if unit not in {"x", "%"} else f"{text}{' ' if unit == '%' else ''}{unit}"


def interval(pair: Sequence[float] | None) -> str:
    """Return ``[low, high]`` or nothing."""
    return "" if pair is None else f"[{pair[0]:.4g}, {pair[1]:.4g}]"


def limit(check: Mapping[str, Any]) -> str:
    """Return a check's limit with its direction."""
    if check["limit"] is None:
        return ""
    sign = ">=" if check["name"].startswith("min_") else "<="
    return f"{sign} {number(check['limit'], check['unit'])}"


def check_cells(check: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    """Return name, value, interval, limit and outcome of a check."""
    return check["name"], number(check["value"], check["unit"]), interval(check["interval"]), limit(check), check["outcome"]


def shipped_line(document: Mapping[str, Any]) -> str:
    """Return what ships, or that nothing does."""
    choice = document["choice"]
    what = f"{choice['runtime']} {choice['scheme']}, {choice['threads']} thread{'s' if choice['threads'] > 1 else ''}"
    size = f"{choice['size_bytes'] / 1024:.1f} KiB"
    if document["shipped"] is None:
        return f"nothing ships; judged: {what}, {size} ({choice['selected_by']})"
    return f"{document['shipped']}: {what}, {size} ({choice['selected_by']})"


def is_excused(document: Mapping[str, Any]) -> bool:
    """Return whether a model ships that has not passed."""
    return document["shipped"] is not None and document["outcome"] == "INCONCLUSIVE"


EXCUSED = "shipped although it is INCONCLUSIVE, and counted as success: --inconclusive-ok"


def percentile(row: Mapping[str, Any]) -> str:
    """Return a percentile with its interval; one that the number of runs cannot carry is not told."""
    return "n too small" if row["interval"] is None else f"{number(row['ms'])} {interval(row['interval'])}"


def teacher_line(document: Mapping[str, Any]) -> str:
    """Return teacher and student side by side."""
    teacher, student, choice = document["teacher"], document["student"], document["choice"]
    sizes = f"{student['parameters']:,} parameters"
    if teacher["parameters"]:
        sizes += f", the teacher {teacher['parameters']:,} ({teacher['parameters'] / student['parameters']:.1f}x)"
    accuracy = f"accuracy {100 * choice['accuracy']:.2f} %, the teacher {100 * teacher['accuracy']:.2f} %"
    drop = f"drop {choice['drop']['pp']:.2f} pp {interval(choice['drop']['interval_pp'])}"
    speed = choice["speedup"]
    told = f"; speed-up {number(speed['x'], 'x')} {interval(speed['interval'])}" if speed else ""
    return f"{sizes}; {accuracy}, {drop}{told}"


def distillation_line(document: Mapping[str, Any]) -> str | None:
    """Return the verdict on distillation in a line, or None if there is none."""
    found = document["distillation"]
    if found is None:
        return None
    gain = next(row for row in found["gains"] if row["against"] == found["against"])
    closed = "" if found["gap_closed"] is None else f"; {100 * found['gap_closed']:.0f} % of the gap to the teacher closed"
    told = f"{gain['pp']:+.2f} pp {interval(gain['interval_pp'])} over the twin '{found['against']}', {found['seeds']} seeds"
    return f"distillation {found['outcome']}: {told}{closed}"
