# SPDX-License-Identifier: Apache-2.0
"""Teach: the teacher is trained from labels, if the recipe asks for it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from edgekd.digests import write_atomically
from edgekd.domain.recipe import Entry
from edgekd.errors import RecipeError
from edgekd.harness import runner
from edgekd.kd import data, ranks, ways
from edgekd.ports import StageResult, Step

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.recipe import Recipe
    from edgekd.domain.target import Target
    from edgekd.ports import Context

NAME = "teach"
VERSION = 4


def steps(recipe: Recipe, targets: Sequence[Target]) -> list[Step]:
    """Return one step, after a trial of the precision if it is to be chosen, or none if the teacher is given."""
    del targets  # a teacher does not depend on them
    training = recipe.teacher.train
    if training is None:
        return []
    machine = runner.facts()
    params = {
        **{name: value for name, value in asdict(training).items() if name not in {"precision", "accelerator"}},
        "augment": None if training.augment is None else str(training.augment),
        "model": str(recipe.teacher.model),
        **ranks.crew(training.threads, machine["cores"]),
        "instruction_set": machine["instruction_set"],
    }
    inputs = {
        **data.references(recipe, "train", labels=True),
        **data.references(recipe, "validation", labels=True),
        "code": "inspect:teacher.code.json",
        "augment.code": "inspect:augment.code.json",
    }
    way = ways.planned(NAME, training, machine["features"], params, inputs)
    return [*way["steps"], Step(NAME, NAME, {**params, **way["params"]}, {**inputs, **way["inputs"]}, ("torch", "numpy", "safetensors"))]


def run(step: Step, inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Train the teacher; write ``teacher.safetensors``, ``curve.json``, and ``checkpoint.N.safetensors`` of as many as are asked for."""
    from edgekd.kd import losses, models, probe, train, views

    params = cast("dict[str, Any]", step.params)
    if "tried" in params:
        return probe.run("teacher.train", params, inputs, context)
    entry = Entry.of(params["model"])
    settings = train.Settings.of(params, ways.of(params, inputs))
    job = train.Job(
        section="teacher.train",
        entry=entry,
        build=lambda: models.student(context.recipe_dir, entry),
        train=_labelled(data.samples(inputs, "train"), "train"),
        validation=_labelled(data.samples(inputs, "validation"), "validation"),
        objective=lambda logits, _answers, labels, _epoch: losses.ce(logits, labels, params["label_smoothing"]),
        settings=settings,
        augment=None if params["augment"] is None else views.load(context.recipe_dir, Entry.of(params["augment"])),
    )
    wanted = _checkpoints(settings.epochs, params["checkpoints"])

    def keep(line: train.Epoch, module: nn.Module) -> None:
        if line.epoch in wanted:  # beside the run's own checkpoint: a kill may come before this stage ends
            write_atomically(context.work / f"checkpoint.{wanted.index(line.epoch)}", models.pack(module.state_dict()))

    weights, curve = train.fit(job, context.work, context.progress, keep)
    for number in range(len(wanted)):
        (context.out / f"checkpoint.{number}.safetensors").write_bytes((context.work / f"checkpoint.{number}").read_bytes())
    (context.out / "teacher.safetensors").write_bytes(models.pack(weights))
    lines = {"best_epoch": train.best_of(curve).epoch, "epochs": [asdict(line) for line in curve]}
    (context.out / "curve.json").write_text(json.dumps(lines, indent=1, sort_keys=True) + "\n")
    warning = ranks.remark(job.build, settings.batch_size)
    metrics = {**asdict(train.best_of(curve)), "samples": len(curve) * len(job.train)}
    return StageResult(metrics=metrics, notes=() if warning is None else (warning,))


def _checkpoints(epochs: int, count: int) -> list[int]:
    """Return the epochs after which weights are kept, from 1: evenly spread, and none is the last."""
    return [epochs * (number + 1) // (count + 1) for number in range(count)]


def _labelled(samples: data.Samples, split: str) -> data.Samples:
    if not len(samples) or int(samples.labels.min()) < 0:
        raise RecipeError(f"teacher.train: the {split} split has samples without a class; a teacher is taught from classes (int64 from 0)")
    return samples
