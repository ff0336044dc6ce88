# SPDX-License-Identifier: Apache-2.0
"""A whole build: read the recipe and the targets, run the steps, and judge each target."""

from __future__ import annotations

import os
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import config, registry
from edgekd.build import devices, keys, pipeline
from edgekd.build.disturbance import with_cache
from edgekd.build.judge import Result, judge_target
from edgekd.build.worker import Worker
from edgekd.domain.device import DeviceSpec
from edgekd.domain.verdict import Outcome
from edgekd.errors import MAX_CHARACTERS, RecipeError, UsageError, did_you_mean, printable
from edgekd.harness import runner
from edgekd.kd.training import distributed
from edgekd.plan import Plan, resolve
from edgekd.report import collect, document, provable
from edgekd.report.target_run import TargetRun
from edgekd.stages import measure, package
from edgekd.store import locks
from edgekd.store.cache import Cache
from edgekd.store.digests import digest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgekd.domain.device import ChosenDevice
    from edgekd.domain.recipe import Recipe
    from edgekd.domain.target import Target
    from edgekd.ports import CompletedStep, Reporter, Step


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asked for. No targets: those that the recipe names, else ``host``; no devices: this machine."""

    recipe: Path
    targets: tuple[str, ...]
    out: Path
    cache: Path
    until: str | None = None
    depfile: Path | None = None
    remeasure: bool = False
    inconclusive_ok: bool = False
    devices: tuple[str, ...] = ()

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
    distributed.check_environment()
    if distributed.rank():
        with closing(Worker(request.recipe_dir, persistent=True)) as worker:
            worker.call("the rank", pipeline.run_rank, progress=lambda _share, _text: None)
        return []
    plan = load_plan(request.recipe, request.targets)
    specs = [config.find_device(name, request.recipe_dir) for name in dict.fromkeys(request.devices)]
    _check_outputs(request, plan)
    cache = Cache(request.cache, reporter.log)
    cache.prepare()
    chosen = devices.choose(plan, specs, reporter.log)
    before_step = _check_before_training(request, plan, cache, reporter)
    return with_cache(cache, reporter, lambda: _build_targets(request, plan, cache, reporter, before_step, started, chosen))


def _build_targets(
    request: Request,
    plan: Plan,
    cache: Cache,
    reporter: Reporter,
    before_step: Callable[..., None],
    started: float,
    chosen: Mapping[str, ChosenDevice],
) -> list[Result]:
    with closing(Worker(request.recipe_dir)) as worker, closing(Worker(request.recipe_dir, persistent=True)) as ranks:
        context = pipeline.BuildContext(cache, request.recipe_dir, reporter, before_step, worker, ranks)
        completed = pipeline.run(plan, context, request.until)
    if request.until is not None:
        return [_write_stage_output(request, plan, completed, request.until)]
    input_files = _input_files(request, plan, cache, completed)
    _check_depfile(request, plan, input_files)
    results = []
    for target in plan.targets:
        folder = request.out / target.name
        target_run = TargetRun(
            plan,
            target,
            completed,
            folder,
            request.recipe,
            input_files,
            request.inconclusive_ok,
            request.remeasure,
            started,
            device=chosen.get(target.name),
        )
        results.append(judge_target(target_run, reporter))
    if request.depfile is not None:
        package.write_depfile(request.depfile, *_depfile_rules(request, plan, input_files))
    return results


def load_plan(recipe_path: Path, target_names: Sequence[str]) -> Plan:
    """Return the plan of a recipe for targets.

    Raises:
        RecipeError: if the recipe or a profile is wrong, a target is named twice, or the budget of a target would not be read.
    """
    distributed.check_environment()  # the number of ranks is part of keys
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
    """Check the output folders and the names in the depfile that are known, before any step runs.

    Raises:
        UsageError: if an output cannot be written, is that of another recipe, or has a name that make cannot read.
    """
    if request.depfile is not None:
        if os.path.lexists(request.depfile) and not os.path.isfile(request.depfile):  # noqa: PTH113  (Path.is_file may raise)
            raise UsageError(f"{request.depfile}: is a folder or a device; expected --depfile with the name of a file")
        _check_depfile(request, plan, dict.fromkeys([request.recipe.name, *_profile_names(request, plan)], ""))
        package.check_writable(request.depfile.parent)
    for folder in _output_folders(request, plan):
        _check_place(request, folder)
        package.check_writable(folder)
        package.check_recipe(folder, request.recipe, plan.recipe.name)


def _output_folders(request: Request, plan: Plan) -> list[Path]:
    if request.until is not None:
        return [request.out / f"until-{request.until}"]
    return [request.out / target.name for target in plan.targets]


def _check_place(request: Request, folder: Path) -> None:
    """Refuse an output folder in which edgekd's files would mix with the recipe, the cache or the system's folders."""
    place, cache = (Path(os.path.realpath(path)) for path in (folder, request.cache))
    home = os.path.realpath(os.path.expanduser("~"))  # noqa: PTH111  (Path.home raises where there is none)
    if place.is_relative_to(cache):
        problem = f"is in the cache {request.cache}"
    elif Path(os.path.realpath(request.recipe_dir)).is_relative_to(place):
        problem = "is the recipe's own folder, or has it inside"
    elif place.parent == Path(place.anchor) or str(place) == home:
        problem = "is the root of the file system, a folder in it, or your home folder"
    else:
        return
    raise UsageError(f"{folder}: {problem}; expected a folder for outputs only; name another with --out")


def _check_before_training(
    request: Request, plan: Plan, cache: Cache, reporter: Reporter
) -> Callable[[Step[Any], Mapping[str, CompletedStep]], None]:
    """Return a hook that checks names for the depfile and logs the warnings about budgets once, before the first long step."""
    is_checked = False

    def before_step(step: Step[Any], completed: Mapping[str, CompletedStep]) -> None:
        nonlocal is_checked
        if step.stage in pipeline.DISTRIBUTED and not is_checked:
            is_checked = True
            _check_depfile(request, plan, _input_files(request, plan, cache, completed))
            for line in provable.budget_warnings(plan, completed):
                reporter.log(f"warning: {line}")

    return before_step


def _profile_names(request: Request, plan: Plan) -> list[str]:
    """Return the files of the target profiles, by their paths from the recipe's folder."""
    profiles = map(config.find_target, request.targets or [target.name for target in plan.targets])
    return [os.path.relpath(path.absolute(), request.recipe_dir) for path in profiles]


