# SPDX-License-Identifier: Apache-2.0
"""A whole build: the recipe and the targets are read, the steps run, and each target ends in a verdict."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.build import judge, keys, pipeline
from edgekd import config, registry
from edgekd.report import collect
from edgekd.store.cache import Cache
from edgekd.report.target_run import TargetRun
from edgekd.store.digests import digest
from edgekd.domain.verdict import Outcome
from edgekd.errors import RecipeError, did_you_mean
from edgekd.harness import runner
from edgekd.kd.training import distributed
from edgekd.plan import Plan, resolve
from edgekd.stages import package

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgekd.ports import CompletedStep, Reporter
    from edgekd.ports import Step


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asked for. No targets: those that the recipe names, else ``host``."""

    recipe: Path
    targets: tuple[str, ...]
    out: Path
    cache: Path
    until: str | None = None
    depfile: Path | None = None
    remeasure: bool = False
    inconclusive_ok: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """How one target ended. ``standing``: the last verdict stands and was not made anew."""

    document: Mapping[str, Any]
    standing: bool
    exit_code: int


def build(request: Request, reporter: Reporter) -> list[Result]:
    """Build a recipe for its targets; a rank of torchrun's that is not the first helps it to train, and has no result.

    Raises:
        EdgekdError: of the class that its exit code asks for; nothing is half-written then.
    """
    started = time.monotonic()
    if distributed.rank():
        pipeline.run_rank()
        return []
    plan = _plan(request.recipe, request.targets)
    for line in misspelt_targets(plan):
        reporter.log(f"warning: {line}")
    folders = {target.name: request.out / target.name for target in plan.targets}
    for folder in folders.values():
        package.check_writable(folder)
    if request.depfile is not None:
        package.check_writable(request.depfile.parent)
    cache = Cache(request.cache, reporter.log)
    cache.prepare()
    recipe_dir = request.recipe.parent.absolute()
    try:
        done = pipeline.run(plan, pipeline.BuildContext(cache, recipe_dir, reporter, _warner(plan, reporter)), request.until)
        if request.until is not None:
            return [_stopped(request, plan, done)]
        read = _files_read(request, plan, cache, done)
        results = []
        for target in plan.targets:
            concluded = judge.judge_target(
                TargetRun(plan, target, done, folders[target.name], read, request.inconclusive_ok, request.remeasure, started), reporter
            )
            results.append(Result(concluded.document, concluded.standing, _exit_code(concluded.document, request)))
        if request.depfile is not None:
            stamps = [folder / package.STAMP for folder in folders.values()]
            package.write_depfile(request.depfile, stamps, [recipe_dir / name for name, known in read.items() if known is not None])
    finally:
        cache.close()
    return results


def show_plan(recipe: Path, names: Sequence[str], cache_folder: Path, *, explain: bool) -> dict[str, Any]:
    """Return the plan as a mapping: targets with their candidates, and the steps (with hit or miss if asked)."""
    plan = _plan(recipe, tuple(names))
    shown: dict[str, Any] = {
        "recipe": plan.recipe.name,
        "targets": {
            target.name: [{"candidate": candidate.id, "threads": list(candidate.settings)} for candidate in plan.candidates[target.name]]
            for target in plan.targets
        },
    }
    if not explain:
        shown["steps"] = [{"step": step.id} for step in plan.steps]
        return shown
    cache = Cache(cache_folder, lambda _: None)
    cache.prepare()
    told = keys.explain(plan, pipeline.STAGES, cache, recipe.parent.absolute())
    cache.close()
    shown["steps"] = [{"step": item.step.id, "outcome": item.outcome, "reason": item.reason} for item in told]
    return shown


