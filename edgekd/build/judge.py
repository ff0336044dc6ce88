# SPDX-License-Identifier: Apache-2.0
"""One target, from its completed steps to a verdict and an output folder; or the cached verdict, if nothing has changed."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import config, registry
from edgekd.build import devices, keys
from edgekd.domain.candidate import Accuracy, Option
from edgekd.domain.device import DeviceSpec
from edgekd.domain.measurement import TEACHER
from edgekd.domain.units import fraction_to_pp
from edgekd.domain.verdict import Outcome
from edgekd.errors import StageError
from edgekd.harness import runner
from edgekd.plan import check_reasons
from edgekd.report import collect, document, markdown
from edgekd.report.target_run import read_json, read_scores, teacher_measurement
from edgekd.stages import gate, measure, package, select
from edgekd.store import locks
from edgekd.store.arrays import open_array
from edgekd.store.digests import digest, file_digest, tool_version

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgekd.domain.candidate import Candidate, Choice
    from edgekd.domain.measurement import Measurement
    from edgekd.domain.verdict import Verdict
    from edgekd.ports import Reporter
    from edgekd.report.target_run import TargetRun, TargetScores


# the modules and packages that decide a verdict or write its report: their source is part of the key of a cached verdict
CODE = (
    *(
        "__init__",
        "build/devices",
        "build/judge",
        "config/profiles",
        "devices",
        "domain",
        "estimate",
        "harness",
        "plan",
        "report",
        "runtimes",
    ),
    *("stages/gate", "stages/measure", "stages/package", "stages/select", "stats", "store/arrays", "store/documents"),
)


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one target: its report, whether that is a cached verdict, and the exit code."""

    document: Mapping[str, Any]
    cached: bool
    exit_code: int


def judge_target(target_run: TargetRun, reporter: Reporter) -> Result:
    """Judge one target and write its output folder, which this process locks meanwhile.

    Raises:
        EdgekdError: if measuring or writing fails.
    """
    folder = target_run.folder

    def on_wait(holders: str) -> None:
        reporter.log(f"{folder}: waits until another build has written it: {holders}")

    with locks.exclusive_folder(folder, on_wait):
        package.remove_leftovers(folder)
        device = target_run.device
        machine = runner.facts() if device is None else device.facts
        why_not_here = config.why_not_this_machine(target_run.target, machine) if device is None else None
        verdict_key = _verdict_key(target_run, machine)
        cached = _cached_verdict(target_run, verdict_key, why_not_here, reporter)
        if cached is not None:
            package.confirm(folder, markdown.render(cached))
            return _result(target_run, cached, cached=True)
        package.check_recipe(folder, target_run.recipe, target_run.plan.recipe.name)  # another build may have written meanwhile
        return _result(target_run, _judge(target_run, verdict_key, why_not_here, reporter), cached=False)


def _judge(target_run: TargetRun, verdict_key: str, why_not_here: str | None, reporter: Reporter) -> Mapping[str, Any]:
    """Measure and judge the candidates, write the output folder, and return the report."""
    settings, scores = target_run.settings, read_scores(target_run)
    accuracies = {candidate.id: _accuracy(target_run, candidate, scores, why_not_here) for candidate in target_run.candidates}
    outcomes = {name: gate.accuracy_outcome(settings.budget, accuracy) for name, accuracy in accuracies.items()}
    measurements: list[Measurement] = []
    if not why_not_here:
        measurements, unmeasured = _measure(target_run, outcomes, reporter)
        target_run = replace(target_run, unmeasured=unmeasured)
        check_reasons(target_run.plan, target_run.target, target_run.left_out)
    options = [_option(target_run, item, outcomes[item.id], accuracies[item.id], measurements) for item in target_run.candidates]
    if why_not_here:
        options = [_with_estimates(target_run, option) for option in options]
    choice = select.select(options, settings.quantize.max_float_ops, settings.budget.max_size_kib)
    verdict = _judge_choice(target_run, choice, accuracies[choice.option.candidate.id], measurements, why_not_here)
    report = collect.collect_report(target_run, scores, accuracies, options, choice, measurements)
    report = document.with_verdict({**report, "verdict_key": verdict_key, **_shipped(target_run, choice, verdict)}, verdict)
    _write_output(target_run, choice, report)
    return report


def _result(target_run: TargetRun, report: Mapping[str, Any], *, cached: bool) -> Result:
    return Result(report, cached, document.exit_code(report, inconclusive_ok=target_run.inconclusive_ok))


