# SPDX-License-Identifier: Apache-2.0
"""Autotune: timings on this machine, with the networks to train, before anything long. Which execution mode is fastest?"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from operator import truediv
from typing import TYPE_CHECKING

from edgekd.domain.recipe import EntryPoint
from edgekd.errors import EdgekdError
from edgekd.kd import data, modules
from edgekd.kd.reproducible import deterministic
from edgekd.kd.training.execution import MODE_FILE, write_execution_mode
from edgekd.kd.training.jobs import TrainingJob, TrainingSettings
from edgekd.kd.training.trainer import epoch_runner
from edgekd.ports import StageResult

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from edgekd.domain.artifact import Artifact
    from edgekd.kd.training.execution import AutotuneParams, ExecutionMode
    from edgekd.ports import Context

STEPS, ROUNDS = 3, 9
MIN_SPEEDUP = 1.1  # in all rounds but one: less is not worth other weights


def choose_execution_mode(section: str, params: AutotuneParams, inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Time the execution modes, the first of which must work, and write the fastest one; ``section`` is the recipe's, for messages."""
    job = _timed_job(section, params, inputs, context.recipe_dir)
    first, *others = params.modes
    notes: list[str] = []
    with deterministic(params.threads, others[-1].accelerator):  # accelerators come after the CPU
        runners = {first: epoch_runner(_in_mode(job, first))}
        for mode in others:
            try:
                runners[mode] = epoch_runner(_in_mode(job, mode))
                runners[mode]()
            except (EdgekdError, RuntimeError) as error:
                runners.pop(mode, None)
                notes.append(f"warning: {job.entry} is not trained in {mode}, which fails: {str(error).splitlines()[0]}")
        seconds = time_interleaved(runners)
    chosen = fastest(seconds)
    speedups = {str(mode): statistics.median(map(truediv, seconds[first], times)) for mode, times in seconds.items() if mode != first}
    if speedups:
        comparison = ", ".join(f"{mode} is {speedup:.2f}" for mode, speedup in speedups.items())
        notes.append(f"{job.entry}: {comparison} times as fast as {first}; it is trained in {chosen}")
    write_execution_mode(context.out / MODE_FILE, chosen)
    return StageResult({"speeds": speedups}, tuple(notes))


def time_interleaved(runners: Mapping[ExecutionMode, Callable[[], object]]) -> dict[ExecutionMode, list[float]]:
    """Return the seconds of each mode, round by round, after a warm-up round; the order alternates from round to round."""
    seconds: dict[ExecutionMode, list[float]] = {mode: [] for mode in runners}
    for number in range(1 + ROUNDS):
        for mode in [*runners][:: 1 if number % 2 else -1]:
            started = time.perf_counter()
            runners[mode]()
            seconds[mode].append(time.perf_counter() - started)
    return {mode: times[1:] for mode, times in seconds.items()}


def fastest(seconds: Mapping[ExecutionMode, Sequence[float]]) -> ExecutionMode:
    """Return the first mode, unless a later one is faster by enough than the best before it, in all rounds but one."""
    chosen, *others = seconds
    for mode in others:
        if sorted(map(truediv, seconds[chosen], seconds[mode]))[1] >= MIN_SPEEDUP:
            chosen = mode
    return chosen


def _timed_job(section: str, params: AutotuneParams, inputs: Mapping[str, Artifact], recipe_dir: Path) -> TrainingJob:
    """Return a job of a few training steps; the objective does not matter for the time that they take."""
    import torch

    entry = EntryPoint.parse(params.model)
    train = data.load_split(inputs, "train")
    samples = train.pick(torch.arange(STEPS * params.batch_size) % len(train))
    return TrainingJob(
        section=section,
        entry=entry,
        build=lambda: modules.build_module(recipe_dir, entry),
        train=samples,
        validation=samples,
        objective=lambda logits, _teacher_logits, _labels, _epoch: logits.float().square().mean(),
        settings=TrainingSettings(1, params.batch_size, params.optimizer, 1e-6, 0.0, 0, params.threads),
    )


def _in_mode(job: TrainingJob, mode: ExecutionMode) -> TrainingJob:
    return replace(job, settings=replace(job.settings, mode=mode))
