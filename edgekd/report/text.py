# SPDX-License-Identifier: Apache-2.0
"""The report as plain text: numbers and sentences that Markdown shares, tables for the terminal, and the progress of a build."""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from edgekd.errors import MAX_CHARACTERS, printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from edgekd.ports import Progress, Reporter

SECONDS_BETWEEN_LINES = 10.0  # of progress in one step, where there is no terminal
CHECK_COLUMNS = ("check", "value", "95 % interval", "limit", "outcome")
INCONCLUSIVE_OK_NOTE = "shipped although it is INCONCLUSIVE, and counted as success: --inconclusive-ok"
TOO_FEW_RUNS = "too few runs"
COLORS = {"PASS": "green", "FAIL": "bold red", "INCONCLUSIVE": "yellow"}


# numbers


def number(value: float | None, unit: str = "") -> str:
    """Return a number with four significant digits, or ``unknown``."""
    if value is None:
        return "unknown"
    digits = f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"  # noqa: PLR2004  (further digits would be noise)
    return f"{digits}x" if unit == "x" else f"{digits} {unit}".rstrip()


def interval(pair: Sequence[float] | None) -> str:
    """Return ``[low, high]`` or nothing."""
    return "" if pair is None else f"[{pair[0]:.4g}, {pair[1]:.4g}]"


def estimate(value: str, pair: Sequence[float] | None) -> str:
    """Return a value with its interval, or with the words that it has none."""
    return f"{value} {interval(pair) or '(no interval)'}"


def about(value: float, unit: str) -> str:
    """Return an estimated number, with two significant digits."""
    return f"about {number(float(f'{value:.2g}'), unit)}"


def band(pair: Sequence[float]) -> str:
    """Return the band of an estimate, with two significant digits."""
    return interval([float(f"{end:.2g}") for end in pair])


def limit(check: Mapping[str, Any]) -> str:
    """Return a check's limit with its direction."""
    if check["limit"] is None:
        return ""
    sign = ">=" if check["name"].startswith("min_") else "<="
    return f"{sign} {number(check['limit'], check['unit'])}"


def percentile(row: Mapping[str, Any]) -> str:
    """Return a percentile with its interval; without an interval there were too few runs, and it is not shown."""
    return TOO_FEW_RUNS if row["interval"] is None else f"{number(row['ms'])} {interval(row['interval'])}"


def speedup(row: Mapping[str, Any] | None) -> str:
    """Return a speed-up with its interval, or nothing."""
    return "" if row is None else estimate(number(row["x"], "x"), row["interval"])


