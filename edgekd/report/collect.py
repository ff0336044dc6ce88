# SPDX-License-Identifier: Apache-2.0
"""What a report tells of one target, gathered from steps, scores and measurements."""

from __future__ import annotations

import time
from datetime import datetime
from typing import TYPE_CHECKING, Any

from edgekd.domain.units import fraction_to_pp
from edgekd.domain.verdict import Outcome
from edgekd.report import cost
from edgekd.report.target_run import artifacts, concerns_target, model_file, read_json, teacher_measurement

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgekd.domain.artifact import Artifact, Candidate
    from edgekd.domain.measurement import Measurement
    from edgekd.plan import Plan
    from edgekd.ports import CompletedStep
    from edgekd.report.target_run import TargetRun, TargetScores
    from edgekd.stages import gate, select

_TOLD = ("inspect", "teach", "soft_targets", "distill")  # stages whose notes are about the whole build
CAPACITY_GAP_PP, CAPACITY_OVERFIT_PP = 3.0, 1.0


def provable_warnings(plan: Plan, done: Mapping[str, CompletedStep]) -> list[str]:
    """Return warnings where a budget is below what the evaluation set can prove."""
    from edgekd.stats import intervals

    inspected: Any = done["inspect"].entry.metrics
    samples, groups = inspected["splits"]["evaluation"]["samples"], inspected["groups"]
    best, usual = fraction_to_pp(intervals.provable_drop(samples)[0]), fraction_to_pp(intervals.provable_drop(groups)[1])
    what = f"{samples} evaluation samples" if groups == samples else f"{samples} evaluation samples in {groups} groups"
    told = []
    for target in plan.targets:
        limit = plan.recipe.overrides_for(target.name).budget.max_accuracy_drop_pp
        if limit is not None and limit < usual:
            verdict = "cannot pass, whatever the student" if limit < best else "may well end INCONCLUSIVE"
            told.append(
                f"{target.name}: {what} prove a drop of {usual:.2f} pp where 5 % of answers differ "
                f"({best:.2f} pp at best); the budget max_accuracy_drop_pp = {limit:g} {verdict}"
            )
    return told


