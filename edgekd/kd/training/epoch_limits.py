# SPDX-License-Identifier: Apache-2.0
"""How many epochs of training fit in the minutes that it may take, and break even within a number of inferences, by timings here.

The number is settled before training starts: a one-cycle learning rate must know its last step.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError
from edgekd.kd import data, modules
from edgekd.kd.reproducible import deterministic
from edgekd.kd.teachers.load import load_teacher, teacher_from_module
from edgekd.kd.training import distributed
from edgekd.kd.training.jobs import EPOCHS_FILE, student_job
from edgekd.kd.training.search import with_first_choices
from edgekd.kd.training.trainer import epoch_runner
from edgekd.ports import StageResult

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edgekd.domain.artifact import Artifact
    from edgekd.kd.training.jobs import EpochLimitParams
    from edgekd.ports import Context

STEPS, ROUNDS = 3, 9
INFERENCES, WARM_UP = 50, 10


def choose_epochs(params: EpochLimitParams, inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Time training steps, and if inferences limit the epochs, those of teacher and student with one thread; write ``epochs.json``.

    Raises:
        RecipeError: if a limit leaves not even one epoch.
    """
    epochs, notes = params.student.settings.epochs, []
    epoch_s = _epoch_seconds(params, inputs, context)
    metrics = {"epoch_seconds": epoch_s}
    timings = f"an epoch takes {epoch_s:.3g} s"
    if params.minutes is not None:
        search = f", and a search as long as {params.search_share:g} trainings comes first" if params.search_share else ""
        affordable = distributed.broadcast_number(int(params.minutes * 60 / epoch_s / (1 + params.search_share)))
        what = f"in {params.minutes:g} minutes: {timings}{search}"
        if affordable < 1:
            expected = "expected more minutes, a smaller distill.search_share, student or training set"
            raise RecipeError(f"distill.max_minutes: not one epoch fits {what}; {expected}")
        notes.append(f"distill: {_outcome(affordable, epochs)} fit {what}")
        epochs = min(epochs, affordable)
    if params.inferences is not None:
        teacher_s, student_s = _inference_seconds(params, inputs, context)
        metrics |= {"teacher_seconds": teacher_s, "student_seconds": student_s}
        timings = (
            f"{timings}, one inference of the teacher {1000 * teacher_s:.3g} ms, of the student "
            f"{1000 * student_s:.3g} ms (torch on this machine, one thread)"
        )
        affordable = distributed.broadcast_number(break_even_epochs(params.inferences, epoch_s, teacher_s - student_s))
        if affordable < 1:
            raise RecipeError(
                f"distill.break_even_inferences: {timings}: not one epoch breaks even within {params.inferences:,} inferences; "
                "expected more inferences, a smaller student or a smaller training set"
            )
        notes.append(f"distill: {_outcome(affordable, epochs)} break even within {params.inferences:,} inferences: {timings}")
        epochs = min(epochs, affordable)
    (context.out / EPOCHS_FILE).write_text(json.dumps({"epochs": epochs}) + "\n")
    return StageResult(metrics, tuple(notes))


def read_epochs(artifact: Artifact) -> int:
    """Return the number of epochs that ``choose_epochs`` wrote."""
    epochs: int = json.loads(artifact.path.read_text())["epochs"]
    return epochs


def break_even_epochs(inferences: int, epoch_s: float, saved_s: float) -> int:
    """Return how many epochs a number of inferences makes up for, each of which saves ``saved_s`` seconds."""
    return max(0, int(inferences * saved_s / epoch_s))


def _outcome(affordable: int, requested: int) -> str:
    return f"all {requested} epochs" if affordable >= requested else f"{affordable} of {requested} epochs, and no more,"


def _epoch_seconds(params: EpochLimitParams, inputs: Mapping[str, Artifact], context: Context) -> float:
    """Return the time of an epoch, extrapolated from a few steps; a validation sample counts as a training sample."""
    import torch

    student = replace(params.student, losses=with_first_choices(params.student.losses))
    job = student_job(student, inputs, context.recipe_dir)
    samples = job.train.pick(torch.arange(STEPS * job.settings.batch_size) % len(job.train))
    with deterministic(job.settings.threads, job.settings.mode.accelerator):
        seconds = _median_seconds(epoch_runner(replace(job, train=samples, validation=samples, view=None)), ROUNDS, 1)
    return seconds / len(samples) * (len(job.train) + len(job.validation))


def _inference_seconds(params: EpochLimitParams, inputs: Mapping[str, Artifact], context: Context) -> tuple[float, float]:
    """Return the time of one inference of the teacher and of the student."""
    sample = [array[:1] for array in data.load_arrays(inputs, "train")]
    entry = EntryPoint.parse(params.student.model)
    reference = None if params.reference is None else EntryPoint.parse(params.reference)
    with deterministic(1):
        teacher = load_teacher(context.recipe_dir, reference, inputs["reference"].path)
        student = teacher_from_module(modules.build_module(context.recipe_dir, entry), entry)
        teacher_s, student_s = (_median_seconds(partial(network, sample), INFERENCES, WARM_UP) for network in (teacher, student))
    return teacher_s, student_s


def _median_seconds(function: Callable[[], object], rounds: int, warm_up: int) -> float:
    seconds = []
    for _ in range(warm_up + rounds):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[warm_up:])
