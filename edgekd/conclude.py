# SPDX-License-Identifier: Apache-2.0
"""One target's end: scores, measurements, the choice, the verdict, the output folder; or the last verdict, where it stands."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from edgekd import config, digests, registry
from edgekd.digests import digest
from edgekd.domain.units import fraction_to_pp
from edgekd.domain.verdict import Outcome
from edgekd.harness import runner
from edgekd.report import document, markdown
from edgekd.stages import gate, measure, package, select

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from edgekd.domain.artifact import Artifact, Candidate
    from edgekd.domain.measurement import Measurement
    from edgekd.domain.target import Target
    from edgekd.pipeline import Done, Teller
    from edgekd.plan import Plan
    from edgekd.scores import Scored


@dataclass(frozen=True, slots=True)
class Case:
    """What a verdict is about. ``read``: the user's files, for the manifest."""

    plan: Plan
    target: Target
    done: Mapping[str, Done]
    folder: Path
    read: Mapping[str, str | None]
    inconclusive_ok: bool
    remeasure: bool


@dataclass(frozen=True, slots=True)
class Concluded:
    """The report's document, and whether the last verdict stands."""

    document: Mapping[str, Any]
    standing: bool


@dataclass(frozen=True, slots=True)
class Scores:
    """All that was scored, by step id, and what the comparisons need."""

    of: Mapping[str, Scored]
    labels: np.ndarray
    groups: np.ndarray

    @property
    def teacher(self) -> Scored:
        """Return the reference."""
        return self.of["evaluate/teacher"]


def conclude(case: Case, teller: Teller) -> Concluded:
    """Judge one target and write its output folder.

    Raises:
        EdgekdError: if measuring or writing fails.
    """
    machine = runner.facts()
    why_not_here = config.why_not_this_machine(case.target, machine)
    standing = _standing(case, machine)
    previous = None if case.remeasure else package.read_previous(case.folder)
    if previous is not None and previous.get("standing") == standing and _stands(previous, case, why_not_here):
        package.touch(case.folder)
        return Concluded(previous, standing=True)
    scores = _read_scores(case)
    accuracies = {candidate.id: _accuracy(case, candidate, scores) for candidate in _candidates(case)}
    budget = case.plan.recipe.for_target(case.target.name).budget
    outcomes = {name: _worst(gate.accuracy_checks(budget, accuracy)) for name, accuracy in accuracies.items()}
    measurements = [] if why_not_here else _measured(case, outcomes, teller)
    options = [_option(case, candidate, outcomes[candidate.id], accuracies[candidate.id], measurements) for candidate in _candidates(case)]
    choice = select.select(options, case.plan.recipe.for_target(case.target.name).quantize.max_float_ops)
    evidence = gate.Evidence(
        accuracies[choice.option.candidate.id],
        _json(_artifacts(case, f"export/student/{choice.option.candidate.runtime}")["parity.json"]),
        choice.option.size_bytes,
        choice.measurement,
        _teacher_of(choice.measurement, measurements),
        why_not_here or "no candidate within the accuracy budget was measured",
        _advice(case.target, why_not_here),
    )
    verdict = gate.judge(case.target.name, budget, case.target.limits, evidence)
    ships = verdict.outcome is Outcome.PASS or (verdict.outcome is Outcome.INCONCLUSIVE and case.inconclusive_ok)
    name = f"{case.plan.recipe.name}.{registry.runtime(choice.option.candidate.runtime).FORMAT}" if ships else None
    parts = _parts(case, scores, accuracies, options, choice, measurements)
    told = document.with_verdict(
        {**parts, "standing": standing, "shipped": name, "inconclusive_ok": bool(name) and case.inconclusive_ok}, verdict
    )
    summary = markdown.render(told)
    if name is None:
        package.withhold(case.folder, told, summary)
    else:
        model = _model(case, choice.option.candidate)
        package.ship(case.folder, model.path, name, _manifest(case, told, name, model), told, summary)
    return Concluded(told, standing=False)


