# SPDX-License-Identifier: Apache-2.0
"""Distill: the student is trained to match the teacher's stored outputs, and the labels."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from edgekd.domain.losses import FROZEN, TAPPED, Loss, untold
from edgekd.domain.recipe import DISTILLED, PSEUDO, TWINS, Entry
from edgekd.errors import RecipeError
from edgekd.harness import runner
from edgekd.kd import data
from edgekd.kd.beside import PREVIOUS
from edgekd.kd.taps import Network
from edgekd.ports import StageResult, Step

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.recipe import Recipe
    from edgekd.domain.target import Target
    from edgekd.ports import Context

NAME = "distill"
VERSION = 6


def steps(recipe: Recipe, targets: Sequence[Target]) -> list[Step]:
    """Return the step of the student that ships, after those of its assistants, and one for each twin, if the recipe asks for them."""
    del targets  # all share one student
    machine = runner.facts()
    distill, assistants = recipe.distill, recipe.distill.assistants
    others = {"control", "augment", "teachers", "mixing", "assistants"}
    params: dict[str, Any] = {
        **{name: value for name, value in asdict(distill).items() if name not in others},
        "augment": None if distill.augment is None else str(distill.augment),
        "losses": [loss.told for loss in distill.losses],
        "model": str(recipe.student.model),
        "threads": distill.threads or machine["cores"],
        "instruction_set": machine["instruction_set"],
    }
    tools = ("torch", "numpy", "safetensors")
    found = []
    for link, assistant in enumerate(assistants):
        own = {**params, **_lessons(recipe, link), "model": str(assistant.model), "epochs": assistant.epochs or distill.epochs}
        taught = {**_taught(recipe, link), "code": f"inspect:assistant.{link}.code.json"}
        found.append(Step(f"distill/assistant/{link}", NAME, own, taught, tools))
    params |= _lessons(recipe, len(assistants))
    taught = {**_taught(recipe, len(assistants)), "code": "inspect:student.code.json"}
    if any(loss.kind in TAPPED for loss in distill.losses):
        params["teacher"] = str(recipe.teacher.model)
        taught |= {"teacher": recipe.teacher.artifact, "teacher.code": "inspect:teacher.code.json"}
    found.append(Step(NAME, NAME, params, taught, tools))
    return [*found, *_twins(recipe, params, taught, tools)]


def _twins(recipe: Recipe, params: Mapping[str, Any], taught: Mapping[str, str], tools: tuple[str, ...]) -> list[Step]:
    """Return the steps of the control: the distilled student from other seeds, and those without the teacher."""
    distill, found = recipe.distill, []
    code = {"code": "inspect:student.code.json", "views.code": "inspect:views.code.json"}
    alone = {name: reference for name, reference in _samples(recipe).items() if not name.startswith("unlabelled")} | code
    if _learns_unlabelled(distill.losses):
        alone |= data.references(recipe, "unlabelled")
    without = {key: value for key, value in params.items() if key not in {"mixing", "checkpoints", "teacher"}}
    for arm, names in recipe.arms.items():
        for number, name in enumerate(names):
            seed = {"seed": distill.seed + number}
            if arm == DISTILLED:
                found += [Step(name, NAME, {**params, **seed}, taught, tools)] if number else []
                continue
            losses = (Loss("ce"), Loss("hard")) if arm == PSEUDO else (Loss("ce", label_smoothing=TWINS[arm]),)
            own = {**without, **seed, "losses": [loss.told for loss in losses]}
            answers = {**_samples(recipe), **code, **_answers(f"supervise/{name.removeprefix('distill/')}")}
            found.append(Step(name, NAME, own, answers if arm == PSEUDO else alone, tools))
    return found


def _lessons(recipe: Recipe, link: int) -> dict[str, Any]:
    """Return what says how a link of the chain uses its teachers' answers: only the first has several."""
    teachers = recipe.distill.teachers
    if link:
        return {}
    weights = [recipe.teacher.weight, *(teacher.weight for teacher in teachers)]
    mixing = {"mixing": {"weights": weights, "by": recipe.distill.mixing}} if teachers else {}
    return mixing | ({"checkpoints": recipe.checkpoints} if recipe.checkpoints else {})