def measurement_rows(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Return measurements of model files as rows; the speed-up is against the first file at the same threads."""
    rows = []
    for item in measurements:
        first = next(other for other in measurements if other.subject == measurements[0].subject)
        reference = next((other for other in measurements if other.subject == first.subject and other.threads == item.threads), None)
        rows.append({"model": item.subject, **_latency(item, None if reference is item else reference), "notes": list(item.notes)})
    return rows


def collect_report(
    case: TargetRun,
    scored: TargetScores,
    accuracies: Mapping[str, gate.Accuracy],
    options: Sequence[select.Option],
    choice: select.Choice,
    measurements: Sequence[Measurement],
) -> dict[str, Any]:
    """Return all that a report tells but for the verdict."""
    from edgekd.stats import scores

    inspected = case.done["inspect"].entry.metrics
    chosen = choice.option.candidate
    own = scored.of[chosen.evaluate_step]
    rows = [_candidate_row(case, scored, accuracies[option.candidate.id], option, choice, measurements) for option in options]
    steps = [
        {"step": name, "key": item.entry.key[:12], "hit": item.hit, "seconds": item.entry.seconds}
        for name, item in case.done.items()
        if concerns_target(case, name)
    ]
    costs = cost.training_cost(case, choice.measurement, measurements)
    tools = {tool: version for item in case.done.values() for tool, version in item.entry.material["tools"].items()}
    teacher_threads = [item for item in measurements if item.subject == "teacher"]
    return {
        "recipe": case.plan.recipe.name,
        "target": {"name": case.target.name, "title": case.target.title},
        "choice": next(row for row in rows if row["id"] == chosen.id)
        | {"threads": choice.threads, "selected_by": choice.selected_by, "speedup": _speedup(choice.measurement, measurements)},
        "candidates": rows,
        "teacher": {
            "parameters": inspected["teacher"]["parameters"],  # type: ignore[call-overload,index]  # inspect's own mapping
            "accuracy": scored.teacher.accuracy,
            "interval": scores.interval_row(scores.accuracy_interval(scored.teacher, scored.groups)),
            "latency": [_latency(item, None) for item in teacher_threads],
        },
        "student": {"parameters": inspected["student"]["parameters"], "curve": read_json(artifacts(case, "distill")["curve.json"])},  # type: ignore[call-overload,index]
        "charges": _charges(scored, chosen),
        "distillation": _distillation(case, scored),
        "cost": costs,
        "classes": dict(accuracies[chosen.id].classes),
        "shared_errors": scores.shared_errors(scored.teacher, own, scored.labels),
        "instruction_set": own.instruction_set,
        "environment": dict(measurements[0].environment) if measurements else None,
        "steps": steps,
        "tools": tools,
        "notes": _notes(case, measurements, costs),
        "seconds": _seconds(case, measurements),
        "measured_at": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _candidate_row(
    case: TargetRun,
    scored: TargetScores,
    accuracy: gate.Accuracy,
    option: select.Option,
    choice: select.Choice,
    measurements: Sequence[Measurement],
) -> dict[str, Any]:
    from edgekd.stats import scores

    candidate = option.candidate
    return {
        "id": candidate.id,
        "runtime": candidate.runtime,
        "scheme": candidate.scheme,
        "rung": candidate.rung,
        "size_bytes": option.size_bytes,
        "digest": model_file(case, candidate).digest,
        "float_ops": option.float_ops,
        "accuracy": accuracy.value,
        "interval": scores.interval_row(accuracy.interval),
        "drop": scores.difference_row(accuracy.drop),
        "agreement": scores.agreement(scored.teacher, scored.of[candidate.evaluate_step], **case.plan.recipe.student.form),
        "outcome": option.accuracy.value,
        "latency": [_latency(item, teacher_measurement(item, measurements)) for item in option.measurements],
        "why_not": choice.why_not.get(candidate.id),
        "notes": list(case.done[candidate.model_step].entry.notes),
    }


def _latency(item: Measurement, reference: Measurement | None) -> dict[str, Any]:
    from edgekd.stats import intervals

    samples = item.samples_ns()
    found: dict[str, Any] = {
        "runtime": item.runtime,
        "runtime_version": item.runtime_version,
        "threads": item.threads,
        "runs": len(samples),
    }
    for name, quantile in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        value, interval = intervals.quantile_interval(samples, quantile)
        found[name] = {"ms": value / 1e6, "interval": None if interval is None else [interval.low / 1e6, interval.high / 1e6]}
    found["first_ms"], found["load_ms"] = item.first_ns / 1e6, item.load_ns / 1e6
    found["peak_rss_mib"] = None if item.peak_rss_bytes is None else item.peak_rss_bytes / 2**20
    found["speedup"] = None if reference is None else _ratio(reference, item)
    return found


def _speedup(measurement: Measurement | None, measurements: Sequence[Measurement]) -> dict[str, Any] | None:
    teacher = teacher_measurement(measurement, measurements)
    return None if teacher is None or measurement is None else _ratio(teacher, measurement)


def _ratio(reference: Measurement, item: Measurement) -> dict[str, Any]:
    from edgekd.stats import intervals

    value, interval = intervals.ratio_of_medians(reference.blocks_ns, item.blocks_ns)
    return {"x": value, "interval": [interval.low, interval.high]}


def _seconds(case: TargetRun, measurements: Sequence[Measurement]) -> dict[str, float]:
    """Return how long the build took so far, and how long the stages that ran in it worked: the rest is overhead."""
    ran = sum(item.entry.seconds for item in case.done.values() if not item.hit)
    ran += measurements[0].environment["seconds"] if measurements else 0.0  # type: ignore[operator]  # a number of seconds
    return {"total": round(time.monotonic() - case.started, 3), "stages": round(ran, 3)}


def _charges(scored: TargetScores, chosen: Candidate) -> list[dict[str, Any]]:
    """Return what each stage cost, in points, each paired with what went in."""
    from edgekd.stats import scores

    student = scored.of["evaluate/student"]
    exported = scored.of[f"evaluate/export/student/{chosen.runtime}"]
    pairs = [("distill", scored.teacher, student), ("export", student, exported)]
    if chosen.evaluate_step != f"evaluate/export/student/{chosen.runtime}":
        pairs.append(("quantize", exported, scored.of[chosen.evaluate_step]))
    pairs.append(("in all", scored.teacher, scored.of[chosen.evaluate_step]))
    return [{"stage": name, **scores.difference_row(scores.difference(first, second, scored.groups))} for name, first, second in pairs]


def _distillation(case: TargetRun, scored: TargetScores) -> dict[str, Any] | None:
    """Return whether distillation helped, and what it took; None if the recipe has no control."""
    from edgekd.stats import distillation

    recipe = case.plan.recipe
    if not recipe.arms:
        return None
    entries = {arm: [case.done[name].entry for name in names] for arm, names in recipe.arms.items()}
    found = distillation.judge_distillation(
        {
            arm: [scored.of["evaluate/student" if name == "distill" else f"evaluate/{name}"] for name in names]
            for arm, names in recipe.arms.items()
        },
        {arm: [_validation(entry.metrics) for entry in of_arm] for arm, of_arm in entries.items()},
        scored.teacher,
        scored.labels,
        scored.groups,
        calibrated=recipe.evaluate.metric == "top1" and recipe.evaluate.score is None,
    )
    for row in found["arms"]:
        row["seconds"] = sum(entry.seconds for entry in entries[row["arm"]])
    return found


def _capacity(case: TargetRun) -> str | None:
    """Return the remark that the student is too small for what its teacher knows, or None.

    It is, if it stays behind the teacher on validation although it does no better on what it was trained on: it does not
    overfit, so neither more data nor more epochs would close the gap. Views are harder than what they were made of: no remark then.
    """
    distill = case.done["distill"].entry.metrics
    trained, found = distill["train_accuracy"], distill["validation_accuracy"]
    teacher = case.done["soft_targets"].entry.metrics["validation_accuracy"]
    if case.plan.recipe.distill.augment is not None or trained is None or found is None or teacher is None:
        return None
    behind, overfit = fraction_to_pp(teacher - found), fraction_to_pp(trained - found)  # type: ignore[operator]  # numbers, as these stages write them
    if behind < CAPACITY_GAP_PP or overfit > CAPACITY_OVERFIT_PP:
        return None
    advice = "" if case.plan.recipe.sizes else "; a wider or deeper student would gain more than data or epochs: name some in distill.sizes"
    return (
        f"the student's capacity is the limit: {behind:.1f} pp behind its teacher on validation, and only {max(overfit, 0.0):.1f} "
        f"pp better on what it was trained on{advice}"
    )


def _sizes(case: TargetRun) -> str | None:
    """Return what students of other sizes reached, and the smallest that is close enough to its teacher; None if there are none.

    Close enough is what the recipe's budget allows between teacher and student, or 3 points. All on validation.
    """
    metrics: Any = {name: item.entry.metrics for name, item in case.done.items()}
    recipe, teacher = case.plan.recipe, metrics["soft_targets"]["validation_accuracy"]
    if not recipe.sizes or teacher is None:
        return None
    counts = {str(recipe.student.model): metrics["inspect"]["student"]["parameters"], **metrics["inspect"]["sizes"]}
    steps = {"distill": recipe.student.model, **recipe.sizes}
    rows = [(counts[str(entry)], str(entry), metrics[name]["validation_accuracy"]) for name, entry in steps.items()]
    told = ", ".join(f"{entry} ({count:,} parameters) {100 * found:.2f} %" for count, entry, found in sorted(rows))
    limit = recipe.overrides_for(case.target.name).budget.max_accuracy_drop_pp
    allowed = CAPACITY_GAP_PP if limit is None else limit
    enough = [row for row in sorted(rows) if fraction_to_pp(teacher - row[2]) <= allowed]
    advice = f"the smallest within {allowed:g} pp is {enough[0][1]}" if enough else f"none is within {allowed:g} pp: try larger ones"
    return f"sizes, on validation, where the teacher has {100 * teacher:.2f} %: {told}; {advice}"


def _validation(metrics: Mapping[str, Any]) -> float:
    accuracy = metrics["validation_accuracy"]
    return -float(metrics["validation_loss"]) if accuracy is None else float(accuracy)


def _notes(case: TargetRun, measurements: Sequence[Measurement], costs: cost.Cost) -> list[str]:
    # twins, and what teaches the one by pseudo-labels, tell again what the student's steps and its teacher tell
    arms = {name for names in case.plan.recipe.arms.values() for name in names} - {"distill"}
    repeated = arms | {name.replace("distill/", "soft_targets/", 1) for name in arms}
    notes = [
        note
        for name, item in case.done.items()
        if (item.step.stage in _TOLD or name.startswith("export/teacher/")) and name not in repeated
        for note in item.entry.notes
    ]
    notes += provable_warnings(case.plan, case.done) if len(case.plan.targets) == 1 else []
    notes += filter(None, [_capacity(case), _sizes(case), cost.break_even_note(case, costs)])
    notes += sorted({note for item in measurements for note in item.notes})
    return notes


def manifest(case: TargetRun, told: Mapping[str, Any], name: str, model: Artifact) -> dict[str, Any]:
    """Return the manifest: digests of what went in and what came out, and versions."""
    manifest: dict[str, Any] = {
        "schema": 1,
        "recipe": case.plan.recipe.name,
        "target": case.target.name,
        "outcome": told["outcome"],
        "inputs": {name: known for name, known in case.read.items() if known is not None},
        "outputs": {name: {"sha256": model.digest, "bytes": model.size_bytes}},
        "candidate": told["choice"]["id"],
        "steps": {row["step"]: row["key"] for row in told["steps"]},
        "tools": told["tools"],
    }
    if told["inconclusive_ok"] and told["outcome"] == Outcome.INCONCLUSIVE:
        manifest["inconclusive-ok"] = True
    return manifest
