# SPDX-License-Identifier: Apache-2.0
"""The report for people, in Markdown: ``report.md``."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from edgekd.report import text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

WORST_CLASSES = 5


def render(document: Mapping[str, Any]) -> str:
    """Return the whole report."""
    target = document["target"]
    parts = [
        f"# {document['recipe']} on {target['name']}: {document['outcome']}\n",
        f"{text.shipped_line(document)}.\n",
        f"**{text.INCONCLUSIVE_OK_NOTE[0].upper()}{text.INCONCLUSIVE_OK_NOTE[1:]}**\n" if text.is_inconclusive_ok(document) else "",
        f"{text.teacher_line(document)}.\n",
        _table(("check", "value", "95 % interval", "limit", "outcome"), (text.check_cells(check) for check in document["checks"])),
        _reasons(document["checks"]),
        "## Loss of accuracy by stage\n",
        _table(("stage", "points", "95 % interval", "p"), (_charge(row) for row in document["charges"])),
        _distillation(document),
        "## Candidates\n",
        _table(
            ("candidate", "size KiB", "float ops", "accuracy %", "drop pp", "agreement %", "p50 ms", "speed-up", "ships, or why not"),
            (_candidate(row, "**ships**" if document["shipped"] else "judged; nothing ships") for row in document["candidates"]),
        ),
        _float_ops(document["candidates"]),
        _latencies(document),
        _classes(document["classes"], _whose(document)),
        _cost(document["cost"]),
        "## How it was made\n",
        _table(
            ("step", "key", "from the cache", "seconds"),
            ((s["step"], s["key"], "yes" if s["hit"] else "no", f"{s['seconds']:.1f}") for s in document["steps"]),
        ),
        _environment(document),
    ]
    return "\n".join(part for part in parts if part)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *(f"| {' | '.join(_cell(text) for text in row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _reasons(checks: Iterable[Mapping[str, Any]]) -> str:
    lines = [
        f"- **{check['name']}**: {check['reason']}" + (f"; {check['advice']}" if check["advice"] else "")
        for check in checks
        if check["reason"]
    ]
    return "\n".join(lines) + "\n" if lines else ""


def _charge(row: Mapping[str, Any]) -> tuple[str, ...]:
    p = "" if row["p"] is None else f"{row['p']:.2g}"
    return row["stage"], f"{row['pp']:+.2f}", text.interval(row["interval_pp"]), p


def _distillation(document: Mapping[str, Any]) -> str:
    found = document["distillation"]
    if found is None:
        return ""
    gains = {row["against"]: f"{row['pp']:+.2f} {text.interval(row['interval_pp'])}" for row in found["gains"]}
    rows = (
        (
            row["arm"],
            f"{100 * statistics.mean(row['accuracies']):.2f}",
            f"{100 * statistics.stdev(row['accuracies']):.2f}",
            gains.get(row["arm"], ""),
            "" if row["ece"] is None else f"{100 * row['ece']:.2f}",
            "" if row["nll"] is None else f"{row['nll']:.4f}",
            f"{row['seconds']:.0f}",
        )
        for row in found["arms"]
    )
    head = ("arm", "accuracy %", "between seeds", "distilled gains pp", "calibration error %", "log loss", "seconds")
    flags = "".join(f"- {flag}\n" for flag in found["flags"])
    line = text.distillation_line(document)
    return f"## Did distillation help?\n\n{line}.\n\n{_table(head, rows)}" + (f"\n{flags}" if flags else "")


def _candidate(row: Mapping[str, Any], chosen: str) -> tuple[str, ...]:
    best = min(row["latency"], key=lambda item: item["p50"]["ms"], default=None)
    speed = f"{text.number(best['speedup']['x'], 'x')} {text.interval(best['speedup']['interval'])}" if best and best["speedup"] else ""
    return (
        row["id"],
        f"{row['size_bytes'] / 1024:.1f}",
        str(row["float_ops"]),
        f"{100 * row['accuracy']:.2f}",
        f"{row['drop']['pp']:+.2f} {text.interval(row['drop']['interval_pp'])}",
        "" if row["agreement"] is None else f"{100 * row['agreement']:.2f}",
        text.number(best["p50"]["ms"]) if best else "",
        speed,
        row["why_not"] or chosen,
    )


def _float_ops(candidates: Iterable[Mapping[str, Any]]) -> str:
    lines = [f"- {row['id']}: {note}" for row in candidates for note in row["notes"]]
    return "Remarks on the candidates:\n\n" + "\n".join(lines) + "\n" if lines else ""


def _latencies(document: Mapping[str, Any]) -> str:
    rows = [(row["id"], item) for row in document["candidates"] for item in row["latency"]]
    rows += [("teacher, float32", item) for item in document["teacher"]["latency"]]
    if not rows:
        return ""
    cells = (
        (
            name,
            item["runtime"],
            str(item["threads"]),
            *(text.percentile(item[key]) for key in ("p50", "p95", "p99")),
            str(item["runs"]),
            text.number(item["peak_rss_mib"]),
        )
        for name, item in rows
    )
    return "## Latency\n\n" + _table(("model", "runtime", "threads", "p50 ms", "p95 ms", "p99 ms", "runs", "peak MiB"), cells)


def _whose(document: Mapping[str, Any]) -> str:
    return "shipped" if document["shipped"] else "judged"


def _classes(classes: Mapping[str, Mapping[str, Any]], whose: str) -> str:
    if not classes:
        return ""
    worst = sorted(classes.items(), key=lambda item: -item[1]["drop"])[:WORST_CLASSES]
    rows = (
        (
            name,
            str(r["samples"]),
            f"{100 * r['teacher']:.1f}",
            f"{100 * r['accuracy']:.1f}",
            f"{100 * r['drop']:+.1f} {text.interval([100 * x for x in r['interval']])}",
        )
        for name, r in worst
    )
    return f"## The {len(worst)} classes that lose most\n\n" + _table(("class", "samples", "teacher %", f"{whose} %", "drop pp"), rows)


def _environment(document: Mapping[str, Any]) -> str:
    inherited, target = document["shared_errors"], document["target"]
    flag = " --inconclusive-ok" if document["inconclusive_ok"] else ""
    lines = [
        f"- again: `edgekd build --target {target['name']}{flag}`, in the recipe's folder; equal keys are equal bytes",
        _distilled(document["student"]["curve"]),
        _paid_back(document["cost"]),
        f"- target: {target['title']}; evaluated on {document['instruction_set']}",
    ]
    if document["environment"] is not None:
        lines.append(_machine(document["environment"]["before"]))
    if inherited["also_wrong"] is not None:
        also, same = 100 * inherited["also_wrong"], 100 * inherited["same_answer"]
        lines.append(
            f"- of the teacher's {inherited['teacher_errors']} errors the {_whose(document)} model makes {also:.0f} % too, "
            f"{same:.0f} % with the same wrong answer"
        )
    lines += [f"- {note}" for note in document["notes"]]
    lines.append("- tools: " + ", ".join(f"{name} {version or 'unknown'}" for name, version in sorted(document["tools"].items())))
    if document["measured_at"]:
        lines.append(f"- judged at {document['measured_at']}")
    return "\n".join(lines) + "\n"


def _distilled(curve: Mapping[str, Any]) -> str:
    best = next(line for line in curve["epochs"] if line["epoch"] == curve["best_epoch"])
    accuracy = best["validation_accuracy"]
    told = f"loss of {best['validation_loss']:.4g}" if accuracy is None else f"accuracy of {100 * accuracy:.2f} %"
    return f"- distilled for {len(curve['epochs'])} epochs; epoch {best['epoch']} was kept, with a validation {told}"


def _cost(cost: Mapping[str, Any]) -> str:
    rows = [(r["part"], f"{r['seconds']:.0f}", f"{r['samples']:,}", f"{r['bytes'] / 2**20:.1f}") for r in cost["parts"]]
    return "## What it cost\n\n" + _table(("part", "seconds", "samples", "MiB in the cache"), rows)


def _paid_back(cost: Mapping[str, Any]) -> str:
    seconds = sum(row["seconds"] for row in cost["parts"])
    back = cost["break_even_inferences"]
    return f"- training took {seconds:.0f} s" + (
        "" if back is None else f"; won back after {back:,} inferences here, against the teacher's"
    )


def _machine(facts: Mapping[str, Any]) -> str:
    state = f"governor {facts['governor']}, load {text.number(facts['load'])}"
    return f"- measured on {facts['cpu_model']}, {facts['cores']} cores, {facts['instruction_set']}, Linux {facts['kernel']}; {state}"