def plan_lines(shown: Mapping[str, Any]) -> list[str]:
    """Return a plan as lines for people."""
    lines = [f"recipe {shown['recipe']}"]
    for name, rows in shown["targets"].items():
        lines.append(f"target {name}")
        lines += [f"  candidate {row['candidate']}  threads {', '.join(map(str, row['threads']))}" for row in rows]
    width = max(len(row["step"]) for row in shown["steps"])
    lines.append("steps")
    lines += [f"  {row['step']:<{width}}  {row.get('outcome', '')} {row.get('reason', '')}".rstrip() for row in shown["steps"]]
    return lines


def measure_files(models: Sequence[Path], target_name: str, threads: Sequence[int], reporter: Reporter) -> list[dict[str, Any]]:
    """Measure model files on this machine, interleaved; the first is the reference of the speed-up."""
    from edgekd.stages import measure

    target = config.load_target(target_name, runner.facts())

    def waiting() -> None:
        reporter.log("measure: waits until builds on this machine have trained")

    with reporter.step("measure") as progress:
        return collect.measurement_rows(measure.measure_files(models, target, threads, registry.device("local"), progress, waiting))


def _plan(recipe_path: Path, names: tuple[str, ...]) -> Plan:
    recipe = config.load_recipe(recipe_path)
    facts = runner.facts()
    wanted = names or tuple(recipe.target) or ("host",)
    targets = [config.load_target(name, facts) for name in wanted]
    twice = sorted({target.name for target in targets if [other.name for other in targets].count(target.name) > 1})
    if twice:
        raise RecipeError(*(f"target {name}: named twice; each target has one output folder" for name in twice))
    return resolve(recipe, targets, pipeline.PIPELINE)


def misspelt_targets(plan: Plan) -> list[str]:
    """Return a line for each ``[target.NAME]`` that is read by no target here; it may be that of a user's own profile."""
    known = {*config.target_names(), *(target.name for target in plan.targets)}
    return [
        f"[target.{name}] is the table of no target that edgekd ships or that is built now{did_you_mean(name, known)}: it is not read"
        for name in plan.recipe.target
        if name not in known
    ]


def _warner(plan: Plan, reporter: Reporter) -> Callable[[Step[Any], Mapping[str, CompletedStep]], None]:
    told: list[str] = []

    def before(step: Step[Any], done: Mapping[str, CompletedStep]) -> None:
        if step.stage in pipeline.DISTRIBUTED and not told:
            told.append(step.id)
            for line in collect.provable_warnings(plan, done):
                reporter.log(f"warning: {line}")

    return before


def _files_read(request: Request, plan: Plan, cache: Cache, done: Mapping[str, CompletedStep]) -> dict[str, str | None]:
    """Return the files that the build read, with digests, by their names from the recipe's folder."""
    recipe_dir = request.recipe.parent.absolute()
    names = {request.recipe.name: cache.digest_of(request.recipe)}
    for target in plan.targets:
        path = config.find_target(
            next((name for name in request.targets if name.endswith(".toml") and Path(name).stem == target.name), target.name)
        )
        names[os.path.relpath(path.absolute(), recipe_dir)] = cache.digest_of(path)
    record = cache.matching_record(digest(done["inspect"].entry.material), recipe_dir) or {}
    return {**names, **record.get("files", {})}


def _stopped(request: Request, plan: Plan, done: Mapping[str, CompletedStep]) -> Result:
    stage = str(request.until)
    folder = request.out / f"until-{stage}"
    for item in done.values():
        if item.step.stage == stage:
            below = folder.joinpath(*item.step.id.split("/")[1:])
            for name, artifact in item.entry.artifacts.items():
                package.copy(artifact.path, below / name)
    document = {"schema": 1, "recipe": plan.recipe.name, "outcome": Outcome.INCONCLUSIVE.value, "until": stage, "folder": str(folder)}
    return Result(document, standing=False, exit_code=_exit_code(document, request))


def _exit_code(document: Mapping[str, Any], request: Request) -> int:
    outcome = Outcome(document["outcome"])
    return 0 if outcome is Outcome.INCONCLUSIVE and request.inconclusive_ok else outcome.exit_code