def _verdict_key(target_run: TargetRun, machine: Mapping[str, Any]) -> str:
    """Return a digest of everything that a verdict depends on, except the noise of measuring."""
    steps = {name: completed.entry.key for name, completed in target_run.completed.items() if target_run.concerns(name)}
    device = target_run.device
    versions = {entry.package: tool_version(entry.package) for entry in target_run.target.runtimes} if device is None else device.versions
    settings = target_run.settings
    recipe = replace(target_run.plan.recipe, budget=settings.budget, quantize=settings.quantize, target={})
    recipes = [asdict(recipe), target_run.recipe_file]
    runtimes = [registry.source_folder("runtimes", entry.name) for entry in target_run.target.runtimes]
    coefficients = file_digest(keys.PACKAGE / "estimate" / "coefficients.toml")
    code = [document.version(), coefficients, keys.source_digest([*(keys.PACKAGE / name for name in CODE), *runtimes])]
    return digest([steps, recipes, asdict(target_run.target), runner.identity(machine), versions, code])


def _cached_verdict(target_run: TargetRun, verdict_key: str, why_not_here: str | None, reporter: Reporter) -> Mapping[str, Any] | None:
    """Return the report of the last build if its verdict is still valid, or None."""
    report = None if target_run.remeasure else package.read_previous(target_run.folder, reporter.log)
    if report is None or report["verdict_key"] != verdict_key:
        return None
    if report["outcome"] == Outcome.INCONCLUSIVE:
        # measuring again may end it; if nothing can be measured here, the same numbers would give the same verdict
        is_final = why_not_here is not None and (report["shipped"] is not None) == target_run.inconclusive_ok
        return report if is_final else None
    return report


def _accuracy(target_run: TargetRun, candidate: Candidate, scores: TargetScores, why_not_here: str | None) -> Accuracy:
    from edgekd.stats.scores import accuracy_interval, class_drops, difference

    student, teacher = scores.by_step[candidate.evaluate_step], scores.teacher
    variant = {key: value for key, value in candidate.quantize.items() if key not in {"scheme", "io"}}
    unfit = registry.runtime(candidate.runtime).why_unfit(candidate.scheme, variant, student.instruction_set)
    if target_run.target.device.arch == "x86_64" and why_not_here is None and _has_instructions(target_run, student.instruction_set):
        unfit = None  # evaluated with the target's own instructions
    return Accuracy(
        student.accuracy,
        accuracy_interval(student, scores.groups),
        difference(teacher, student, scores.groups),
        class_drops(teacher, student, scores.labels, scores.groups),
        unfit,
    )


def _has_instructions(target_run: TargetRun, instruction_set: str) -> bool:
    """Return whether the machine that measures has the instruction set of the evaluation, which ran on this machine."""
    return target_run.device is None or target_run.device.facts["instruction_set"] == instruction_set


def _measure(
    target_run: TargetRun, outcomes: Mapping[str, Outcome], reporter: Reporter
) -> tuple[list[Measurement], Mapping[tuple[str, str], str]]:
    """Measure the candidates that may ship, and the teacher on their runtimes; return also why some cannot be measured."""
    candidates = [item for item in target_run.candidates if outcomes[item.id] is not Outcome.FAIL]
    if not candidates:
        return [], {}
    with tempfile.TemporaryDirectory() as folder:
        return _measure_subjects(target_run, _subjects(target_run, candidates, _write_samples(target_run, Path(folder))), reporter)


def _measure_subjects(
    target_run: TargetRun, subjects: Sequence[measure.Subject], reporter: Reporter
) -> tuple[list[Measurement], Mapping[tuple[str, str], str]]:
    target, device = target_run.target, target_run.device
    spec = DeviceSpec("local") if device is None else device.spec
    machine = "this machine" if device is None else spec.label
    reporter.log(f"measure: {len(subjects)} settings on {target.name}, with exclusive access to {machine}")

    def on_wait(holders: str) -> None:
        reporter.log(f"measure: waits for exclusive access to {machine}, which {holders} uses")

    with reporter.step(f"measure/{target.name}") as progress, registry.device(spec.kind).connect(spec) as connection:
        if device is not None:
            devices.check_unchanged(device, connection)
        measurements, failures = measure.measure_sound(subjects, target.protocol, connection, progress, on_wait)
    for (name, runtime), reason in failures.items():
        reporter.log(f"warning: {name} is left out on {runtime}: {reason}; edgekd build --remeasure tries it again")
    return measurements, failures


