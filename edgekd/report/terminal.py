# SPDX-License-Identifier: Apache-2.0
"""The verdict and the progress of a build in the terminal: rich where there is one, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edgekd.report import words

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from edgekd.pipeline import Teller
    from edgekd.ports import Progress

QUIET_S = 10.0  # between two plain lines about one step
HEAD = ("check", "value", "95 % interval", "limit", "outcome")
COLOURS = {"PASS": "green", "FAIL": "bold red", "INCONCLUSIVE": "yellow"}


def verdict(document: Mapping[str, Any], *, standing: bool) -> str:
    """Return the verdict of one target as text, with a table of its checks."""
    if "until" in document:
        return (
            f"{document['recipe']}: {document['outcome']}: stopped after {document['until']}; what it made lies in {document['folder']}\n"
        )
    when = f"; the verdict of {document['measured_at']} stands" if standing else ""
    title = f"{document['recipe']} on {document['target']['name']}: {document['outcome']}{when}"
    rows = [words.check_cells(check) for check in document["checks"]]
    lines = [words.shipped_line(document), words.teacher_line(document)]
    lines += [
        f"{check['name']}: {check['reason']}" + (f"; {check['advice']}" if check["advice"] else "")
        for check in document["checks"]
        if check["reason"]
    ]
    lines += filter(None, [words.distillation_line(document)])
    lines += [f"note: {note}" for note in document["notes"]]
    if words.is_excused(document):
        lines.append(words.EXCUSED)
    table = _rich(title, rows) if _is_terminal(sys.stdout) else _plain(title, rows)
    return table + "".join(f"  {line}\n" for line in lines)


def measurements(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return measured model files as a table."""
    cells = [("model", "runtime", "threads", "p50 ms", "p95 ms", "p99 ms", "runs", "speed-up", "peak MiB")]
    for row in rows:
        latency = {key: words.number(row[key]["ms"]) if row[key]["interval"] else "n too small" for key in ("p50", "p95", "p99")}
        speed = row["speedup"]
        told = f"{speed['x']:.3g}x {words.interval(speed['interval'])}" if speed else ""
        peak = words.number(row["peak_rss_mib"])
        cells.append((row["model"], row["runtime"], str(row["threads"]), *latency.values(), str(row["runs"]), told, peak))
    notes = sorted({note for row in rows for note in row["notes"]})
    return _aligned(cells) + "".join(f"  note: {note}\n" for note in notes)


@contextmanager
def teller() -> Iterator[Teller]:
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
    def say(self, text: str) -> None:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    @contextmanager
    def step(self, name: str) -> Iterator[Progress]:
        last = [time.monotonic()]

        def progress(share: float, text: str) -> None:
            if time.monotonic() - last[0] >= QUIET_S:
                last[0] = time.monotonic()
                self.say(f"{name}: {100 * share:.0f} %, {text}")

        yield progress


class _Bars:
    def __init__(self, bars: Any) -> None:
        self.bars = bars

    def say(self, text: str) -> None:
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
