# SPDX-License-Identifier: Apache-2.0
"""The report in Markdown: ``report.md``."""

from __future__ import annotations

import functools
import re
import statistics
from typing import TYPE_CHECKING, Any

from edgekd.errors import MAX_CHARACTERS, printable
from edgekd.report import text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

SHOWN_CLASSES = 5
# where text could be read as Markdown or HTML: code, tables, emphasis, tags and entities, ends of links, automatic links
_MARKUP = re.compile(r"[\\`*|~]|<(?=[A-Za-z/!?])|&(?=[#A-Za-z])|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=\bwww)\.")
_BLOCK = re.compile(r"^(\d+(?=[.)](?:\s|$))|)([#>+=.)-])")  # at the start of a line: a heading, a quotation, a list, a rule


def render(document: Mapping[str, Any]) -> str:
    """Return the whole report. Text in it that is not edgekd's cannot become markup."""
    document = _escape(document)
    notice = text.INCONCLUSIVE_OK_NOTE if text.is_inconclusive_ok(document) else ""
    parts = [
        f"# {document['recipe']} on {document['target']['name']}: {document['outcome']}\n",
        f"{text.shipped_line(document)}.\n",
        f"**{notice[0].upper()}{notice[1:]}**\n" if notice else "",
        f"{text.teacher_line(document)}.\n",
        f"{estimate[0].upper()}{estimate[1:]}.\n" if (estimate := text.estimate_line(document)) else "",
        _table(text.CHECK_COLUMNS, map(text.check_cells, document["checks"])),
        _list(f"**{name}**: {reason}" for name, reason in text.reasons(document["checks"])),
        _section("Accuracy drop by stage", _accuracy_drops(document["accuracy_drop_by_stage"])),
        _section("Did distillation help?", _distillation(document)),
        _section("Candidates", _candidates(document)),
        _section("Latency", _latencies(document)),
        _section("Estimated latency", _estimates(document)),
        _section(f"The {min(SHOWN_CLASSES, len(document['classes']))} classes that lose most", _classes(document)),
        _section("Training cost", _cost(document["cost"])),
        _section("How it was built", _steps(document)),
    ]
    return "\n".join(part for part in parts if part)


def _escape(value: Any) -> Any:
    """Return a JSON value whose texts are shown by Markdown as they are."""
    if isinstance(value, dict):
        return {_escape(key): _escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    return _escape_text(value) if isinstance(value, str) else value


@functools.cache  # most texts of a report are the keys of its rows
def _escape_text(content: str) -> str:
    escaped = _MARKUP.sub(r"\\\g<0>", printable(content, MAX_CHARACTERS))
    return _BLOCK.sub(r"\1\\\2", escaped.replace("@", "`@`"))  # GitHub notifies a user even if the sign is escaped


def _section(title: str, content: str) -> str:
    return f"## {title}\n\n{content}" if content else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *(f"| {' | '.join(map(_cell, row))} |" for row in rows)]
    return "\n".join(lines) + "\n"


def _cell(content: str) -> str:
    return content.replace("\n", " ")


def _list(items: Iterable[str]) -> str:
    return "".join(f"- {item}\n" for item in items)


def _accuracy_drops(rows: Iterable[Mapping[str, Any]]) -> str:
    cells = (
        (
            row["stage"],
            f"{row['pp']:+.2f}",
            text.interval(row["interval_pp"]) or "no interval",
            "" if row["p"] is None else f"{row['p']:.2g}",
        )
        for row in rows
    )
    return _table(("stage", "drop pp", "95 % interval", "p"), cells)


def _distillation(document: Mapping[str, Any]) -> str:
    verdict = document["distillation"]
    if verdict is None:
        return ""
    gains = {row["baseline"]: text.estimate(f"{row['pp']:+.2f}", row["interval_pp"]) for row in verdict["gains"]}
    cells = (
        (
            row["method"],
            row["losses"],
            f"{100 * statistics.mean(row['accuracies']):.2f}",
            f"{100 * statistics.stdev(row['accuracies']):.2f}",
            gains.get(row["method"], ""),
            "" if row["ece"] is None else f"{100 * row['ece']:.2f}",
            "" if row["nll"] is None else f"{row['nll']:.4f}",
            f"{row['seconds']:.0f}",
        )
        for row in verdict["methods"]
    )
    head = ("method", "losses", "accuracy %", "std between seeds", "gain of distillation pp", "calibration error %", "log loss", "seconds")
    flags = _list(verdict["flags"])
    return f"{text.distillation_line(document)}.\n\n{_table(head, cells)}" + (f"\n{flags}" if flags else "")


def _candidates(document: Mapping[str, Any]) -> str:
    head = ("candidate", "size KiB", "float ops", "accuracy %", "drop pp", "agreement %", "p50 ms", "speed-up", "ships, or why not")
    chosen = "**ships**" if document["shipped"] else "judged; nothing ships"
    rows = [_candidate_cells(row, chosen) for row in document["candidates"]]
    rows += [(row["id"], *[""] * (len(head) - 2), f"left out: {row['why_not']}") for row in document["left_out"]]
    table = _table(head, rows)
    notes = _list(f"{row['id']}: {note}" for row in document["candidates"] for note in row["notes"])
    return table + (f"\nNotes on the candidates:\n\n{notes}" if notes else "")


