# SPDX-License-Identifier: Apache-2.0
"""Teach: the teacher is trained from labels, if the recipe asks for it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError
from edgekd.harness import runner
from edgekd.kd import data
from edgekd.kd.training import distributed
from edgekd.kd.training.execution import AutotuneParams, plan_execution_mode
from edgekd.kd.training.jobs import TrainingSettings
from edgekd.ports import StageResult, Step

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.recipe import Recipe
    from edgekd.domain.target import Target
    from edgekd.kd.training.jobs import TrainingJob
    from edgekd.ports import Context

NAME = "teach"
CODE: tuple[str, ...] = ("stages/teach", "kd", "store/arrays", "usercode", "domain/losses")
TOOLS = ("torch", "numpy", "safetensors")


@dataclass(frozen=True, slots=True)
class TeachParams:
    """The parameters of the step: all that may change the teacher's weights, beside the inputs."""

    model: str
    settings: TrainingSettings
    label_smoothing: float
    augment: str | None
    checkpoints: int
    instruction_set: str


def steps(recipe: Recipe, targets: Sequence[Target]) -> list[Step[Any]]:
    """Return one step, after autotune if the execution mode is open, or none if the teacher is given."""
    del targets  # a teacher does not depend on them
    training = recipe.teacher.train
    if training is None:
        return []
    machine = runner.facts()
    world = distributed.world(training.threads, machine["cores"])
    inputs = {
        **data.split_references(recipe, "train", labels=True),
        **data.split_references(recipe, "validation", labels=True),
        "code": "inspect:teacher.code.json",
        "augment.code": "inspect:augment.code.json",
    }
    model, instruction_set = str(recipe.teacher.model), machine["instruction_set"]
    planned = plan_execution_mode(NAME, training, machine["features"], (model, world["threads"], instruction_set), inputs)
    params = TeachParams(
        model=model,
        settings=TrainingSettings.from_recipe(training, world, planned.mode),
        label_smoothing=training.label_smoothing,
        augment=None if training.augment is None else str(training.augment),
        checkpoints=training.checkpoints,
        instruction_set=instruction_set,
    )
    return [*planned.steps, Step(NAME, NAME, params, {**inputs, **planned.inputs}, TOOLS)]


def run(step: Step[TeachParams | AutotuneParams], inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Train the teacher; write ``teacher.safetensors``, ``curve.json``, and ``checkpoint.N.safetensors`` for each checkpoint."""
    from edgekd.kd import modules
    from edgekd.kd.training import autotune
    from edgekd.kd.training.callbacks import SaveWeights
    from edgekd.kd.training.trainer import fit

    params = step.params
    if isinstance(params, AutotuneParams):
        return autotune.choose_execution_mode("teacher.train", params, inputs, context)
    job = _job(params, inputs, context)
    saving = SaveWeights(checkpoint_epochs(params.settings.epochs, params.checkpoints), context.work)
    weights, curve = fit(job, context.work, context.progress, [saving])
    for path in saving.paths:
        (context.out / f"{path.name}.safetensors").write_bytes(path.read_bytes())
    (context.out / "teacher.safetensors").write_bytes(modules.serialize_weights(weights))
    document = {"epochs": [asdict(result) for result in curve]}
    (context.out / "curve.json").write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    warning = distributed.batch_norm_warning(job.build, job.settings.batch_size)
    return StageResult({**asdict(curve[-1]), "samples": len(curve) * len(job.train)}, () if warning is None else (warning,))


def checkpoint_epochs(epochs: int, count: int) -> list[int]:
    """Return the epochs after which weights are saved, from 1: evenly spread, and none is the last."""
    return [epochs * (number + 1) // (count + 1) for number in range(count)]


def _job(params: TeachParams, inputs: Mapping[str, Artifact], context: Context) -> TrainingJob:
    from edgekd.kd import losses, modules, views
    from edgekd.kd.training.jobs import TrainingJob

    entry = EntryPoint.parse(params.model)
    return TrainingJob(
        section="teacher.train",
        entry=entry,
        build=lambda: modules.build_module(context.recipe_dir, entry),
        train=_labelled(data.load_split(inputs, "train"), "train"),
        validation=_labelled(data.load_split(inputs, "validation"), "validation"),
        objective=lambda logits, _teacher_logits, labels, _epoch: losses.ce(logits, labels, params.label_smoothing),
        settings=params.settings.with_mode(inputs),
        augment=None if params.augment is None else views.load_augmentation(context.recipe_dir, EntryPoint.parse(params.augment)),
    )


def _labelled(samples: data.Samples, split: str) -> data.Samples:
    if not len(samples) or int(samples.labels.min()) < 0:
        raise RecipeError(f"teacher.train: the {split} split has samples without a class; a teacher is trained from classes (int64 from 0)")
    return samples
