# SPDX-License-Identifier: Apache-2.0
"""What a student is trained on and towards, from the parameters and inputs of a step of ``distill``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgekd.domain.losses import FROZEN, TAPPED, Loss
from edgekd.domain.recipe import Entry
from edgekd.errors import RecipeError
from edgekd.kd import data, forms, losses, models, views, ways
from edgekd.kd.forms import CLASSES, Form
from edgekd.kd.taps import Network
from edgekd.kd.train import Job, Settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from edgekd.domain.artifact import Artifact


def lesson(params: Mapping[str, Any], inputs: Mapping[str, Artifact], recipe_dir: Path, terms: Sequence[Loss]) -> Job:
    """Return the job of training a student by losses.

    Raises:
        RecipeError: if the user's code cannot be loaded, or the losses need classes that the training split lacks.
    """
    entry = Entry.of(params["model"])
    section = "distill.losses" if "train.outputs" in inputs else "distill.control"
    augment = None if params["augment"] is None else views.load(recipe_dir, Entry.of(params["augment"]))
    mixing = data.Mixing(tuple(params["mixing"]["weights"]), params["mixing"]["by"]) if "mixing" in params else None
    form = Form(params.get("answers", CLASSES), tuple(params.get("heads", ())))
    common: dict[str, Any] = {"mixing": mixing, "form": form, "temperature": _temperature(terms)}
    checkpoints, epochs = params.get("checkpoints", 0), params["epochs"]

    def objective(logits: Tensor, answers: Mapping[str, Tensor | None], labels: Tensor, epoch: int) -> Tensor:
        if form.is_plain:
            return losses.total(terms, logits, answers, labels, epoch)
        split = {name: None if given is None else forms.rows(form, given) for name, given in answers.items()}
        parts = [
            losses.total(terms, found, {name: None if given is None else given[index] for name, given in split.items()}, wanted, epoch)
            for index, (found, wanted) in enumerate(zip(forms.rows(form, logits), forms.label_rows(form, labels), strict=True))
        ]
        return sum(parts[1:], start=parts[0]) / len(parts)

    def view(epoch: int) -> data.Samples:
        turn = epoch * (checkpoints + 1) // epochs
        number = 0 if augment is None else epoch % params["views"]
        checkpoint = turn if turn < checkpoints else None
        return training_set(inputs, terms, section, augment=augment, number=number, checkpoint=checkpoint, **common)

    def teacher() -> Network:
        made = Entry.of(params["teacher"])
        return Network("teacher", models.load_teacher_module(recipe_dir, made, inputs["teacher"].path), made)

    def active(epoch: int) -> list[Loss]:
        return [term for term in terms if term.counts_in(epoch)]

    train = view(epochs - 1)
    if isinstance(train.outputs, data.Sampled):
        _check_sampled(terms, form, train.outputs.shape[1])
    return Job(
        section="distill",
        entry=entry,
        build=lambda: models.student(recipe_dir, entry),
        train=train,
        validation=data.samples(inputs, "validation", **common),
        objective=objective,
        settings=Settings.of(params, ways.of(params, inputs)),
        view=view if augment is not None or checkpoints else None,
        teacher=teacher if "teacher" in params else None,
        tapped=[term for term in terms if term.kind in TAPPED],
        selves=sorted({term.teacher for term in terms} - {FROZEN}),
        form=form,
        is_judged=lambda epoch: active(epoch) == active(epochs - 1),
    )


def training_set(inputs: Mapping[str, Artifact], terms: Sequence[Loss], section: str, **seen: Any) -> data.Samples:
    """Return the training split, seen as ``data.samples`` says, with the unlabelled samples behind it if a loss can learn from them.

    Raises:
        RecipeError: if a loss needs classes and the labels are none.
    """
    import torch

    found = data.samples(inputs, "train", **seen)
    if bool((found.labels == losses.UNLABELLED).all()):
        for term in terms:
            if "labels" in losses.needs(term.kind):
                what = f"'{term.kind}' needs classes, and the labels of the train split are none (int64 from 0)"
                raise RecipeError(f"{section}: {what}; use 'kl' alone, without [distill.control]")
    if "unlabelled.inputs.0" not in inputs:
        return found
    more = data.samples(inputs, "unlabelled", **seen)
    if not len(more):
        return found
    if "train.outputs" not in inputs:  # a twin takes as many steps as the distilled student, on the samples that it can learn from
        return found.pick(torch.arange(len(found) + len(more)) % len(found))
    return data.joined(found, more) if losses.learns_unlabelled(terms) else found


def _temperature(terms: Sequence[Loss]) -> float:
    """Return the temperature at which sampled answers are read: that of the losses that follow them."""
    found = [float(term.options["temperature"]) for term in terms if term.teacher == FROZEN and "temperature" in term.options]
    return found[0] if found else 1.0


def _check_sampled(terms: Sequence[Loss], form: Form, classes: int) -> None:
    """Refuse losses that need more than a sample of each answer.

    Raises:
        RecipeError: that names the loss.
    """
    following = [term for term in terms if "teacher" in losses.needs(term.kind) and term.teacher == FROZEN]
    unfit = [term.kind for term in following if term.kind in {"hard", "mse"} or term.options.get("standardize")]
    several = len({term.options["temperature"] for term in following if "temperature" in term.options}) > 1
    if not unfit and not several and form.is_plain:
        return
    why = f"'{unfit[0]}' needs all logits" if unfit else "several temperatures" if several else "answers that are not one softmax"
    raise RecipeError(f'distill.losses: {why}, and of {classes} classes samples are kept; expected distill.answers_kept = "dense"')
