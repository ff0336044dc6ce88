# SPDX-License-Identifier: Apache-2.0
"""Teach: the teacher is trained from labels, if the recipe asks for it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError
from edgekd.harness import runner
from edgekd.kd import data
from edgekd.kd.training import distributed, execution
from edgekd.ports import StageResult, Step
from edgekd.store.digests import write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.recipe import Recipe
    from edgekd.domain.target import Target
    from edgekd.ports import Context

NAME = "teach"
CODE: tuple[str, ...] = ("stages/teach", "kd", "usercode", "domain/losses")


def steps(recipe: Recipe, targets: Sequence[Target]) -> list[Step[Any]]:
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
        **distributed.world(training.threads, machine["cores"]),
        "instruction_set": machine["instruction_set"],
    }
    inputs = {
        **data.split_references(recipe, "train", labels=True),
        **data.split_references(recipe, "validation", labels=True),
        "code": "inspect:teacher.code.json",
        "augment.code": "inspect:augment.code.json",
    }
    mode = execution.plan_execution_mode(NAME, training, machine["features"], params, inputs)
    return [*mode["steps"], Step(NAME, NAME, {**params, **mode["params"]}, {**inputs, **mode["inputs"]}, ("torch", "numpy", "safetensors"))]


def run(step: Step[Any], inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Train the teacher; write ``teacher.safetensors``, ``curve.json``, and ``checkpoint.N.safetensors`` of as many as are asked for."""
    from edgekd.kd import losses, modules, views
    from edgekd.kd.training import autotune, loop

    params = cast("dict[str, Any]", step.params)
    if "tried" in params:
        return autotune.choose_execution_mode("teacher.train", params, inputs, context)
    entry = EntryPoint.parse(params["model"])
    settings = loop.TrainingSettings.from_params(params, execution.execution_mode_of(params, inputs))
    job = loop.TrainingJob(
        section="teacher.train",
        entry=entry,
        build=lambda: modules.build_module(context.recipe_dir, entry),
        train=_labelled(data.load_split(inputs, "train"), "train"),
        validation=_labelled(data.load_split(inputs, "validation"), "validation"),
        objective=lambda logits, _answers, labels, _epoch: losses.ce(logits, labels, params["label_smoothing"]),
        settings=settings,
        augment=None if params["augment"] is None else views.load_augmentation(context.recipe_dir, EntryPoint.parse(params["augment"])),
    )
    wanted = _checkpoints(settings.epochs, params["checkpoints"])

    def keep(line: loop.EpochResult, module: nn.Module) -> None:
        if line.epoch in wanted:  # beside the run's own checkpoint: a kill may come before this stage ends
            write_atomically(context.work / f"checkpoint.{wanted.index(line.epoch)}", modules.serialize_weights(module.state_dict()))

    weights, curve = loop.fit(job, context.work, context.progress, keep)
    for number in range(len(wanted)):
        (context.out / f"checkpoint.{number}.safetensors").write_bytes((context.work / f"checkpoint.{number}").read_bytes())
    (context.out / "teacher.safetensors").write_bytes(modules.serialize_weights(weights))
    lines = {"best_epoch": loop.best_epoch(curve).epoch, "epochs": [asdict(line) for line in curve]}
    (context.out / "curve.json").write_text(json.dumps(lines, indent=1, sort_keys=True) + "\n")
    warning = distributed.batch_norm_warning(job.build, settings.batch_size)
    metrics = {**asdict(loop.best_epoch(curve)), "samples": len(curve) * len(job.train)}
    return StageResult(metrics=metrics, notes=() if warning is None else (warning,))


def _checkpoints(epochs: int, count: int) -> list[int]:
    """Return the epochs after which weights are kept, from 1: evenly spread, and none is the last."""
    return [epochs * (number + 1) // (count + 1) for number in range(count)]


def _labelled(samples: data.Samples, split: str) -> data.Samples:
    if not len(samples) or int(samples.labels.min()) < 0:
        raise RecipeError(f"teacher.train: the {split} split has samples without a class; a teacher is taught from classes (int64 from 0)")
    return samples
