# SPDX-License-Identifier: Apache-2.0
"""A whole build: read the recipe and the targets, run the steps, and judge each target."""

from __future__ import annotations

import os
import time
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekd import config, registry
from edgekd.build import keys, pipeline
from edgekd.build.judge import Result, judge_target
from edgekd.build.worker import Worker
from edgekd.domain.verdict import Outcome
from edgekd.errors import RecipeError, did_you_mean
from edgekd.harness import runner
from edgekd.kd.training import distributed
from edgekd.plan import Plan, resolve
from edgekd.report import collect, document, provable
from edgekd.report.target_run import TargetRun
from edgekd.stages import measure, package
from edgekd.store.cache import Cache
from edgekd.store.digests import digest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from edgekd.domain.recipe import Recipe
    from edgekd.domain.target import Target
    from edgekd.ports import CompletedStep, Reporter, Step


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

    @property
    def recipe_dir(self) -> Path:
        """Return the absolute path of the recipe's folder."""
        return self.recipe.parent.absolute()


def build(request: Request, reporter: Reporter) -> list[Result]:
    """Build a recipe for its targets. A torchrun rank other than the first helps it to train, and returns no result.

    Raises:
        EdgekdError: with the exit code of its class; no output is half-written then.
    """
    started = time.monotonic()
    if distributed.rank():
        with closing(Worker(request.recipe_dir, persistent=True)) as worker:
            worker.call("the rank", pipeline.run_rank, progress=lambda _share, _text: None)
        return []
    plan = load_plan(request.recipe, request.targets)
    _check_outputs(request, plan)
    cache = Cache(request.cache, reporter.log)
    cache.prepare()
    before_step = _warn_before_training(plan, reporter)
    try:
        with closing(Worker(request.recipe_dir)) as worker, closing(Worker(request.recipe_dir, persistent=True)) as ranks:
            context = pipeline.BuildContext(cache, request.recipe_dir, reporter, before_step, worker, ranks)
            completed = pipeline.run(plan, context, request.until)
        if request.until is not None:
            return [_write_stage_output(request, plan, completed, request.until)]
        input_files = _input_files(request, plan, cache, completed)
        results = []
        for target in plan.targets:
            folder = request.out / target.name
            target_run = TargetRun(plan, target, completed, folder, input_files, request.inconclusive_ok, request.remeasure, started)
            results.append(judge_target(target_run, reporter))
        _write_depfile(request, plan, input_files)
    finally:
        cache.close()
    return results


def load_plan(recipe_path: Path, target_names: Sequence[str]) -> Plan:
    """Return the plan of a recipe for targets.

    Raises:
        RecipeError: if the recipe or a profile is wrong, a target is named twice, or the budget of a target would not be read.
    """
    recipe = config.load_recipe(recipe_path)
    facts = runner.facts()
    targets = [config.load_target(name, facts) for name in target_names or tuple(recipe.target) or ("host",)]
    names = [target.name for target in targets]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise RecipeError(*(f"target {name}: named twice; each target has one output folder" for name in repeated))
    if problems := _unknown_target_tables(recipe, recipe_path, targets, target_names):
        raise RecipeError(*problems)
    return resolve(recipe, targets, pipeline.PIPELINE)


def _unknown_target_tables(recipe: Recipe, path: Path, targets: Sequence[Target], requested: Sequence[str]) -> list[str]:
    """Return a problem for each ``[target.NAME]`` table that no target uses: its budget would not be read.

    A user's own profile ``NAME.toml``, which is not built now, is looked up beside the recipe, in its folder ``targets``, and beside
    the profiles that the command line names.
    """
    known = {*config.target_names(), *(target.name for target in targets)}
    folders = {path.parent, path.parent / "targets", *(config.find_target(name).parent for name in requested)}
    return [
        f"{path.name}: [target.{name}]: there is no target of that name, so its budget would not be read"
        f"{did_you_mean(name, known)}; expected a name that edgekd targets lists, or a profile {name}.toml beside the recipe"
        for name in recipe.target
        if name not in known and not any((folder / f"{name}.toml").is_file() for folder in folders)
    ]


def _check_outputs(request: Request, plan: Plan) -> None:
    for target in plan.targets:
        package.check_writable(request.out / target.name)
    if request.depfile is not None:
        package.check_writable(request.depfile.parent)