def check_cells(check: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    """Return name, value, interval, limit and outcome of a check; an estimate says so, and that its interval is a band."""
    value, pair = number(check["value"], check["unit"]), interval(check["interval"])
    if check["tier"] is not None:
        value, pair = f"{about(check['value'], check['unit'])} ({check['tier']})", f"{band(check['interval'])} (80 % band)"
    return check["name"], value, pair, limit(check), check["outcome"]


# sentences


def reasons(checks: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return name and reason, with the advice, of each check that has a reason."""
    return [(check["name"], "; ".join(filter(None, (check["reason"], check["advice"])))) for check in checks if check["reason"]]


def shipped_line(document: Mapping[str, Any]) -> str:
    """Return what ships, or that nothing does."""
    choice = document["choice"]
    model = f"{choice['runtime']} {choice['scheme']}, {choice['threads']} thread{'s' if choice['threads'] > 1 else ''}"
    subject = "nothing ships; judged" if document["shipped"] is None else document["shipped"]
    return f"{subject}: {model}, {choice['size_bytes'] / 1024:.1f} KiB ({choice['selected_by']})"


def estimate_line(document: Mapping[str, Any]) -> str | None:
    """Return the estimate of what ships or was judged: value, band, tier and what it rests on; None if the latency was measured."""
    choice = document["choice"]
    row = next((row for row in choice["estimates"] if row["threads"] == choice["threads"]), None)
    return choice["no_estimate"] if row is None else f"latency estimate: {estimated(row)}; {'; '.join((row['provenance'], *row['notes']))}"


def estimated(row: Mapping[str, Any]) -> str:
    """Return an estimate with its band and tier."""
    return f"{about(row['ms'], 'ms')} {band(row['band'])} ({100 * row['level']:.0f} % band, {row['tier']})"


def left_out_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each reason why candidates are left out."""
    names: dict[str, list[str]] = {}
    for row in rows:
        names.setdefault(row["why_not"], []).append(row["id"])
    return [f"left out: {', '.join(ids)}: {reason}" for reason, ids in names.items()]


def is_inconclusive_ok(document: Mapping[str, Any]) -> bool:
    """Return whether a model ships that has not passed."""
    return document["shipped"] is not None and document["outcome"] == "INCONCLUSIVE"


def teacher_line(document: Mapping[str, Any]) -> str:
    """Return a comparison of the student with the teacher."""
    teacher, student, choice = document["teacher"], document["student"], document["choice"]
    sizes = f"{student['parameters']:,} parameters"
    if teacher["parameters"]:
        sizes += f", the teacher {teacher['parameters']:,} ({teacher['parameters'] / student['parameters']:.1f}x)"
    accuracy = f"accuracy {100 * choice['accuracy']:.2f} %, the teacher {100 * teacher['accuracy']:.2f} %"
    drop = estimate(f"drop {choice['drop']['pp']:.2f} pp", choice["drop"]["interval_pp"])
    speed = f"; speed-up {speedup(choice['speedup'])}" if choice["speedup"] else ""
    return f"{sizes}; {accuracy}, {drop}{speed}"


def distillation_line(document: Mapping[str, Any]) -> str | None:
    """Return the verdict on distillation in a line, or None if there is none."""
    verdict = document["distillation"]
    if verdict is None:
        return None
    baseline = verdict["baseline"]
    gain = next(row for row in verdict["gains"] if row["baseline"] == baseline)
    losses = next(row["losses"] for row in verdict["methods"] if row["method"] == baseline)
    value = estimate(f"{gain['pp']:+.2f} pp", gain["interval_pp"])
    comparison = f"{value} over the baseline '{baseline}' (its loss: {losses}), {verdict['seeds']} seeds"
    gap = "" if verdict["gap_closed"] is None else f"; {100 * verdict['gap_closed']:.0f} % of the gap to the teacher closed"
    return f"distillation {verdict['outcome']}: {comparison}{gap}"


# the terminal


def render_verdict(document: Mapping[str, Any], *, cached: bool) -> str:
    """Return the verdict on one target as text, with a table of its checks."""
    if "until" in document:
        return f"{document['recipe']}: {document['outcome']}: stopped after {document['until']}; its output is in {document['folder']}\n"
    since = f"; cached verdict of {document['measured_at']}" if cached else ""
    title = f"{document['recipe']} on {document['target']['name']}: {document['outcome']}{since}"
    rows = [check_cells(check) for check in document["checks"]]
    lines = [
        shipped_line(document),
        teacher_line(document),
        estimate_line(document),
        *(f"{name}: {reason}" for name, reason in reasons(document["checks"])),
        distillation_line(document),
        *left_out_lines(document["left_out"]),
        *(f"note: {note}" for note in document["notes"]),
        INCONCLUSIVE_OK_NOTE if is_inconclusive_ok(document) else None,
    ]
    table = _rich_table(title, rows) if _is_terminal(sys.stdout) else f"{title}\n{_plain_table([CHECK_COLUMNS, *rows])}"
    return table + "".join(f"  {line}\n" for line in lines if line)


def render_measurements(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return measured model files as a table."""
    cells = [("model", "runtime", "threads", "p50 ms", "p95 ms", "p99 ms", "runs", "speed-up", "peak MiB")]
    for row in rows:
        p50, p95, p99 = (number(row[name]["ms"]) if row[name]["interval"] else TOO_FEW_RUNS for name in ("p50", "p95", "p99"))
        counts, peak = str(row["runs"]), number(row["peak_rss_mib"])
        cells.append((printable(row["model"]), row["runtime"], str(row["threads"]), p50, p95, p99, counts, speedup(row["speedup"]), peak))
    notes = sorted({note for row in rows for note in row["notes"]})
    return _plain_table(cells) + "".join(f"  note: {printable(note, MAX_CHARACTERS)}\n" for note in notes)


def _is_terminal(stream: Any) -> bool:
    return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"


def _plain_table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "".join("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() + "\n" for row in rows)


def _rich_table(title: str, rows: Sequence[tuple[str, ...]]) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title, style="bold"), title_justify="left")
    for name in CHECK_COLUMNS:
        table.add_column(name)
    for row in rows:
        table.add_row(*map(Text, row[:-1]), Text(row[-1], style=COLORS[row[-1]]))
    console = Console()
    with console.capture() as captured:
        console.print(table)
    return captured.get()


# progress


@contextmanager
def reporter() -> Iterator[Reporter]:
    """Yield a reporter that writes to stderr: progress bars in a terminal, plain lines elsewhere."""
    if not _is_terminal(sys.stderr):
        yield _LineReporter()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as ProgressBars

    name, message = (TextColumn(template, markup=False) for template in ("{task.description}", "{task.fields[message]}"))
    columns = (name, BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), message)
    with ProgressBars(*columns, console=Console(stderr=True), transient=True) as bars:
        yield _BarReporter(bars)


class _LineReporter:
    def log(self, text: str) -> None:
        with suppress(OSError):  # nobody reads it, or its disk is full: the build goes on
            sys.stderr.write("\n".join([*plain_lines(text), ""]))
            sys.stderr.flush()

    @contextmanager
    def step(self, name: str) -> Iterator[Progress]:
        last = time.monotonic()

        def progress(share: float, text: str) -> None:
            nonlocal last
            if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                self.log(f"{name}: {100 * share:.0f} %, {text}")

        yield progress


class _BarReporter:
    def __init__(self, bars: Any) -> None:
        self.bars = bars

    def log(self, text: str) -> None:
        self.bars.console.print("\n".join(plain_lines(text)), highlight=False, markup=False)

    @contextmanager
    def step(self, name: str) -> Iterator[Progress]:
        task = self.bars.add_task(name, total=1.0, message="")
        yield lambda share, text: self.bars.update(task, completed=share, message=printable(text))
        self.bars.remove_task(task)


def plain_lines(text: str) -> list[str]:
    """Return the lines of a text, each printable; further lines than 100 are counted only."""
    lines = text.split("\n")
    shown = [printable(line, MAX_CHARACTERS) for line in lines[:100]]
    return shown if len(lines) == len(shown) else [*shown, f"... ({len(lines):,} lines)"]
