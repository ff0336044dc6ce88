# SPDX-License-Identifier: Apache-2.0
"""Collect what the report of one target contains, from steps, scores and measurements."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from edgekd.domain.measurement import TEACHER
from edgekd.domain.units import fraction_to_pp
from edgekd.domain.verdict import Outcome
from edgekd.errors import printable
from edgekd.report import cost, document, provable
from edgekd.report.target_run import read_json, teacher_measurement

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.candidate import Accuracy, Candidate, Choice, Option
    from edgekd.domain.measurement import Measurement
    from edgekd.ports import CompletedStep
    from edgekd.report.target_run import TargetRun, TargetScores

NOTED_STAGES = ("inspect", "teach", "soft_targets", "distill")  # their notes are about the whole build
CAPACITY_GAP_PP, CAPACITY_OVERFIT_PP = 3.0, 1.0


def collect_report(
    target_run: TargetRun,
    scores: TargetScores,
    accuracies: Mapping[str, Accuracy],
    options: Sequence[Option],
    choice: Choice,
    measurements: Sequence[Measurement],
) -> dict[str, Any]:
    """Return everything in a report except the verdict."""
    from edgekd.stats.scores import shared_errors

    chosen = choice.option.candidate
    student = scores.by_step[chosen.evaluate_step]
    rows = [_candidate_row(target_run, scores, accuracies[option.candidate.id], option, choice, measurements) for option in options]
    costs = cost.training_cost(target_run, choice.measurement, measurements)
    completed = target_run.completed
    return {
        "edgekd": document.version(),
        "recipe": target_run.plan.recipe.name,
        "recipe_file": target_run.recipe_file,
        "target": {"name": target_run.target.name, "title": target_run.target.title},
        "choice": next(row for row in rows if row["id"] == chosen.id)
        | {"threads": choice.threads, "selected_by": choice.selected_by, "speedup": _teacher_speedup(choice.measurement, measurements)},
        "candidates": rows,
        "left_out": [{"id": name, "why_not": reason} for name, reason in target_run.left_out.items()],
        "teacher": _teacher(target_run, scores, measurements),
        "student": {
            "parameters": _inspected(completed)["student"]["parameters"],
            "curve": read_json(target_run.artifacts("distill")["curve.json"]),
        },
        "accuracy_drop_by_stage": _accuracy_drop_by_stage(scores, chosen),
        "distillation": _distillation(target_run, scores),
        "cost": costs,
        "classes": dict(accuracies[chosen.id].classes),
        "shared_errors": shared_errors(scores.teacher, student, scores.labels),
        "instruction_set": student.instruction_set,
        "environment": dict(measurements[0].environment) if measurements else None,
        "steps": [
            {"step": name, "key": item.entry.key[:12], "hit": item.hit, "seconds": item.entry.seconds}
            for name, item in completed.items()
            if target_run.concerns(name)
        ],
        "tools": {tool: version for item in completed.values() for tool, version in item.entry.material["tools"].items()},
        "notes": _notes(target_run, measurements, costs),
        "seconds": _seconds(target_run, measurements),
        "measured_at": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def manifest(target_run: TargetRun, report: Mapping[str, Any], model: Artifact) -> dict[str, Any]:
    """Return the manifest of the model that ships: digests of the inputs and the output, and versions."""
    manifest: dict[str, Any] = {
        "schema": 1,
        "edgekd": document.version(),
        "recipe": target_run.plan.recipe.name,
        "recipe_file": target_run.recipe_file,
        "target": target_run.target.name,
        "outcome": report["outcome"],
        "verdict_key": report["verdict_key"],
        "inputs": input_digests(target_run.input_files),
        "outputs": {report["shipped"]: {"sha256": model.digest, "bytes": model.size_bytes}},
        "candidate": report["choice"]["id"],
        "steps": {row["step"]: row["key"] for row in report["steps"]},
        "tools": report["tools"],
    }
    if report["inconclusive_ok"] and report["outcome"] == Outcome.INCONCLUSIVE:
        manifest["inconclusive-ok"] = True
    return manifest


def input_digests(files: Mapping[str, str | None]) -> dict[str, str]:
    """Return the digests of the files that a build read, by names that show no folder of the user.

    ``files`` are by their paths from the recipe's folder. A file outside of it is named by its last part and its digest.
    """
    digests = {}
    for name, sha256 in files.items():
        if sha256 is not None:
            parts = PurePath(name).parts
            is_outside = PurePath(name).is_absolute() or ".." in parts
            digests[printable(f"{parts[-1]}:{sha256[:16]}" if is_outside else name)] = sha256
    return digests


def measurement_rows(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Return measurements of model files as rows; the speed-up is relative to the first file at the same thread count."""
    references = {item.threads: item for item in reversed(measurements) if item.subject == measurements[0].subject}
    rows = []
    for item in measurements:
        reference = references.get(item.threads)
        rows.append({"model": item.subject, **_latency(item, None if reference is item else reference), "notes": list(item.notes)})
    return rows