def _input_files(request: Request, plan: Plan, cache: Cache, completed: Mapping[str, CompletedStep]) -> dict[str, str | None]:
    """Return the digests of the files that the build read, by their paths from the recipe's folder."""
    names = [request.recipe.name, *_profile_names(request, plan)]
    digests = {name: cache.digest_of(request.recipe_dir / name) for name in names}
    record = cache.matching_record(digest(completed["inspect"].entry.material), request.recipe_dir) or {}
    return {**digests, **record.get("files", {})}


def _depfile_rules(request: Request, plan: Plan, input_files: Mapping[str, str | None]) -> tuple[list[Path], list[Path]]:
    """Return the stamps, and the files that they depend on."""
    stamps = [request.out / target.name / package.STAMP for target in plan.targets]
    return stamps, [request.recipe_dir / name for name, sha256 in input_files.items() if sha256 is not None]


def _check_depfile(request: Request, plan: Plan, input_files: Mapping[str, str | None]) -> None:
    """Check that all names can be written in a makefile, and that the depfile replaces none of the files.

    Raises:
        UsageError: if not.
    """
    if request.depfile is None:
        return
    stamps, prerequisites = _depfile_rules(request, plan, input_files)
    package.depfile_text(stamps, prerequisites)
    if os.path.realpath(request.depfile) in map(os.path.realpath, [*stamps, *prerequisites]):
        raise UsageError(f"{request.depfile}: is a file that the build reads or writes; name another file with --depfile")


def _write_stage_output(request: Request, plan: Plan, completed: Mapping[str, CompletedStep], stage: str) -> Result:
    """Copy the files that a stage wrote to the output folder; there is no verdict yet."""
    (folder,) = _output_folders(request, plan)
    files = {
        "/".join([*item.step.id.split("/")[1:], name]): artifact
        for item in completed.values()
        if item.step.stage == stage
        for name, artifact in item.entry.artifacts.items()
    }
    with locks.exclusive_folder(folder):
        package.check_recipe(folder, request.recipe, plan.recipe.name)
        package.copy_stage(folder, files, {"recipe": plan.recipe.name, "recipe_file": document.recipe_file(request.recipe, folder)})
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
    return [printable(line, MAX_CHARACTERS) for line in lines]


def measure_files(
    models: Sequence[Path], target_name: str, threads: Sequence[int], reporter: Reporter, device: str | None = None
) -> list[dict[str, Any]]:
    """Measure model files on this machine or a device, interleaved; the first is the reference of the speed-up."""
    target = config.load_target(target_name, runner.facts())
    spec = DeviceSpec("local") if device is None else config.find_device(device, Path.cwd())

    def on_wait(holders: str) -> None:
        machine = "this machine" if device is None else spec.label
        reporter.log(f"measure: waits for exclusive access to {machine}, which {holders} uses")

    with reporter.step("measure") as progress, registry.device(spec.kind).connect(spec) as connection:
        if device is not None:
            devices.check(target, connection)
        return collect.measurement_rows(measure.measure_files(models, target, threads, connection, progress, on_wait))
