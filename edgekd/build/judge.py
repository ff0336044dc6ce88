# SPDX-License-Identifier: Apache-2.0
"""One target's end: scores, measurements, the choice, the verdict, the output folder; or the last verdict, where it stands."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from edgekd import config, registry
from edgekd.store import digests
from edgekd.report.target_run import TargetRun, TargetScores, artifacts, candidates, concerns_target, model_file, read_json, read_scores, teacher_measurement
from edgekd.store.digests import digest
from edgekd.domain.units import fraction_to_pp
from edgekd.domain.verdict import Outcome
from edgekd.harness import runner
from edgekd.report import document, markdown
from edgekd.stages import gate, measure, package, select
from edgekd.report.collect import manifest, collect_report

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgekd.domain.artifact import Candidate
    from edgekd.domain.measurement import Measurement
    from edgekd.domain.target import Target
    from edgekd.ports import Reporter


@dataclass(frozen=True, slots=True)
class JudgedTarget:
    """The report's document, and whether the last verdict stands."""

    document: Mapping[str, Any]
    standing: bool


def judge_target(case: TargetRun, reporter: Reporter) -> JudgedTarget:
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
        return JudgedTarget(previous, standing=True)
    scores = read_scores(case)
    accuracies = {candidate.id: _accuracy(case, candidate, scores) for candidate in candidates(case)}
    budget = case.plan.recipe.overrides_for(case.target.name).budget
    outcomes = {name: _worst(gate.accuracy_checks(budget, accuracy)) for name, accuracy in accuracies.items()}
    measurements = [] if why_not_here else _measured(case, outcomes, reporter)
    options = [_option(case, candidate, outcomes[candidate.id], accuracies[candidate.id], measurements) for candidate in candidates(case)]
    choice = select.select(options, case.plan.recipe.overrides_for(case.target.name).quantize.max_float_ops, budget.max_size_kib)
    evidence = gate.Evidence(
        accuracies[choice.option.candidate.id],
        read_json(artifacts(case, f"export/student/{choice.option.candidate.runtime}")["parity.json"]),
        choice.option.size_bytes,
        choice.measurement,
        teacher_measurement(choice.measurement, measurements),
        why_not_here or "no candidate within the accuracy budget was measured",
        _advice(case.target, why_not_here),
    )
    verdict = gate.judge(case.target.name, budget, case.target.limits, evidence)
    ships = verdict.outcome is Outcome.PASS or (verdict.outcome is Outcome.INCONCLUSIVE and case.inconclusive_ok)
    name = f"{case.plan.recipe.name}.{registry.runtime(choice.option.candidate.runtime).FORMAT}" if ships else None
    told_parts = collect_report(case, scores, accuracies, options, choice, measurements)
    told = document.with_verdict(
        {**told_parts, "standing": standing, "shipped": name, "inconclusive_ok": bool(name) and case.inconclusive_ok}, verdict
    )
    summary = markdown.render(told)
    if name is None:
        package.withhold(case.folder, told, summary)
    else:
        model = model_file(case, choice.option.candidate)
        package.ship(case.folder, model.path, name, manifest(case, told, name, model), told, summary)
    return JudgedTarget(told, standing=False)


def _standing(case: TargetRun, machine: Mapping[str, Any]) -> str:
    """Return a digest of all that a verdict follows from, but for the noise of measuring."""
    steps = {name: item.entry.key for name, item in case.done.items() if concerns_target(case, name)}
    identity = runner.identity(machine)
    wanted = case.plan.recipe.overrides_for(case.target.name)
    versions = {entry.package: digests.tool_version(entry.package) for entry in case.target.runtimes}
    return digest([steps, asdict(wanted), asdict(case.target), identity, versions])


def _stands(previous: Mapping[str, Any], case: TargetRun, why_not_here: str | None) -> bool:
    if previous["outcome"] != Outcome.INCONCLUSIVE:
        return True
    # nothing can be measured, so the same numbers would give the same verdict
    return why_not_here is not None and (previous["shipped"] is not None) == case.inconclusive_ok


def _accuracy(case: TargetRun, candidate: Candidate, scored: TargetScores) -> gate.Accuracy:
    from edgekd.stats import scores

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


def _measured(case: TargetRun, outcomes: Mapping[str, Outcome], reporter: Reporter) -> list[Measurement]:
    """Measure what may ship, and the teacher on each runtime of those."""
    fit = [candidate for candidate in candidates(case) if outcomes[candidate.id] is not Outcome.FAIL]
    if not fit:
        return []
    inputs = _probe_inputs(case)
    subjects = [
        measure.Subject(item.id, item.runtime, model_file(case, item).path, threads, inputs) for item in fit for threads in item.settings
    ]
    for name, threads in sorted({(item.runtime, threads) for item in fit for threads in item.settings}):
        model = artifacts(case, f"export/teacher/{name}").get(f"model.{registry.runtime(name).FORMAT}")
        if model is not None:
            subjects.append(measure.Subject("teacher", name, model.path, threads, inputs))
    reporter.log(f"measure: {len(subjects)} settings on {case.target.name}, the machine to itself")
    with reporter.step(f"measure/{case.target.name}") as progress:
        device = registry.device("local")

        def waiting() -> None:
            reporter.log("measure: waits until other builds on this machine have trained")

        return measure.measure(subjects, case.target.protocol, device, progress, waiting)


def _probe_inputs(case: TargetRun) -> list[Path]:
    inspected = artifacts(case, "inspect")
    return [inspected[f"evaluation.inputs.{index}.npy"].path for index in range(len(case.plan.recipe.student.inputs))]


def _option(
    case: TargetRun, candidate: Candidate, outcome: Outcome, accuracy: gate.Accuracy, measurements: Sequence[Measurement]
) -> select.Option:
    floating = case.done[candidate.model_step].entry.metrics.get("float_ops", 0)
    own = tuple(item for item in measurements if item.subject == candidate.id)
    return select.Option(candidate, model_file(case, candidate).size_bytes, int(floating), outcome, fraction_to_pp(accuracy.drop.value), own)  # type: ignore[arg-type]  # a count


def _advice(target: Target, why_not_here: str | None) -> str:
    if why_not_here is None:
        return "edgekd build --remeasure"
    return f"run this build on a {target.title}, or accept that with --inconclusive-ok"
