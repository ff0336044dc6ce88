# SPDX-License-Identifier: Apache-2.0
"""The verdict and the progress of a build in the terminal: rich where there is one, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from edgekd.ports import Progress, Reporter

QUIET_S = 10.0  # between two plain lines about one step
HEAD = ("check", "value", "95 % interval", "limit", "outcome")
INCONCLUSIVE_OK_NOTE = "shipped although it is INCONCLUSIVE, and counted as success: --inconclusive-ok"
COLOURS = {"PASS": "green", "FAIL": "bold red", "INCONCLUSIVE": "yellow"}


def render_verdict(document: Mapping[str, Any], *, standing: bool) -> str:
    """Return the verdict of one target as text, with a table of its checks."""
    if "until" in document:
        return (
            f"{document['recipe']}: {document['outcome']}: stopped after {document['until']}; what it made lies in {document['folder']}\n"
        )
    when = f"; the verdict of {document['measured_at']} stands" if standing else ""
    title = f"{document['recipe']} on {document['target']['name']}: {document['outcome']}{when}"
    rows = [check_cells(check) for check in document["checks"]]
    lines = [shipped_line(document), teacher_line(document)]
    lines += [
        f"{check['name']}: {check['reason']}" + (f"; {check['advice']}" if check["advice"] else "")
        for check in document["checks"]
        if check["reason"]
    ]
    lines += filter(None, [distillation_line(document)])
    lines += [f"note: {note}" for note in document["notes"]]
    if is_inconclusive_ok(document):
        lines.append(INCONCLUSIVE_OK_NOTE)
    table = _rich(title, rows) if _is_terminal(sys.stdout) else _plain(title, rows)
    return table + "".join(f"  {line}\n" for line in lines)


def render_measurements(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return measured model files as a table."""
    cells = [("model", "runtime", "threads", "p50 ms", "p95 ms", "p99 ms", "runs", "speed-up", "peak MiB")]
    for row in rows:
        latency = {key: number(row[key]["ms"]) if row[key]["interval"] else "n too small" for key in ("p50", "p95", "p99")}
        speed = row["speedup"]
        told = f"{speed['x']:.3g}x {interval(speed['interval'])}" if speed else ""
        peak = number(row["peak_rss_mib"])
        cells.append((row["model"], row["runtime"], str(row["threads"]), *latency.values(), str(row["runs"]), told, peak))
    notes = sorted({note for row in rows for note in row["notes"]})
    return _aligned(cells) + "".join(f"  note: {note}\n" for note in notes)


@contextmanager
def reporter() -> Iterator[Reporter]:
    """Yield where progress goes, on stderr: bars in a terminal, plain lines elsewhere."""
    if not _is_terminal(sys.stderr):
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    name, what = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[what]}"))
    columns = (name, BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), what)
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        yield _Bars(bars)


class _Lines:
    def log(self, text: str) -> None:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    @contextmanager
    def step(self, name: str) -> Iterator[Progress]:
        last = [time.monotonic()]

        def progress(share: float, text: str) -> None:
            if time.monotonic() - last[0] >= QUIET_S:
                last[0] = time.monotonic()
                self.log(f"{name}: {100 * share:.0f} %, {text}")

        yield progress


class _Bars:
    def __init__(self, bars: Any) -> None:
        self.bars = bars

    def log(self, text: str) -> None:
        self.bars.console.print(text, highlight=False, markup=False)

    @contextmanager
    def step(self, name: str) -> Iterator[Progress]:
        task = self.bars.add_task(name, total=1.0, what="")
        yield lambda share, text: self.bars.update(task, completed=share, what=text)
        self.bars.remove_task(task)


def _is_terminal(stream: Any) -> bool:
    return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"


def _plain(title: str, rows: Sequence[tuple[str, ...]]) -> str:
    return f"{title}\n" + _aligned([HEAD, *rows])


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "".join("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() + "\n" for row in rows)


def _rich(title: str, rows: Sequence[tuple[str, ...]]) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title, style="bold"), title_justify="left")
    for name in HEAD:
        table.add_column(name)
    for row in rows:
        table.add_row(*map(Text, row[:-1]), Text(row[-1], style=COLOURS[row[-1]]))
    console = Console()
    with console.capture() as captured:
        console.print(table)
    return captured.get()


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


def is_inconclusive_ok(document: Mapping[str, Any]) -> bool:
    """Return whether a model ships that has not passed."""
    return document["shipped"] is not None and document["outcome"] == "INCONCLUSIVE"


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
