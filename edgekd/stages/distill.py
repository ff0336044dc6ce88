# SPDX-License-Identifier: Apache-2.0
"""Distill: the student is trained to match the teacher's stored outputs, and the labels."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from edgekd.domain.recipe import Entry, Loss
from edgekd.errors import RecipeError
from edgekd.harness import runner
from edgekd.kd import data
from edgekd.ports import StageResult, Step

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.recipe import Recipe
    from edgekd.domain.target import Target
    from edgekd.ports import Context

NAME = "distill"
VERSION = 1


def steps(recipe: Recipe, targets: Sequence[Target]) -> list[Step]:
    """Return the one step.

    Raises:
        RecipeError: if a loss has no temperature that needs one, or one that means nothing.
    """
    del targets  # all share one student
    machine = runner.facts()
    params = {
        **asdict(recipe.distill),
        "losses": [asdict(loss) for loss in _checked(recipe.distill.losses)],
        "model": str(recipe.student.model),
        "threads": recipe.distill.threads or machine["cores"],
        "instruction_set": machine["instruction_set"],
    }
    inputs = {
        **data.references(recipe, "train", labels=True, outputs=True),
        **data.references(recipe, "validation", labels=True, outputs=True),
        **data.references(recipe, "unlabelled", outputs=True),
        "code": "inspect:student.code.json",
    }
    return [Step(NAME, NAME, params, inputs, ("torch", "numpy", "safetensors"))]


def run(step: Step, inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Train the student; write ``student.safetensors`` and ``curve.json``."""
    from edgekd.kd import losses, models, train

    params = cast("dict[str, Any]", step.params)
    entry = Entry(*params["model"].rsplit(":", 1))
    terms = [Loss(**term) for term in params["losses"]]

    def objective(logits: Tensor, outputs: Tensor | None, labels: Tensor) -> Tensor:
        return losses.total(terms, logits, cast("Tensor", outputs), labels)  # every split of this stage has outputs

    job = train.Job(
        section="distill",
        entry=entry,
        build=lambda: models.student(context.recipe_dir, entry),
        train=_training_set(inputs, terms),
        validation=data.samples(inputs, "validation"),
        objective=objective,
        settings=train.Settings(**{name: params[name] for name in train.Settings.__slots__}),
    )
    weights, curve = train.fit(job, context.work, context.progress)
    (context.out / "student.safetensors").write_bytes(models.pack(weights))
    lines = {"best_epoch": train.best_of(curve).epoch, "epochs": [asdict(line) for line in curve]}
    (context.out / "curve.json").write_text(json.dumps(lines, indent=1, sort_keys=True) + "\n")
    return StageResult(metrics=asdict(train.best_of(curve)))


def _training_set(inputs: Mapping[str, Artifact], terms: list[Loss]) -> data.Samples:
    """Return the training split, with the unlabelled samples behind it if a loss can learn from them."""
    from edgekd.kd.losses import UNLABELLED

    found = data.samples(inputs, "train")
    kinds = {term.kind for term in terms}
    if "ce" in kinds and bool((found.labels == UNLABELLED).all()):
        raise RecipeError("distill.losses: 'ce' needs classes, and the labels of the train split are none (int64 from 0); use 'kl' alone")
    more = data.samples(inputs, "unlabelled")
    return data.joined(found, more) if len(more) and kinds != {"ce"} else found


def _checked(losses: Sequence[Loss]) -> Sequence[Loss]:
    problems = [
        f"distill.losses[{index}]: '{loss.kind}' {'needs a temperature, such as 4.0' if loss.kind == 'kl' else 'has no temperature'}"
        for index, loss in enumerate(losses)
        if (loss.kind == "kl") != (loss.temperature is not None)
    ]
    if problems:
        raise RecipeError(*problems)
    return losses
