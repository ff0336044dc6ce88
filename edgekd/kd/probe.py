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

from edgekd.domain.recipe import Entry
from edgekd.errors import EdgekdError, RecipeError
from edgekd.kd import data, lessons, models, ranks, search, teachers, train, ways
from edgekd.kd.repeatable import repeatable
from edgekd.kd.ways import Way
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


def run(section: str, params: Mapping[str, Any], inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Try the ways, the first of which must do; write ``way.json``. ``section`` is the recipe's, for messages."""
    import torch

    entry = Entry.of(params["model"])
    given = data.samples(inputs, "train")
    few = given.pick(torch.arange(STEPS * params["batch_size"]) % len(given))
    settings = train.Settings(1, params["batch_size"], params["optimizer"], 1e-6, 0.0, 0, params["threads"])
    job = train.Job(
        section=section,
        entry=entry,
        build=lambda: models.student(context.recipe_dir, entry),
        train=few,
        validation=few,
        objective=lambda logits, _answers, _labels, _epoch: logits.float().square().mean(),
        settings=settings,
    )
    first, *others = [Way(**told) for told in params["tried"]]
    notes: list[str] = []
    with repeatable(params["threads"], others[-1].accelerator):  # an accelerator comes after the processor
        blocks = {first: train.rehearsal(replace(job, settings=replace(settings, way=first)))}
        for way in others:
            try:
                blocks[way] = train.rehearsal(replace(job, settings=replace(settings, way=way)))
                blocks[way]()
            except (EdgekdError, RuntimeError) as error:
                blocks.pop(way, None)
                notes.append(f"warning: {entry} is not trained in {way}, which fails: {str(error).splitlines()[0]}")
        seconds = raced(blocks)
    chosen = best(seconds)
    speeds = {str(way): statistics.median(map(truediv, seconds[first], took)) for way, took in seconds.items() if way != first}
    told = ", ".join(f"{way} is {speed:.2f}" for way, speed in speeds.items())
    notes += [f"{entry}: {told} times as fast as {first}; it is trained in {chosen}"] if speeds else []
    (context.out / ways.FILE).write_text(json.dumps(chosen.told, sort_keys=True) + "\n")
    return StageResult({"speeds": speeds}, tuple(notes))


def raced(blocks: Mapping[Way, Callable[[], object]]) -> dict[Way, list[float]]:
    """Return the seconds of each way, round by round, after one that does not count; who begins changes from round to round."""
    seconds: dict[Way, list[float]] = {way: [] for way in blocks}
    for turn in range(1 + ROUNDS):
        for way in [*blocks][:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            blocks[way]()
            seconds[way].append(time.perf_counter() - started)
    return {way: took[1:] for way, took in seconds.items()}


def best(seconds: Mapping[Way, Sequence[float]]) -> Way:
    """Return the way that is taken: a later one only if it is faster by enough, in all rounds but one, than the best before it."""
    chosen, *others = seconds
    for way in others:
        if sorted(map(truediv, seconds[chosen], seconds[way]))[1] >= PAYS:
            chosen = way
    return chosen


def worth(params: Mapping[str, Any], inputs: Mapping[str, Artifact], context: Context, terms: Sequence[Loss]) -> StageResult:
    """Time training steps, and single answers of teacher and student with one thread; write ``epochs.json``.

    Raises:
        RecipeError: if not even one epoch is won back.
    """
    limit, wanted = params["paid_back_within"], params["epochs"]
    epoch_s = _epoch_seconds(params, inputs, context, terms)
    teacher_s, student_s = _inference_seconds(params, inputs, context)
    told = (
        f"an epoch takes {epoch_s:.3g} s, and a sample {1000 * teacher_s:.3g} ms of the teacher, {1000 * student_s:.3g} ms of the "
        "student (torch on this machine, one thread)"
    )
    epochs = ranks.agreed(affordable(limit, epoch_s, teacher_s - student_s))
    if epochs < 1:
        raise RecipeError(
            f"distill.paid_back_within: {told}: not one epoch is won back within {limit:,} inferences; "
            "expected more inferences, a smaller student or a smaller training set"
        )
    chosen = min(epochs, wanted)
    (context.out / EPOCHS_FILE).write_text(json.dumps({"epochs": chosen}) + "\n")
    outcome = f"all {wanted} epochs are" if chosen == wanted else f"{chosen} of {wanted} epochs, and no more, are"
    return StageResult(
        {"epoch_seconds": epoch_s, "teacher_seconds": teacher_s, "student_seconds": student_s},
        (f"distill: {outcome} won back within {limit:,} inferences: {told}",),
    )


def affordable(inferences: int, epoch_s: float, saved_s: float) -> int:
    """Return how many epochs so many inferences win back."""
    return max(0, int(inferences * saved_s / epoch_s))


def _epoch_seconds(params: Mapping[str, Any], inputs: Mapping[str, Artifact], context: Context, terms: Sequence[Loss]) -> float:
    """Return what an epoch takes, by a few steps of it; a validation sample counts as one that is trained on."""
    import torch

    job = lessons.lesson(params, inputs, context.recipe_dir, search.usual(terms))
    few = job.train.pick(torch.arange(STEPS * params["batch_size"]) % len(job.train))
    with repeatable(params["threads"], job.settings.way.accelerator):
        seconds = _median_seconds(train.rehearsal(replace(job, train=few, validation=few, view=None)), ROUNDS, 1)
    return seconds / len(few) * (len(job.train) + len(job.validation))


def _inference_seconds(params: Mapping[str, Any], inputs: Mapping[str, Artifact], context: Context) -> tuple[float, float]:
    """Return what teacher and student take for one sample."""
    sample = [array[:1] for array in data.arrays(inputs, "train")]
    made, entry = params["reference"], Entry.of(params["model"])
    with repeatable(1):
        teacher = models.load_teacher(context.recipe_dir, None if made is None else Entry.of(made), inputs["reference"].path)
        student = teachers.of_module(models.student(context.recipe_dir, entry), entry)
        first, second = (_median_seconds(partial(one, sample), INFERENCES, WARM_UP) for one in (teacher, student))
    return first, second


def _median_seconds(block: Callable[[], object], rounds: int, warm_up: int) -> float:
    seconds = []
    for _ in range(warm_up + rounds):
        started = time.perf_counter()
        block()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[warm_up:])