def _taught(recipe: Recipe, link: int) -> dict[str, str]:
    """Return the inputs of a link of the chain: the data, and the answers of what teaches it."""
    found = {**_samples(recipe), "views.code": "inspect:views.code.json"}
    if link:
        return found | _answers(f"supervise/assistant/{link - 1}")
    for name in recipe.supervisors:
        own = name.removeprefix("supervise").replace("/", ".")
        if not own.startswith((".assistant", f".{PSEUDO}")):
            found |= _answers(name, own)
    return found


def _samples(recipe: Recipe) -> dict[str, str]:
    return {
        **data.references(recipe, "train", labels=True),
        **data.references(recipe, "validation", labels=True),
        **data.references(recipe, "unlabelled"),
    }


def _answers(step: str, suffix: str = "") -> dict[str, str]:
    """Return the inputs that are the answers of a step of ``supervise``."""
    return {f"{split}.outputs{suffix}": f"{step}:{split}.outputs.npy" for split in ("train", "validation", "unlabelled")}


def run(step: Step, inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Train the student; write ``student.safetensors`` and ``curve.json``."""
    from edgekd.kd import calibrate, losses, models, train, views

    params = cast("dict[str, Any]", step.params)
    entry = _entry(params["model"])
    terms = [untold(term) for term in params["losses"]]
    section = "distill.losses" if "train.outputs" in inputs else "distill.control"
    augment = None if params["augment"] is None else views.load(context.recipe_dir, _entry(params["augment"]))
    mixing = data.Mixing(tuple(params["mixing"]["weights"]), params["mixing"]["by"]) if "mixing" in params else None
    checkpoints, epochs = params.get("checkpoints", 0), params["epochs"]

    def objective(logits: Tensor, answers: Mapping[str, Tensor | None], labels: Tensor, epoch: int) -> Tensor:
        return losses.total(terms, logits, answers, labels, epoch)

    def view(epoch: int) -> data.Samples:
        turn = epoch * (checkpoints + 1) // epochs
        number = 0 if augment is None else epoch % params["views"]
        return _training_set(inputs, terms, section, (augment, number, mixing, turn if turn < checkpoints else None))

    def teacher() -> Network:
        made = _entry(params["teacher"])
        return Network("teacher", models.load_teacher_module(context.recipe_dir, made, inputs["teacher"].path), made)

    def active(epoch: int) -> list[Loss]:
        return [term for term in terms if term.counts_in(epoch) and (epoch or term.teacher != PREVIOUS)]

    job = train.Job(
        section="distill",
        entry=entry,
        build=lambda: models.student(context.recipe_dir, entry),
        train=view(epochs - 1),
        validation=data.samples(inputs, "validation", mixing=mixing),
        objective=objective,
        settings=train.Settings(**{name: params[name] for name in train.Settings.__slots__}),
        view=view if augment is not None or checkpoints else None,
        teacher=teacher if "teacher" in params else None,
        tapped=[term for term in terms if term.kind in TAPPED],
        selves=sorted({term.teacher for term in terms} - {FROZEN}),
        is_judged=lambda epoch: active(epoch) == active(epochs - 1),
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


def _training_set(inputs: Mapping[str, Artifact], terms: list[Loss], section: str, seen: tuple[Any, ...] = ()) -> data.Samples:
    """Return the training split, seen as ``data.samples`` says, with the unlabelled samples behind it if a loss can learn from them."""
    import torch

    from edgekd.kd.losses import UNLABELLED, needs

    found = data.samples(inputs, "train", *seen)
    if bool((found.labels == UNLABELLED).all()):
        for term in terms:
            if "labels" in needs(term.kind):
                what = f"'{term.kind}' needs classes, and the labels of the train split are none (int64 from 0)"
                raise RecipeError(f"{section}: {what}; use 'kl' alone, without [distill.control]")
    if "unlabelled.inputs.0" not in inputs:
        return found
    more = data.samples(inputs, "unlabelled", *seen)
    if not len(more):
        return found
    if "train.outputs" not in inputs:  # a twin takes as many steps as the distilled student, on the samples that it can learn from
        return found.pick(torch.arange(len(found) + len(more)) % len(found))
    return data.joined(found, more) if _learns_unlabelled(terms) else found


def _learns_unlabelled(terms: Sequence[Loss]) -> bool:
    from edgekd.kd.losses import needs

    return any("labels" not in needs(term.kind) for term in terms)


def _entry(text: str) -> Entry:
    return Entry(*text.rsplit(":", 1))