def _candidate_cells(row: Mapping[str, Any], chosen: str) -> tuple[str, ...]:
    fastest = min(row["latency"], key=lambda latency: latency["p50"]["ms"], default=None)
    return (
        row["id"],
        f"{row['size_bytes'] / 1024:.1f}",
        str(row["float_ops"]),
        f"{100 * row['accuracy']:.2f}",
        text.estimate(f"{row['drop']['pp']:+.2f}", row["drop"]["interval_pp"]),
        "" if row["agreement"] is None else f"{100 * row['agreement']:.2f}",
        text.number(fastest["p50"]["ms"]) if fastest else "",
        text.speedup(fastest["speedup"]) if fastest else "",
        row["why_not"] or chosen,
    )


def _latencies(document: Mapping[str, Any]) -> str:
    rows = [(row["id"], latency) for row in document["candidates"] for latency in row["latency"]]
    rows += [("teacher, float32", latency) for latency in document["teacher"]["latency"]]
    if not rows:
        return ""
    cells = (
        (
            name,
            latency["runtime"],
            str(latency["threads"]),
            *(text.percentile(latency[quantile]) for quantile in ("p50", "p95", "p99")),
            str(latency["runs"]),
            text.number(latency["peak_rss_mib"]),
        )
        for name, latency in rows
    )
    return _table(("model", "runtime", "threads", "p50 ms", "p95 ms", "p99 ms", "runs", "peak MiB"), cells)


def _estimates(document: Mapping[str, Any]) -> str:
    rows = [(candidate["id"], row) for candidate in document["candidates"] for row in candidate["estimates"]]
    cells = ((name, str(row["threads"]), text.estimated(row), "; ".join((row["provenance"], *row["notes"]))) for name, row in rows)
    table = _table(("model", "threads", "latency", "rests on"), cells) if rows else ""
    missing = _list(f"{candidate['id']}: {candidate['no_estimate']}" for candidate in document["candidates"] if candidate["no_estimate"])
    return "\n".join(filter(None, (table, missing)))


def _shipped_or_judged(document: Mapping[str, Any]) -> str:
    return "shipped" if document["shipped"] else "judged"


def _classes(document: Mapping[str, Any]) -> str:
    if not document["classes"]:
        return ""
    worst = sorted(document["classes"].items(), key=lambda item: -item[1]["drop"])[:SHOWN_CLASSES]
    cells = (
        (
            name,
            str(row["samples"]),
            f"{100 * row['teacher']:.1f}",
            f"{100 * row['accuracy']:.1f}",
            text.estimate(f"{100 * row['drop']:+.1f}", row["interval"] and [100 * end for end in row["interval"]]),
        )
        for name, row in worst
    )
    return _table(("class", "samples", "teacher %", f"{_shipped_or_judged(document)} %", "drop pp"), cells)


def _cost(cost: Mapping[str, Any]) -> str:
    cells = (
        (
            row["part"],
            f"{row['seconds']:.0f}",
            *("unknown" if row[name] is None else f"{row[name]:.0f}" for name in ("cpu_seconds", "waited_seconds")),
            f"{row['samples']:,}",
            f"{row['bytes'] / 2**20:.1f}",
        )
        for row in cost["parts"]
    )
    return _table(("part", "seconds", "CPU seconds", "seconds threads waited for a core", "samples", "MiB in the cache"), cells)


def _steps(document: Mapping[str, Any]) -> str:
    cells = ((step["step"], step["key"], "yes" if step["hit"] else "no", f"{step['seconds']:.1f}") for step in document["steps"])
    return f"{_table(('step', 'key', 'from the cache', 'seconds'), cells)}\n{_list(_details(document))}"


def _details(document: Mapping[str, Any]) -> list[str]:
    flag = " --inconclusive-ok" if document["inconclusive_ok"] else ""
    lines = [
        f"build again: `edgekd build --target {document['target']['name']}{flag}` in the recipe's folder; equal keys mean equal bytes",
        _training(document["student"]["curve"]),
        _break_even(document["cost"]),
        f"target: {document['target']['title']}; evaluated on {document['instruction_set']}",
    ]
    if document["environment"] is not None:
        lines.append(_machine(document["environment"]["before"]))
    if document["shared_errors"]["also_wrong"] is not None:
        lines.append(_shared_errors(document))
    lines += document["notes"]
    lines.append("tools: " + ", ".join(f"{name} {version or 'unknown'}" for name, version in sorted(document["tools"].items())))
    if document["measured_at"]:
        lines.append(f"judged at {document['measured_at']}")
    return lines


def _training(curve: Mapping[str, Any]) -> str:
    last = curve["epochs"][-1]
    accuracy = last["validation_accuracy"]
    result = f"loss of {last['validation_loss']:.4g}" if accuracy is None else f"accuracy of {100 * accuracy:.2f} %"
    return f"trained for {len(curve['epochs'])} epochs; a validation {result} after the last"


def _break_even(cost: Mapping[str, Any]) -> str:
    seconds, inferences = sum(row["seconds"] for row in cost["parts"]), cost["break_even_inferences"]
    break_even = "" if inferences is None else f"; breaks even after {inferences:,} inferences on this target, compared with the teacher"
    return f"training took {seconds:.0f} s{break_even}"


def _machine(facts: Mapping[str, Any]) -> str:
    state = f"governor {facts['governor']}, load {text.number(facts['load'])}"
    return f"measured on {facts['cpu_model']}, {facts['cores']} cores, {facts['instruction_set']}, Linux {facts['kernel']}; {state}"


def _shared_errors(document: Mapping[str, Any]) -> str:
    errors = document["shared_errors"]
    also_wrong, same = 100 * errors["also_wrong"], 100 * errors["same_prediction"]
    return (
        f"of the teacher's {errors['teacher_errors']} errors, the {_shipped_or_judged(document)} model shares {also_wrong:.0f} %, "
        f"{same:.0f} % with the same wrong prediction"
    )