def _inspected(completed: Mapping[str, CompletedStep]) -> Any:
    """Return the metrics of the inspect step, a mapping of its own."""
    return completed["inspect"].entry.metrics


def _teacher(target_run: TargetRun, scores: TargetScores, measurements: Sequence[Measurement]) -> dict[str, Any]:
    from edgekd.stats.scores import accuracy_interval, interval_row

    return {
        "parameters": _inspected(target_run.completed)["teacher"]["parameters"],
        "accuracy": scores.teacher.accuracy,
        "interval": interval_row(accuracy_interval(scores.teacher, scores.groups)),
        "latency": [_latency(item, None) for item in measurements if item.subject == TEACHER],
    }


def _candidate_row(
    target_run: TargetRun,
    scores: TargetScores,
    accuracy: Accuracy,
    option: Option,
    choice: Choice,
    measurements: Sequence[Measurement],
) -> dict[str, Any]:
    from edgekd.stats.scores import agreement, difference_row, interval_row

    candidate, student = option.candidate, target_run.plan.recipe.student
    return {
        "id": candidate.id,
        "runtime": candidate.runtime,
        "scheme": candidate.scheme,
        "rung": candidate.rung,
        "size_bytes": option.size_bytes,
        "digest": target_run.model_file(candidate).digest,
        "float_ops": option.float_ops,
        "accuracy": accuracy.value,
        "interval": interval_row(accuracy.interval),
        "drop": difference_row(accuracy.drop),
        "agreement": agreement(scores.teacher, scores.by_step[candidate.evaluate_step], student.task, student.heads),
        "outcome": option.accuracy.value,
        "latency": [_latency(item, teacher_measurement(item, measurements)) for item in option.measurements],
        "estimates": [document.estimate_row(item) for item in option.estimates],
        "no_estimate": option.no_estimate,
        "why_not": choice.why_not.get(candidate.id),
        "notes": list(target_run.completed[candidate.model_step].entry.notes),
    }


def _latency(measurement: Measurement, reference: Measurement | None) -> dict[str, Any]:
    from edgekd.stats.intervals import quantile_interval

    samples = measurement.samples_ns()
    row: dict[str, Any] = {
        "runtime": measurement.runtime,
        "runtime_version": measurement.runtime_version,
        "threads": measurement.threads,
        "runs": len(samples),
    }
    for name, quantile in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        value, interval = quantile_interval(samples, quantile)
        row[name] = {"ms": value / 1e6, "interval": None if interval is None else [interval.low / 1e6, interval.high / 1e6]}
    row["first_ms"], row["load_ms"] = measurement.first_ns / 1e6, measurement.load_ns / 1e6
    row["peak_rss_mib"] = None if measurement.peak_rss_bytes is None else measurement.peak_rss_bytes / 2**20
    row["speedup"] = None if reference is None else _speedup(reference, measurement)
    return row