def _write_samples(target_run: TargetRun, folder: Path) -> list[Path]:
    """Write the samples that a measurement runs, as the plain arrays that the harness reads; return their paths."""
    import numpy as np

    paths = []
    for path in target_run.evaluation_inputs():
        paths.append(folder / path.name)
        np.save(paths[-1], open_array(path)[: runner.MAX_SAMPLES], allow_pickle=False)
    return paths


def _subjects(target_run: TargetRun, candidates: Sequence[Candidate], inputs: Sequence[Path]) -> list[measure.Subject]:
    """Return the model files to measure: each candidate, and the teacher, at each of their thread counts."""
    subjects = [
        measure.Subject(candidate.id, candidate.runtime, target_run.model_file(candidate).path, threads, inputs)
        for candidate in candidates
        for threads in candidate.settings
    ]
    for runtime, threads in sorted({(subject.runtime, subject.threads) for subject in subjects}):
        model = target_run.teacher_file(runtime)
        if model is not None:
            subjects.append(measure.Subject(TEACHER, runtime, model.path, threads, inputs))
    return subjects


def _option(
    target_run: TargetRun, candidate: Candidate, outcome: Outcome, accuracy: Accuracy, measurements: Sequence[Measurement]
) -> Option:
    float_ops = int(target_run.completed[candidate.model_step].entry.metrics.get("float_ops", 0))  # type: ignore[arg-type]  # a count
    measured = tuple(item for item in measurements if item.subject == candidate.id)
    size = target_run.model_file(candidate).size_bytes
    return Option(candidate, size, float_ops, outcome, fraction_to_pp(accuracy.drop.value), measured)


def _with_estimates(target_run: TargetRun, option: Option) -> Option:
    """Return an option with the estimates of its latency on the target, or with why there are none."""
    from edgekd.estimate import latency

    candidate = option.candidate
    path = target_run.model_file(candidate).path
    try:
        estimates = latency.estimate_file(path, target_run.target, candidate.runtime, candidate.scheme, candidate.settings)
    except StageError as error:
        return replace(option, no_estimate=f"no estimate: {error}")
    return replace(option, no_estimate=f"no estimate: {estimates}") if isinstance(estimates, str) else replace(option, estimates=estimates)


def _judge_choice(
    target_run: TargetRun, choice: Choice, accuracy: Accuracy, measurements: Sequence[Measurement], why_not_here: str | None
) -> Verdict:
    target = target_run.target
    advice = "edgekd build --remeasure"
    if why_not_here is not None:
        remedy = "name a board with --device ssh:user@host" if "ssh" in target.device.kinds else f"run this build on a {target.title}"
        advice = f"{remedy}, or accept that with --inconclusive-ok"
    evidence = gate.Evidence(
        accuracy=accuracy,
        parity=read_json(target_run.artifacts(f"export/student/{choice.option.candidate.runtime}")["parity.json"]),
        size_bytes=choice.option.size_bytes,
        measurement=choice.measurement,
        teacher=teacher_measurement(choice.measurement, measurements),
        estimate=choice.option.estimate(choice.threads),
        no_estimate=choice.option.no_estimate,
        unmeasured=why_not_here or "no candidate within the accuracy budget was measured",
        advice=advice,
    )
    return gate.judge(target.name, target_run.settings.budget, target.limits, evidence)


def _shipped(target_run: TargetRun, choice: Choice, verdict: Verdict) -> dict[str, Any]:
    """Return the name of the model that ships, or None, and whether it would have shipped with an INCONCLUSIVE verdict."""
    ships = verdict.outcome is Outcome.PASS or (verdict.outcome is Outcome.INCONCLUSIVE and target_run.inconclusive_ok)
    name = f"{target_run.plan.recipe.name}.{registry.runtime(choice.option.candidate.runtime).FORMAT}"
    return {"shipped": name if ships else None, "inconclusive_ok": ships and target_run.inconclusive_ok}


def _write_output(target_run: TargetRun, choice: Choice, report: Mapping[str, Any]) -> None:
    name, summary = report["shipped"], markdown.render(report)
    if name is None:
        package.withhold(target_run.folder, report, summary)
        return
    model = target_run.model_file(choice.option.candidate)
    package.ship(target_run.folder, model.path, name, collect.manifest(target_run, report, model), report, summary)
