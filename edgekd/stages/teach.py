# SPDX-License-Identifier: Apache-2.0
"""Teach: the teacher is trained from labels, if the recipe asks for it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from edgekd.domain.recipe import Entry
from edgekd.errors import RecipeError
from edgekd.harness import runner
from edgekd.kd import data
from edgekd.ports import StageResult, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from torch import Tensor

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.recipe import Recipe
    from edgekd.domain.target import Target
    from edgekd.ports import Context

NAME = "teach"
VERSION = 1


def steps(recipe: Recipe, targets: Sequence[Target]) -> list[Step]:
    """Return one step, or none if the teacher is given."""
    del targets  # a teacher does not depend on them
    training = recipe.teacher.train
    if training is None:
        return []
    machine = runner.facts()
    params = {
        **asdict(training),
        "augment": None if training.augment is None else str(training.augment),
        "model": str(recipe.teacher.model),
        "threads": training.threads or machine["cores"],
        "instruction_set": machine["instruction_set"],
    }
    inputs = {
        **data.references(recipe, "train", labels=True),
        **data.references(recipe, "validation", labels=True),
        "code": "inspect:teacher.code.json",
        "augment.code": "inspect:augment.code.json",
    }
    return [Step(NAME, NAME, params, inputs, ("torch", "numpy", "safetensors"))]


def run(step: Step, inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Train the teacher; write ``teacher.safetensors`` and ``curve.json``."""
    from edgekd.kd import losses, models, train

    params = cast("dict[str, Any]", step.params)
    entry = Entry(*params["model"].rsplit(":", 1))
    settings = train.Settings(**{name: params[name] for name in train.Settings.__slots__})
    job = train.Job(
        section="teacher.train",
        entry=entry,
        build=lambda: models.student(context.recipe_dir, entry),
        train=_labelled(data.samples(inputs, "train"), "train"),
        validation=_labelled(data.samples(inputs, "validation"), "validation"),
        objective=lambda logits, _, labels: losses.ce(logits, labels, params["label_smoothing"]),
        settings=settings,
        augment=None if params["augment"] is None else _augment(Entry(*params["augment"].rsplit(":", 1)), context),
    )
    weights, curve = train.fit(job, context.work, context.progress)
    (context.out / "teacher.safetensors").write_bytes(models.pack(weights))
    lines = {"best_epoch": train.best_of(curve).epoch, "epochs": [asdict(line) for line in curve]}
    (context.out / "curve.json").write_text(json.dumps(lines, indent=1, sort_keys=True) + "\n")
    return StageResult(metrics=asdict(train.best_of(curve)))


def _labelled(samples: data.Samples, split: str) -> data.Samples:
    if not len(samples) or int(samples.labels.min()) < 0:
        raise RecipeError(f"teacher.train: the {split} split has samples without a class; a teacher is taught from classes (int64 from 0)")
    return samples


def _augment(entry: Entry, context: Context) -> Callable[[tuple[Tensor, ...], torch.Generator], tuple[Tensor, ...]]:
    """Return the user's augmentation, its answers checked."""
    import torch

    from edgekd import usercode

    function = usercode.load(context.recipe_dir, entry)

    def augment(inputs: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        given = inputs[0] if len(inputs) == 1 else inputs
        made = usercode.call(function, entry, given, generator)
        found = (made,) if isinstance(made, torch.Tensor) else made
        alike = isinstance(found, tuple | list) and [_kind(item) for item in found] == [_kind(item) for item in inputs]
        if not alike:
            raise RecipeError(f"{entry}: must return what it was given, in the same shapes and types; it changed them")
        return tuple(found)

    return augment


def _kind(item: object) -> object:
    import torch

    return (item.shape, item.dtype) if isinstance(item, torch.Tensor) else type(item)
