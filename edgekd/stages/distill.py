# SPDX-License-Identifier: Apache-2.0
"""Distill: the student is trained to match the teacher's stored outputs, and the labels."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from edgekd.domain.recipe import DISTILLED, TWINS, Entry, Loss
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
    from edgekd.kd.views import Augment
    from edgekd.ports import Context

NAME = "distill"
VERSION = 5


def steps(recipe: Recipe, targets: Sequence[Target]) -> list[Step]:
    """Return the step of the student that ships, and one for each twin, if the recipe asks for them."""
    del targets  # all share one student
    machine = runner.facts()
    params: dict[str, Any] = {
        **{name: value for name, value in asdict(recipe.distill).items() if name not in {"control", "augment"}},
        "augment": None if recipe.distill.augment is None else str(recipe.distill.augment),
        "losses": [_told(loss) for loss in recipe.distill.losses],
        "model": str(recipe.student.model),
        "threads": recipe.distill.threads or machine["cores"],
        "instruction_set": machine["instruction_set"],
    }
    code = {"code": "inspect:student.code.json", "views.code": "inspect:views.code.json"}
    taught = {
        **data.references(recipe, "train", labels=True, outputs=True),
        **data.references(recipe, "validation", labels=True, outputs=True),
        **data.references(recipe, "unlabelled", outputs=True),
        **code,
    }
    alone = {
        **data.references(recipe, "train", labels=True),
        **data.references(recipe, "validation", labels=True),
        **(data.references(recipe, "unlabelled") if _learns_unlabelled(recipe.distill.losses) else {}),
        **code,
    }
    tools = ("torch", "numpy", "safetensors")
    found = [Step(NAME, NAME, params, taught, tools)]
    for arm, names in recipe.arms.items():
        for number, name in enumerate(names):
            own = {**params, "seed": recipe.distill.seed + number}
            if arm == DISTILLED:
                found += [Step(name, NAME, own, taught, tools)] if number else []
            else:
                own["losses"] = [_told(Loss("ce", label_smoothing=TWINS[arm]))]
                found.append(Step(name, NAME, own, alone, tools))
    return found


def run(step: Step, inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Train the student; write ``student.safetensors`` and ``curve.json``."""
    from edgekd.kd import calibrate, losses, models, train, views

    params = cast("dict[str, Any]", step.params)
    entry = Entry(*params["model"].rsplit(":", 1))
    terms = [Loss(**term) for term in params["losses"]]

    def objective(logits: Tensor, outputs: Tensor | None, labels: Tensor) -> Tensor:
        return losses.total(terms, logits, outputs, labels)

    section = "distill.losses" if "train.outputs" in inputs else "distill.control"
    augment = None if params["augment"] is None else views.load(context.recipe_dir, Entry(*params["augment"].rsplit(":", 1)))

    def view(number: int) -> data.Samples:
        return _training_set(inputs, terms, section, augment, number)

    job = train.Job(
        section="distill",
        entry=entry,
        build=lambda: models.student(context.recipe_dir, entry),
        train=view(0),
        validation=data.samples(inputs, "validation"),
        objective=objective,
        settings=train.Settings(**{name: params[name] for name in train.Settings.__slots__}),
        view=None if augment is None else lambda epoch: view(epoch % params["views"]),
    )
    weights, curve = train.fit(job, context.work, context.progress)
    notes: tuple[str, ...] = ()
    if calibrate.leaves_scale_free(terms):
        weights, note = calibrate.calibrated(job.build(), weights, job.validation, entry, params["threads"])
        notes = (note,)
    (context.out / "student.safetensors").write_bytes(models.pack(weights))
    lines = {"best_epoch": train.best_of(curve).epoch, "epochs": [asdict(line) for line in curve]}
    (context.out / "curve.json").write_text(json.dumps(lines, indent=1, sort_keys=True) + "\n")
    return StageResult(metrics=asdict(train.best_of(curve)), notes=notes)


def _training_set(
    inputs: Mapping[str, Artifact], terms: list[Loss], section: str, augment: Augment | None = None, number: int = 0
) -> data.Samples:
    """Return the training split, with the unlabelled samples behind it if a loss can learn from them."""
    import torch

    from edgekd.kd.losses import UNLABELLED, needs

    found = data.samples(inputs, "train", augment, number)
    if bool((found.labels == UNLABELLED).all()):
        for term in terms:
            if "labels" in needs(term.kind):
                what = f"'{term.kind}' needs classes, and the labels of the train split are none (int64 from 0)"
                raise RecipeError(f"{section}: {what}; use 'kl' alone, without [distill.control]")
    if "unlabelled.inputs.0" not in inputs:
        return found
    more = data.samples(inputs, "unlabelled", augment, number)
    if not len(more):
        return found
    if "train.outputs" not in inputs:  # a twin takes as many steps as the distilled student, on the samples that it can learn from
        return found.pick(torch.arange(len(found) + len(more)) % len(found))
    return data.joined(found, more) if _learns_unlabelled(terms) else found


def _learns_unlabelled(terms: Sequence[Loss]) -> bool:
    from edgekd.kd.losses import needs

    return any("labels" not in needs(term.kind) for term in terms)


def _told(loss: Loss) -> dict[str, Any]:
    return {"kind": loss.kind, "weight": loss.weight, **loss.options}