def _warn_before_training(plan: Plan, reporter: Reporter) -> Callable[[Step[Any], Mapping[str, CompletedStep]], None]:
    """Return a hook that logs the warnings about budgets once, before the first long step."""
    has_warned = False

    def before_step(step: Step[Any], completed: Mapping[str, CompletedStep]) -> None:
        nonlocal has_warned
        if step.stage in pipeline.DISTRIBUTED and not has_warned:
            has_warned = True
            for line in provable.budget_warnings(plan, completed):
                reporter.log(f"warning: {line}")

    return before_step


def _input_files(request: Request, plan: Plan, cache: Cache, completed: Mapping[str, CompletedStep]) -> dict[str, str | None]:
    """Return the digests of the files that the build read, by their paths from the recipe's folder."""
    digests = {request.recipe.name: cache.digest_of(request.recipe)}
    for name in request.targets or [target.name for target in plan.targets]:
        path = config.find_target(name)
        digests[os.path.relpath(path.absolute(), request.recipe_dir)] = cache.digest_of(path)
    record = cache.matching_record(digest(completed["inspect"].entry.material), request.recipe_dir) or {}
    return {**digests, **record.get("files", {})}


def _write_depfile(request: Request, plan: Plan, input_files: Mapping[str, str | None]) -> None:
    if request.depfile is not None:
        stamps = [request.out / target.name / package.STAMP for target in plan.targets]
        package.write_depfile(
            request.depfile, stamps, [request.recipe_dir / name for name, sha256 in input_files.items() if sha256 is not None]
        )


def _write_stage_output(request: Request, plan: Plan, completed: Mapping[str, CompletedStep], stage: str) -> Result:
    """Copy the files that a stage wrote to the output folder; there is no verdict yet."""
    folder = request.out / f"until-{stage}"
    for item in completed.values():
        if item.step.stage == stage:
            step_folder = folder.joinpath(*item.step.id.split("/")[1:])
            for name, artifact in item.entry.artifacts.items():
                package.copy(artifact.path, step_folder / name)
    report = {"schema": 1, "recipe": plan.recipe.name, "outcome": Outcome.INCONCLUSIVE.value, "until": stage, "folder": str(folder)}
    return Result(report, cached=False, exit_code=document.exit_code(report, inconclusive_ok=request.inconclusive_ok))


def show_plan(recipe: Path, target_names: Sequence[str], cache_folder: Path, *, explain: bool) -> dict[str, Any]:
    """Return the plan as a mapping: targets with their candidates, and the steps (with hit or miss if asked)."""
    plan = load_plan(recipe, target_names)
    targets = {
        target.name: [{"candidate": candidate.id, "threads": list(candidate.settings)} for candidate in plan.candidates[target.name]]
        for target in plan.targets
    }
    steps = [{"step": step.id} for step in plan.steps]
    if explain:
        cache = Cache(cache_folder, lambda _: None)
        cache.prepare()
        explanations = keys.explain(plan, pipeline.STAGES, cache, recipe.parent.absolute())
        cache.close()
        steps = [{"step": item.step.id, "outcome": item.outcome, "reason": item.reason} for item in explanations]
    return {"recipe": plan.recipe.name, "targets": targets, "steps": steps}


def plan_lines(plan: Mapping[str, Any]) -> list[str]:
    """Return a plan from ``show_plan`` as lines of text."""
    lines = [f"recipe {plan['recipe']}"]
    for name, rows in plan["targets"].items():
        lines.append(f"target {name}")
        lines += [f"  candidate {row['candidate']}  threads {', '.join(map(str, row['threads']))}" for row in rows]
    width = max(len(row["step"]) for row in plan["steps"])
    lines.append("steps")
    lines += [f"  {row['step']:<{width}}  {row.get('outcome', '')} {row.get('reason', '')}".rstrip() for row in plan["steps"]]
    return lines


def measure_files(models: Sequence[Path], target_name: str, threads: Sequence[int], reporter: Reporter) -> list[dict[str, Any]]:
    """Measure model files on this machine, interleaved; the first is the reference of the speed-up."""
    target = config.load_target(target_name, runner.facts())

    def on_wait() -> None:
        reporter.log("measure: waits until builds on this machine have finished training")

    with reporter.step("measure") as progress:
        return collect.measurement_rows(measure.measure_files(models, target, threads, registry.device("local"), progress, on_wait))