def _teacher_speedup(measurement: Measurement | None, measurements: Sequence[Measurement]) -> dict[str, Any] | None:
    teacher = teacher_measurement(measurement, measurements)
    return None if teacher is None or measurement is None else _speedup(teacher, measurement)


def _speedup(reference: Measurement, measurement: Measurement) -> dict[str, Any]:
    from edgekd.stats.intervals import ratio_of_medians
    from edgekd.stats.scores import interval_row

    value, interval = ratio_of_medians(reference.blocks_ns, measurement.blocks_ns)
    return {"x": value, "interval": interval_row(interval)}


def _seconds(target_run: TargetRun, measurements: Sequence[Measurement]) -> dict[str, float]:
    """Return how long the build took so far, and how long the stages that ran in it took; the rest is overhead."""
    stages = sum(item.entry.seconds for item in target_run.completed.values() if not item.hit)
    stages += measurements[0].environment["seconds"] if measurements else 0.0  # type: ignore[operator]  # a number of seconds
    return {"total": round(time.monotonic() - target_run.started, 3), "stages": round(stages, 3)}


def _accuracy_drop_by_stage(scores: TargetScores, chosen: Candidate) -> list[dict[str, Any]]:
    """Return the accuracy drop of each stage, in points, each paired with the model that the stage started from."""
    from edgekd.stats.scores import difference, difference_row

    export_step = f"evaluate/export/student/{chosen.runtime}"
    student, exported, shipped = (scores.by_step[name] for name in ("evaluate/student", export_step, chosen.evaluate_step))
    pairs = [("distill", scores.teacher, student), ("export", student, exported)]
    if chosen.evaluate_step != export_step:
        pairs.append(("quantize", exported, shipped))
    pairs.append(("total", scores.teacher, shipped))
    return [{"stage": name, **difference_row(difference(before, after, scores.groups))} for name, before, after in pairs]


def _distillation(target_run: TargetRun, scores: TargetScores) -> dict[str, Any] | None:
    """Return whether distillation helped, with the losses and the time of each method; None if the recipe has no baselines."""
    from edgekd.stats.distillation import judge_distillation

    recipe = target_run.plan.recipe
    if not recipe.methods:
        return None
    entries = {method: [target_run.completed[name].entry for name in names] for method, names in recipe.methods.items()}
    verdict = judge_distillation(
        {
            method: [scores.by_step["evaluate/student" if name == "distill" else f"evaluate/{name}"] for name in names]
            for method, names in recipe.methods.items()
        },
        {method: [_validation_score(entry.metrics) for entry in seeds] for method, seeds in entries.items()},
        scores.teacher,
        scores.labels,
        scores.groups,
        calibrated=recipe.evaluate.metric == "top1" and recipe.evaluate.score is None,
    )
    for row in verdict["methods"]:
        row["losses"] = entries[row["method"]][0].metrics["losses"]  # with what a search chose
        row["seconds"] = sum(entry.seconds for entry in entries[row["method"]])
    return verdict


def _validation_score(metrics: Mapping[str, Any]) -> float:
    """Return the accuracy on the validation split, or the negative loss where there is no accuracy."""
    accuracy = metrics["validation_accuracy"]
    return -float(metrics["validation_loss"]) if accuracy is None else float(accuracy)


def _notes(target_run: TargetRun, measurements: Iterable[Measurement], costs: Mapping[str, Any]) -> list[str]:
    # the steps of the baselines and their soft targets repeat the notes of the student's steps
    baselines = {name for names in target_run.plan.recipe.methods.values() for name in names} - {"distill"}
    repeated = baselines | {name.replace("distill/", "soft_targets/", 1) for name in baselines}
    notes = [
        note
        for name, completed in target_run.completed.items()
        if completed.step.stage in NOTED_STAGES and name not in repeated
        for note in completed.entry.notes
    ]
    notes += [
        f"the teacher has no {completed.step.params.runtime} model, so the speed-up against it is unknown there: {completed.why_not}"
        for name, completed in target_run.completed.items()
        if name.startswith("export/teacher/") and completed.why_not is not None
    ]
    notes += [
        f"{why_not}; so the speed-up against it is unknown there" for (name, _), why_not in target_run.unmeasured.items() if name == TEACHER
    ]
    notes += provable.budget_warnings(target_run.plan, target_run.completed) if len(target_run.plan.targets) == 1 else []
    notes += filter(
        None,
        [
            _undefined_note(target_run),
            _capacity_note(target_run),
            _sizes_note(target_run),
            cost.break_even_note(target_run, costs),
            cost.busy_note(costs),
        ],
    )
    notes += sorted({note for measurement in measurements for note in measurement.notes})
    return notes


