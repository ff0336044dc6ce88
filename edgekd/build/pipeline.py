# SPDX-License-Identifier: Apache-2.0
"""The pipeline: the tuple of cached stages, and the loop that runs their steps."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import usercode
from edgekd.build import keys, refusals
from edgekd.build.disturbance import check_storage
from edgekd.errors import EdgekdError, ProcessDiedError, RecipeError, StageError, StorageError, UnavailableError, describe_unexpected
from edgekd.kd.training import distributed
from edgekd.plan import check_left_out, is_dry_run
from edgekd.ports import CompletedStep, Context
from edgekd.stages import distill, evaluate, export, inspect, quantize, soft_targets, teach
from edgekd.store import locks
from edgekd.store.cache import storage_error
from edgekd.store.digests import digest, file_digest, tool_version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from edgekd.build.worker import Worker
    from edgekd.domain.artifact import Artifact, CacheEntry
    from edgekd.plan import Plan
    from edgekd.ports import Progress, Reporter, Stage, StageResult, Step
    from edgekd.store.cache import Cache

PIPELINE: tuple[Stage, ...] = (inspect, teach, soft_targets, distill, export, quantize, evaluate)
STAGES = {stage.NAME: stage for stage in PIPELINE}
DISTRIBUTED = ("teach", "soft_targets", "distill")  # the long stages: all ranks share their work, and warnings come before them
RANK_SUFFIX = ".rank."  # between a step's name and a random part, in the name of the scratch folder of another rank


@dataclass(frozen=True, slots=True)
class BuildContext:
    """Where steps run. ``before_step`` is called before a step that must run, with all completed steps: the place for warnings."""

    cache: Cache
    recipe_dir: Path
    reporter: Reporter
    before_step: Callable[[Step[Any], Mapping[str, CompletedStep]], None]
    worker: Worker
    ranks: Worker  # where the steps run that ranks share


def run(plan: Plan, build: BuildContext, until: str | None = None) -> dict[str, CompletedStep]:
    """Run the steps of a plan, or take them from the cache, up to and including the stage ``until``.

    Raises:
        EdgekdError: what the stage raised.
    """
    completed: dict[str, CompletedStep] = {}
    skipped: dict[str, str] = {}
    for step in steps_until(plan, until):
        if (reason := refusals.why_skipped(step, completed, skipped)) is not None:
            skipped[step.id] = reason
            continue
        completed[step.id] = _run_step(step, completed, build)
        if completed[step.id].why_not is not None:
            check_left_out(plan, completed)
    if distributed.world_size() > 1:
        build.ranks.call("the ranks", end_ranks, progress=lambda _share, _text: None)
    return completed


def steps_until(plan: Plan, until: str | None) -> Iterator[Step[Any]]:
    """Yield the steps of a plan up to and including a stage, except those that need a later one (an assistant's soft targets).

    Dry runs belong to what comes before training.
    """
    names = list(STAGES)
    last = len(names) if until is None else names.index(until)
    reached: set[str] = set()
    for step in plan.steps:
        if names.index(teach.NAME if is_dry_run(step.id) else step.stage) <= last and step.producers <= reached:
            reached.add(step.id)
            yield step


def call_stage(worker: Worker, step: Step[Any], inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Run a step in a process of the worker.

    Raises:
        EdgekdError: what the stage raised, or that its process died.
    """
    places = context.recipe_dir, context.out, context.work, context.secret
    try:
        result: StageResult = worker.call(
            step.id, run_stage, step, inputs, *places, progress=context.progress, max_silence_s=refusals.max_silence_s(step)
        )
    except ProcessDiedError as error:
        if step.stage == inspect.NAME and error.in_user_code:  # it runs the user's code to find such mistakes
            raise RecipeError(error.reason) from error
        raise
    return result


def run_stage(
    step: Step[Any], inputs: Mapping[str, Artifact], recipe_dir: Path, out: Path, work: Path, secret: bytes, progress: Progress
) -> StageResult:
    """Run a step in this process, with the other ranks if its stage is shared.

    Two metrics are added, of this process: ``cpu_seconds``, and ``waited_seconds``, which its threads were ready to run while others
    had the cores. A report says by them that the machine was busy.

    Raises:
        EdgekdError: what the stage raised; a StageError for what nothing expects, most likely of a module or tensor of the user.
    """
    if _is_shared(step):
        distributed.broadcast((step, inputs, recipe_dir, work))
    before = processor_seconds()
    try:
        result = STAGES[step.stage].run(step, inputs, Context(recipe_dir, out, work, progress, secret))
    except (EdgekdError, OSError, MemoryError):
        raise
    except Exception as error:
        if usercode.describe_user_error(error) is not None:  # raised by the user's code; the worker names its line
            raise
        raise StageError(f"{step.id}: {describe_unexpected(error)}; check what the recipe's functions return, or report this") from error
    cpu, waited = (
        None if start is None or end is None else round(max(0.0, end - start), 3)
        for start, end in zip(before, processor_seconds(), strict=True)
    )
    return replace(result, metrics={**result.metrics, "cpu_seconds": cpu, "waited_seconds": waited})


def processor_seconds() -> tuple[float, float | None]:
    """Return the CPU time of this process and its children, and how long its threads waited for a core, None if the kernel does not say.

    Threads that have ended are missing in the second: those of torch live as long as the process.
    """
    times = os.times()
    waited_ns: list[int] = []
    for path in Path("/proc/self/task").glob("*/schedstat"):  # time on a core and time in the queue, in ns; number of times
        with suppress(OSError, ValueError, IndexError):  # the thread has just ended
            waited_ns.append(int(path.read_text().split()[1]))
    return times.user + times.system + times.children_user + times.children_system, sum(waited_ns) / 1e9 if waited_ns else None


def end_ranks(progress: Progress) -> None:
    """Let the other ranks finish."""
    del progress
    distributed.broadcast(None)


def run_rank(progress: Progress) -> None:
    """Share the work of the steps that rank 0 runs, until it has finished.

    Input files are read in place. All output goes to a temporary folder; partial work is resumed as rank 0 has it.

    Raises:
        EdgekdError: what the stage raised, in this rank and in rank 0.
    """
    for step, inputs, recipe_dir, work in distributed.receive():
        with tempfile.TemporaryDirectory(prefix=f"{work.name}{RANK_SUFFIX}", dir=work.parent) as scratch:
            own_work, out = Path(scratch) / "work", Path(scratch) / "out"
            shutil.copytree(work, own_work, copy_function=os.link)  # files are replaced, never changed, so links are safe
            out.mkdir()
            distributed.barrier()
            STAGES[step.stage].run(step, inputs, Context(recipe_dir, out, own_work, progress))


def _run_step(step: Step[Any], completed: Mapping[str, CompletedStep], build: BuildContext) -> CompletedStep:
    """Return a step's cache entry; run the stage if there is none."""
    cache, recipe_dir = build.cache, build.recipe_dir
    material = keys.key_material(STAGES[step.stage], step, completed)
    entry = cache.get(keys.find_key(cache, material, recipe_dir))
    is_hit = entry is not None
    if entry is None:
        _check_tools(step)
        _repair_inputs(step, completed, build)
        build.before_step(step, completed)
        with cache.lock(digest(material), lambda holders: build.reporter.log(f"{step.id}: waits for {holders}, which runs this step")):
            entry = cache.get(keys.find_key(cache, material, recipe_dir))  # another build may have stored it meanwhile
            is_hit = entry is not None
            if entry is None:
                build.reporter.log(f"{step.id}: {keys.why_miss(step, material, cache, recipe_dir)}")
                entry = _execute(step, completed, build, material)
    if is_hit:
        cache.touch(entry.key)
    cache.save_material(keys.last_run_name(step, recipe_dir), material)
    return CompletedStep(step, entry, is_hit)


def _execute(step: Step[Any], completed: Mapping[str, CompletedStep], build: BuildContext, material: Mapping[str, Any]) -> CacheEntry:
    cache, base = build.cache, digest(material)
    started, is_final = time.monotonic(), True
    try:
        out, work = cache.new_output_folder(base), cache.work(base)
        with (
            build.reporter.step(step.id) as progress,
            locks.machine_shared(lambda holders: build.reporter.log(f"{step.id}: waits for {holders}, which measures on this machine")),
        ):
            started = time.monotonic()
            inputs = keys.input_artifacts(step, completed)
            worker = build.worker
            if _is_shared(step):
                worker = build.ranks
                for leftover in work.parent.glob(f"{work.name}{RANK_SUFFIX}*"):  # of ranks that were killed
                    shutil.rmtree(leftover)
            try:
                result = call_stage(worker, step, inputs, Context(build.recipe_dir, out, work, progress, cache.secret))
            except StageError as error:
                if not refusals.is_of_a_runtime(step) or isinstance(error, StorageError):
                    raise
                check_storage(cache, error)
                result, is_final = refusals.refusal(step, error, out), not error.temporary
    except OSError as error:
        raise storage_error(f"{step.id} cannot read or write its files", cache.root, error) from error
    seconds = time.monotonic() - started
    key = base if result.record is None else cache.add_record(base, result.record)
    if is_final:
        entry = cache.put(out, key, material, result, seconds)
    else:
        entry = refusals.unstored(key, material, result)
        shutil.rmtree(out, ignore_errors=True)
    reason = result.metrics.get("why_not")
    build.reporter.log(f"{step.id}: done in {seconds:.1f} s" if reason is None else f"warning: {step.id} is left out: {reason}")
    for note in result.notes:
        if note.startswith("warning: "):  # the user should see it before paying for the stages that follow
            build.reporter.log(note)
    return entry


def _is_shared(step: Step[Any]) -> bool:
    return distributed.world_size() > 1 and step.stage in DISTRIBUTED


def _check_tools(step: Step[Any]) -> None:
    missing = [tool for tool in step.tools if tool_version(tool) is None]
    if missing:
        raise UnavailableError(f"{step.id} needs {', '.join(missing)}, which is not installed; run: pip install 'edgekd[build]'")


def _repair_inputs(step: Step[Any], completed: Mapping[str, CompletedStep], build: BuildContext) -> None:
    """Read every byte of a step's inputs; run the producers of damaged ones again."""
    for producer in step.producers:
        entry = completed[producer].entry
        names = [reference.partition(":")[2] for reference in step.inputs.values() if reference.startswith(f"{producer}:")]
        if all(_is_intact(entry.artifacts[name]) for name in names):
            continue
        build.cache.discard(entry.key)
        if _run_step(completed[producer].step, completed, build).entry.artifacts != entry.artifacts:
            raise StageError(f"{producer}: its cached files were damaged, and running it again gave other bytes; build again")


def _is_intact(artifact: Artifact) -> bool:
    return artifact.path.is_file() and file_digest(artifact.path) == artifact.digest