def provable_warnings(plan: Plan, done: Mapping[str, Done]) -> list[str]:
    """Return warnings where a budget is below what the evaluation set can prove."""
    from edgekd import stats

    independent = int(done["inspect"].entry.metrics["groups"])  # type: ignore[arg-type]  # inspect's own number
    best, usual = map(fraction_to_pp, stats.provable_drop(independent))
    told = []
    for target in plan.targets:
        limit = plan.recipe.for_target(target.name).budget.max_accuracy_drop_pp
        if limit is not None and limit < usual:
            verdict = "cannot pass, whatever the student" if limit < best else "may well end INCONCLUSIVE"
            told.append(
                f"{target.name}: {independent} independent evaluation samples prove a drop of {usual:.2f} pp where 5 % of answers differ "
                f"({best:.2f} pp at best); the budget max_accuracy_drop_pp = {limit:g} {verdict}"
            )
    return told


def measured_rows(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Return measurements of model files as rows; the speed-up is against the first file at the same threads."""
    rows = []
    for item in measurements:
        first = next(other for other in measurements if other.subject == measurements[0].subject)
        reference = next((other for other in measurements if other.subject == first.subject and other.threads == item.threads), None)
        rows.append({"model": item.subject, **_latency(item, None if reference is item else reference), "notes": list(item.notes)})
    return rows


def _standing(case: Case, machine: Mapping[str, Any]) -> str:
    """Return a digest of all that a verdict follows from, but for the noise of measuring."""
    steps = {name: item.entry.key for name, item in case.done.items() if _concerns(case, name)}
    identity = runner.identity(machine)
    wanted = case.plan.recipe.for_target(case.target.name)
    versions = {entry.package: digests.tool_version(entry.package) for entry in case.target.runtimes}
    return digest([steps, asdict(wanted), asdict(case.target), identity, versions])


def _concerns(case: Case, step: str) -> bool:
    """Return whether a step is this target's: another target's candidates do not move its verdict."""
    own = {name for candidate in case.plan.candidates[case.target.name] for name in (candidate.model_step, candidate.evaluate_step)}
    return step in own or "quantize/" not in step


def _stands(previous: Mapping[str, Any], case: Case, why_not_here: str | None) -> bool:
    if previous["outcome"] != Outcome.INCONCLUSIVE:
        return True
    # nothing can be measured, so the same numbers would give the same verdict
    return why_not_here is not None and (previous["shipped"] is not None) == case.inconclusive_ok


def _candidates(case: Case) -> tuple[Candidate, ...]:
    return case.plan.candidates[case.target.name]


def _artifacts(case: Case, step: str) -> Mapping[str, Artifact]:
    return case.done[step].entry.artifacts


def _model(case: Case, candidate: Candidate) -> Artifact:
    return _artifacts(case, candidate.model_step)[f"model.{registry.runtime(candidate.runtime).FORMAT}"]


def _json(artifact: Artifact) -> Any:
    return json.loads(artifact.path.read_text())


def _read_scores(case: Case) -> Scores:
    import numpy as np

    from edgekd import scores

    found = {
        name: scores.read(item.entry.artifacts)
        for name, item in case.done.items()
        if item.step.stage == "evaluate" and _concerns(case, name)
    }
    inspected = _artifacts(case, "inspect")
    return Scores(found, np.load(inspected["evaluation.labels.npy"].path), np.load(inspected["evaluation.groups.npy"].path))


def _accuracy(case: Case, candidate: Candidate, scored: Scores) -> gate.Accuracy:
    from edgekd import scores

    own = scored.of[candidate.evaluate_step]
    variant = {key: value for key, value in candidate.quantize.items() if key not in {"scheme", "io"}}
    unfit = registry.runtime(candidate.runtime).why_unfit(candidate.scheme, variant, own.instruction_set)
    if unfit is not None and case.target.device.arch == "x86_64":
        unfit = None if config.why_not_this_machine(case.target, runner.facts()) is None else unfit
    return gate.Accuracy(
        own.accuracy,
        scores.accuracy_interval(own, scored.groups),
        scores.difference(scored.teacher, own, scored.groups),
        scores.class_drops(scored.teacher, own, scored.labels, scored.groups),
        unfit,
    )


def _worst(checks: Sequence[Any]) -> Outcome:
    found = {check.outcome for check in checks}
    return next((outcome for outcome in (Outcome.FAIL, Outcome.INCONCLUSIVE) if outcome in found), Outcome.PASS)


def _measured(case: Case, outcomes: Mapping[str, Outcome], teller: Teller) -> list[Measurement]:
    """Measure what may ship, and the teacher on each runtime of those."""
    fit = [candidate for candidate in _candidates(case) if outcomes[candidate.id] is not Outcome.FAIL]
    if not fit:
        return []
    inputs = _probe_inputs(case)
    subjects = [
        measure.Subject(item.id, item.runtime, _model(case, item).path, threads, inputs) for item in fit for threads in item.settings
    ]
    for name, threads in sorted({(item.runtime, threads) for item in fit for threads in item.settings}):
        model = _artifacts(case, f"export/teacher/{name}").get(f"model.{registry.runtime(name).FORMAT}")
        if model is not None:
            subjects.append(measure.Subject("teacher", name, model.path, threads, inputs))
    teller.say(f"measure: {len(subjects)} settings on {case.target.name}, the machine to itself")
    with teller.step(f"measure/{case.target.name}") as progress:
        device = registry.device("local")
        waiting = lambda: teller.say("measure: waits until other builds on this machine have trained")  # noqa: E731
        return measure.measure(subjects, case.target.protocol, device, progress, waiting)


def _probe_inputs(case: Case) -> list[Path]:
    inspected = _artifacts(case, "inspect")
    return [inspected[f"evaluation.inputs.{index}.npy"].path for index in range(len(case.plan.recipe.student.inputs))]


def _option(
    case: Case, candidate: Candidate, outcome: Outcome, accuracy: gate.Accuracy, measurements: Sequence[Measurement]
) -> select.Option:
    floating = case.done[candidate.model_step].entry.metrics.get("float_ops", 0)
    own = tuple(item for item in measurements if item.subject == candidate.id)
    return select.Option(candidate, _model(case, candidate).size_bytes, int(floating), outcome, fraction_to_pp(accuracy.drop.value), own)  # type: ignore[arg-type]  # a count


def _teacher_of(measurement: Measurement | None, measurements: Sequence[Measurement]) -> Measurement | None:
    if measurement is None:
        return None
    return next(
        (m for m in measurements if m.subject == "teacher" and (m.runtime, m.threads) == (measurement.runtime, measurement.threads)), None
    )


def _advice(target: Target, why_not_here: str | None) -> str:
    if why_not_here is None:
        return "edgekd build --remeasure"
    return f"run this build on a {target.title}, or accept that with --inconclusive-ok"


def _parts(
    case: Case,
    scored: Scores,
    accuracies: Mapping[str, gate.Accuracy],
    options: Sequence[select.Option],
    choice: select.Choice,
    measurements: Sequence[Measurement],
) -> dict[str, Any]:
    from edgekd import scores

    inspected = case.done["inspect"].entry.metrics
    chosen = choice.option.candidate
    own = scored.of[chosen.evaluate_step]
    rows = [_candidate_row(case, scored, accuracies[option.candidate.id], option, choice, measurements) for option in options]
    steps = [
        {"step": name, "key": item.entry.key[:12], "hit": item.hit, "seconds": item.entry.seconds}
        for name, item in case.done.items()
        if _concerns(case, name)
    ]
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
        "student": {"parameters": inspected["student"]["parameters"], "curve": _json(_artifacts(case, "distill")["curve.json"])},  # type: ignore[call-overload,index]
        "charges": _charges(scored, chosen),
        "classes": dict(accuracies[chosen.id].classes),
        "inherited": scores.inherited(scored.teacher, own, scored.labels),
        "instruction_set": own.instruction_set,
        "environment": dict(measurements[0].environment) if measurements else None,
        "steps": steps,
        "tools": tools,
        "notes": _notes(case, measurements),
        "measured_at": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _candidate_row(
    case: Case, scored: Scores, accuracy: gate.Accuracy, option: select.Option, choice: select.Choice, measurements: Sequence[Measurement]
) -> dict[str, Any]:
    from edgekd import scores

    candidate = option.candidate
    return {
        "id": candidate.id,
        "runtime": candidate.runtime,
        "scheme": candidate.scheme,
        "rung": candidate.rung,
        "size_bytes": option.size_bytes,
        "digest": _model(case, candidate).digest,
        "float_ops": option.float_ops,
        "accuracy": accuracy.value,
        "interval": scores.interval_row(accuracy.interval),
        "drop": scores.as_row(accuracy.drop),
        "agreement": scores.agreement(scored.teacher, scored.of[candidate.evaluate_step]),
        "outcome": option.accuracy.value,
        "latency": [_latency(item, _teacher_of(item, measurements)) for item in option.measurements],
        "why_not": choice.why_not.get(candidate.id),
        "notes": list(case.done[candidate.model_step].entry.notes),
    }


def _latency(item: Measurement, reference: Measurement | None) -> dict[str, Any]:
    from edgekd import stats

    samples = item.samples_ns()
    found: dict[str, Any] = {
        "runtime": item.runtime,
        "runtime_version": item.runtime_version,
        "threads": item.threads,
        "runs": len(samples),
    }
    for name, quantile in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        value, interval = stats.quantile_interval(samples, quantile)
        found[name] = {"ms": value / 1e6, "interval": None if interval is None else [interval.low / 1e6, interval.high / 1e6]}
    found["first_ms"], found["load_ms"] = item.first_ns / 1e6, item.load_ns / 1e6
    found["peak_rss_mib"] = None if item.peak_rss_bytes is None else item.peak_rss_bytes / 2**20
    found["speedup"] = None if reference is None else _ratio(reference, item)
    return found


def _speedup(measurement: Measurement | None, measurements: Sequence[Measurement]) -> dict[str, Any] | None:
    teacher = _teacher_of(measurement, measurements)
    return None if teacher is None or measurement is None else _ratio(teacher, measurement)


def _ratio(reference: Measurement, item: Measurement) -> dict[str, Any]:
    from edgekd import stats

    value, interval = stats.ratio_of_medians(reference.blocks_ns, item.blocks_ns)
    return {"x": value, "interval": [interval.low, interval.high]}


def _charges(scored: Scores, chosen: Candidate) -> list[dict[str, Any]]:
    """Return what each stage cost, in points, each paired with what went in."""
    from edgekd import scores

    student = scored.of["evaluate/student"]
    exported = scored.of[f"evaluate/export/student/{chosen.runtime}"]
    pairs = [("distill", scored.teacher, student), ("export", student, exported)]
    if chosen.evaluate_step != f"evaluate/export/student/{chosen.runtime}":
        pairs.append(("quantize", exported, scored.of[chosen.evaluate_step]))
    pairs.append(("in all", scored.teacher, scored.of[chosen.evaluate_step]))
    return [{"stage": name, **scores.as_row(scores.difference(first, second, scored.groups))} for name, first, second in pairs]


def _notes(case: Case, measurements: Sequence[Measurement]) -> list[str]:
    notes = [note for name in ("inspect",) for note in case.done[name].entry.notes]
    notes += [note for name, item in case.done.items() if name.startswith("export/teacher/") for note in item.entry.notes]
    notes += provable_warnings(case.plan, case.done) if len(case.plan.targets) == 1 else []
    notes += sorted({note for item in measurements for note in item.notes})
    return notes


def _manifest(case: Case, told: Mapping[str, Any], name: str, model: Artifact) -> dict[str, Any]:
    manifest: dict[str, Any] = {
        "schema": 1,
        "recipe": case.plan.recipe.name,
        "target": case.target.name,
        "outcome": told["outcome"],
        "inputs": dict(case.read),
        "outputs": {name: {"sha256": model.digest, "bytes": model.size_bytes}},
        "candidate": told["choice"]["id"],
        "steps": {row["step"]: row["key"] for row in told["steps"]},
        "tools": told["tools"],
    }
    if told["inconclusive_ok"] and told["outcome"] == Outcome.INCONCLUSIVE:
        manifest["inconclusive-ok"] = True
    return manifest