def _undefined_note(target_run: TargetRun) -> str | None:
    """Return a note that a metric has no interval, because it is undefined without some part of the evaluation set, or None."""
    metrics: list[Any] = [item.entry.metrics for name, item in target_run.completed.items() if name.startswith("evaluate/")]
    worst: Any = max(metrics, key=lambda item: item.get("undefined", 0), default={})
    if not worst.get("undefined"):
        return None
    return (
        f"the metric is undefined without {worst['undefined']} of {worst['parts']} parts of the evaluation set, as without all samples of "
        "a class, so it has no interval"
    )


def _capacity_note(target_run: TargetRun) -> str | None:
    """Return a note that the student is too small to learn what its teacher knows, or None.

    It is too small if its validation accuracy is below the teacher's although its training accuracy is no better: it does not
    overfit, so neither more data nor more epochs would close the gap. Views are harder than their samples, so there is no note then.
    """
    recipe, metrics = target_run.plan.recipe, target_run.completed["distill"].entry.metrics
    train, validation = metrics["train_accuracy"], metrics["validation_accuracy"]
    teacher = target_run.completed["soft_targets"].entry.metrics["validation_accuracy"]
    if recipe.distill.augment is not None or train is None or validation is None or teacher is None:
        return None
    gap, overfit = fraction_to_pp(teacher - validation), fraction_to_pp(train - validation)  # type: ignore[operator]  # these stages write numbers
    if gap < CAPACITY_GAP_PP or overfit > CAPACITY_OVERFIT_PP:
        return None
    advice = "" if recipe.sizes else "; a wider or deeper student would gain more than data or epochs: name some in distill.sizes"
    return (
        f"the student's capacity is the limit: its validation accuracy is {gap:.1f} pp below the teacher's, and its training accuracy "
        f"only {max(overfit, 0.0):.1f} pp above that{advice}"
    )


def _sizes_note(target_run: TargetRun) -> str | None:
    """Return the accuracy of students of other sizes, and the smallest that is close enough to the teacher; None if there are none.

    Close enough is the recipe's budget for the accuracy drop, or 3 points. All accuracies are those on the validation split.
    """
    metrics: Any = {name: completed.entry.metrics for name, completed in target_run.completed.items()}
    recipe, teacher = target_run.plan.recipe, metrics["soft_targets"]["validation_accuracy"]
    if not recipe.sizes or teacher is None:
        return None
    parameters = {str(recipe.student.model): metrics["inspect"]["student"]["parameters"], **metrics["inspect"]["sizes"]}
    students = {"distill": recipe.student.model, **recipe.sizes}
    rows = sorted((parameters[str(model)], str(model), metrics[step]["validation_accuracy"]) for step, model in students.items())
    accuracies = ", ".join(f"{model} ({count:,} parameters) {100 * accuracy:.2f} %" for count, model, accuracy in rows)
    limit = recipe.overrides_for(target_run.target.name).budget.max_accuracy_drop_pp
    allowed = CAPACITY_GAP_PP if limit is None else limit
    smallest = next((model for _, model, accuracy in rows if fraction_to_pp(teacher - accuracy) <= allowed), None)
    advice = f"none is within {allowed:g} pp: try larger ones" if smallest is None else f"the smallest within {allowed:g} pp is {smallest}"
    return f"sizes, on validation, where the teacher has {100 * teacher:.2f} %: {accuracies}; {advice}"
