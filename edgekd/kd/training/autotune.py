# SPDX-License-Identifier: Apache-2.0
"""Trials before anything long, on the networks and the machine that it is for: which way to train pays, and how many epochs do."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from functools import partial
from operator import truediv
from typing import TYPE_CHECKING, Any

from edgekd.domain.recipe import EntryPoint
from edgekd.errors import EdgekdError, RecipeError
from edgekd.kd import data, modules
from edgekd.kd.reproducible import deterministic
from edgekd.kd.teachers import load
from edgekd.kd.teachers.load import load_teacher
from edgekd.kd.training import distributed, execution, jobs, loop, search
from edgekd.kd.training.execution import ExecutionMode
from edgekd.ports import StageResult

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.losses import Loss
    from edgekd.ports import Context

STEPS, ROUNDS = 3, 9
INFERENCES, WARM_UP = 50, 10
EPOCHS_FILE = "epochs.json"
PAYS = 1.1  # times as fast, in all rounds but one: less is not worth other weights


def choose_execution_mode(section: str, params: Mapping[str, Any], inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Try the ways, the first of which must do; write ``execution_mode.json``. ``section`` is the recipe's, for messages."""
    import torch

    entry = EntryPoint.parse(params["model"])
    given = data.load_split(inputs, "train")
    few = given.pick(torch.arange(STEPS * params["batch_size"]) % len(given))
    settings = loop.TrainingSettings(1, params["batch_size"], params["optimizer"], 1e-6, 0.0, 0, params["threads"])
    job = loop.TrainingJob(
        section=section,
        entry=entry,
        build=lambda: modules.build_module(context.recipe_dir, entry),
        train=few,
        validation=few,
        objective=lambda logits, _answers, _labels, _epoch: logits.float().square().mean(),
        settings=settings,
    )
    first, *others = [ExecutionMode(**told) for told in params["tried"]]
    notes: list[str] = []
    with deterministic(params["threads"], others[-1].accelerator):  # an accelerator comes after the processor
        blocks = {first: loop.epoch_runner(replace(job, settings=replace(settings, mode=first)))}
        for mode in others:
            try:
                blocks[mode] = loop.epoch_runner(replace(job, settings=replace(settings, mode=mode)))
                blocks[mode]()
            except (EdgekdError, RuntimeError) as error:
                blocks.pop(mode, None)
                notes.append(f"warning: {entry} is not trained in {mode}, which fails: {str(error).splitlines()[0]}")
        seconds = time_interleaved(blocks)
    chosen = fastest(seconds)
    speeds = {str(mode): statistics.median(map(truediv, seconds[first], took)) for mode, took in seconds.items() if mode != first}
    told = ", ".join(f"{mode} is {speed:.2f}" for mode, speed in speeds.items())
    notes += [f"{entry}: {told} times as fast as {first}; it is trained in {chosen}"] if speeds else []
    (context.out / execution.FILE).write_text(json.dumps(chosen.to_dict(), sort_keys=True) + "\n")
    return StageResult({"speeds": speeds}, tuple(notes))


def time_interleaved(blocks: Mapping[ExecutionMode, Callable[[], object]]) -> dict[ExecutionMode, list[float]]:
    """Return the seconds of each way, round by round, after one that does not count; who begins changes from round to round."""
    seconds: dict[ExecutionMode, list[float]] = {mode: [] for mode in blocks}
    for turn in range(1 + ROUNDS):
        for mode in [*blocks][:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            blocks[mode]()
            seconds[mode].append(time.perf_counter() - started)
    return {mode: took[1:] for mode, took in seconds.items()}


def fastest(seconds: Mapping[ExecutionMode, Sequence[float]]) -> ExecutionMode:
    """Return the way that is taken: a later one only if it is faster by enough, in all rounds but one, than the best before it."""
    chosen, *others = seconds
    for mode in others:
        if sorted(map(truediv, seconds[chosen], seconds[mode]))[1] >= PAYS:
            chosen = mode
    return chosen


def choose_epochs(params: Mapping[str, Any], inputs: Mapping[str, Artifact], context: Context, terms: Sequence[Loss]) -> StageResult:
    """Time training steps, and single answers of teacher and student with one thread; write ``epochs.json``.

    Raises:
        RecipeError: if not even one epoch is won back.
    """
    limit, wanted = params["break_even_inferences"], params["epochs"]
    epoch_s = _epoch_seconds(params, inputs, context, terms)
    teacher_s, student_s = _inference_seconds(params, inputs, context)
    told = (
        f"an epoch takes {epoch_s:.3g} s, and a sample {1000 * teacher_s:.3g} ms of the teacher, {1000 * student_s:.3g} ms of the "
        "student (torch on this machine, one thread)"
    )
    epochs = distributed.broadcast_number(break_even_epochs(limit, epoch_s, teacher_s - student_s))
    if epochs < 1:
        raise RecipeError(
            f"distill.break_even_inferences: {told}: not one epoch is won back within {limit:,} inferences; "
            "expected more inferences, a smaller student or a smaller training set"
        )
    chosen = min(epochs, wanted)
    (context.out / EPOCHS_FILE).write_text(json.dumps({"epochs": chosen}) + "\n")
    outcome = f"all {wanted} epochs are" if chosen == wanted else f"{chosen} of {wanted} epochs, and no more, are"
    return StageResult(
        {"epoch_seconds": epoch_s, "teacher_seconds": teacher_s, "student_seconds": student_s},
        (f"distill: {outcome} won back within {limit:,} inferences: {told}",),
    )


def break_even_epochs(inferences: int, epoch_s: float, saved_s: float) -> int:
    """Return how many epochs so many inferences win back."""
    return max(0, int(inferences * saved_s / epoch_s))


def _epoch_seconds(params: Mapping[str, Any], inputs: Mapping[str, Artifact], context: Context, terms: Sequence[Loss]) -> float:
    """Return what an epoch takes, by a few steps of it; a validation sample counts as one that is trained on."""
    import torch

    job = jobs.training_job(params, inputs, context.recipe_dir, search.with_first_choices(terms))
    few = job.train.pick(torch.arange(STEPS * params["batch_size"]) % len(job.train))
    with deterministic(params["threads"], job.settings.mode.accelerator):
        seconds = _median_seconds(loop.epoch_runner(replace(job, train=few, validation=few, view=None)), ROUNDS, 1)
    return seconds / len(few) * (len(job.train) + len(job.validation))


def _inference_seconds(params: Mapping[str, Any], inputs: Mapping[str, Artifact], context: Context) -> tuple[float, float]:
    """Return what teacher and student take for one sample."""
    sample = [array[:1] for array in data.load_arrays(inputs, "train")]
    made, entry = params["reference"], EntryPoint.parse(params["model"])
    with deterministic(1):
        teacher = load_teacher(context.recipe_dir, None if made is None else EntryPoint.parse(made), inputs["reference"].path)
        student = load.teacher_from_module(modules.build_module(context.recipe_dir, entry), entry)
        first, second = (_median_seconds(partial(one, sample), INFERENCES, WARM_UP) for one in (teacher, student))
    return first, second


def _median_seconds(block: Callable[[], object], rounds: int, warm_up: int) -> float:
    seconds = []
    for _ in range(warm_up + rounds):
        started = time.perf_counter()
        block()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[warm_up:])
