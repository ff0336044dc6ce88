# SPDX-License-Identifier: Apache-2.0
"""What a student is trained on and towards, from the parameters and inputs of a step of ``distill``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgekd.domain.losses import FROZEN, TAPPED, Loss
from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError
from edgekd.kd import data, losses, modules, output_spec, views
from edgekd.kd.losses.taps import Network
from edgekd.kd.output_spec import MULTICLASS, OutputSpec
from edgekd.kd.training import execution
from edgekd.kd.training.loop import TrainingJob, TrainingSettings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from edgekd.domain.artifact import Artifact


def training_job(params: Mapping[str, Any], inputs: Mapping[str, Artifact], recipe_dir: Path, terms: Sequence[Loss]) -> TrainingJob:
    """Return the job of training a student by losses.

    Raises:
        RecipeError: if the user's code cannot be loaded, or the losses need classes that the training split lacks.
    """
    entry = EntryPoint.parse(params["model"])
    section = "distill.losses" if "train.outputs" in inputs else "distill.baselines"
    augment = None if params["augment"] is None else views.load_augmentation(recipe_dir, EntryPoint.parse(params["augment"]))
    ensemble = data.Ensemble(tuple(params["ensemble"]["weights"]), params["ensemble"]["weighting"]) if "ensemble" in params else None
    form = OutputSpec(params.get("task", MULTICLASS), tuple(params.get("heads", ())))
    common: dict[str, Any] = {"ensemble": ensemble, "form": form, "temperature": _temperature(terms)}
    checkpoints, epochs = params.get("checkpoints", 0), params["epochs"]

    def objective(logits: Tensor, answers: Mapping[str, Tensor | None], labels: Tensor, epoch: int) -> Tensor:
        if form.is_single_softmax:
            return losses.total_loss(terms, logits, answers, labels, epoch)
        split = {name: None if given is None else output_spec.logit_rows(form, given) for name, given in answers.items()}
        parts = [
            losses.total_loss(terms, found, {name: None if given is None else given[index] for name, given in split.items()}, wanted, epoch)
            for index, (found, wanted) in enumerate(
                zip(output_spec.logit_rows(form, logits), output_spec.label_rows(form, labels), strict=True)
            )
        ]
        return sum(parts[1:], start=parts[0]) / len(parts)

    def view(epoch: int) -> data.Samples:
        turn = epoch * (checkpoints + 1) // epochs
        number = 0 if augment is None else epoch % params["views"]
        checkpoint = turn if turn < checkpoints else None
        return training_set(inputs, terms, section, augment=augment, number=number, checkpoint=checkpoint, **common)

    def teacher() -> Network:
        made = EntryPoint.parse(params["teacher"])
        return Network("teacher", modules.load_frozen_module(recipe_dir, made, inputs["teacher"].path), made)

    def active(epoch: int) -> list[Loss]:
        return [term for term in terms if term.counts_in(epoch)]

    train = view(epochs - 1)
    if isinstance(train.outputs, data.SampledSoftTargets):
        _check_sampled(terms, form, train.outputs.shape[1])
    return TrainingJob(
        section="distill",
        entry=entry,
        build=lambda: modules.build_module(recipe_dir, entry),
        train=train,
        validation=data.load_split(inputs, "validation", **common),
        objective=objective,
        settings=TrainingSettings.from_params(params, execution.execution_mode_of(params, inputs)),
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

    found = data.load_split(inputs, "train", **seen)
    if bool((found.labels == losses.UNLABELLED).all()):
        for term in terms:
            if "labels" in losses.loss_inputs(term.kind):
                what = f"'{term.kind}' needs classes, and the labels of the train split are none (int64 from 0)"
                raise RecipeError(f"{section}: {what}; use 'kl' alone, without [distill.baselines]")
    if "unlabelled.inputs.0" not in inputs:
        return found
    more = data.load_split(inputs, "unlabelled", **seen)
    if not len(more):
        return found
    if "train.outputs" not in inputs:  # a twin takes as many steps as the distilled student, on the samples that it can learn from
        return found.pick(torch.arange(len(found) + len(more)) % len(found))
    return data.concatenate(found, more) if losses.learns_unlabelled(terms) else found


def _temperature(terms: Sequence[Loss]) -> float:
    """Return the temperature at which sampled answers are read: that of the losses that follow them."""
    found = [float(term.options["temperature"]) for term in terms if term.teacher == FROZEN and "temperature" in term.options]
    return found[0] if found else 1.0


def _check_sampled(terms: Sequence[Loss], form: OutputSpec, classes: int) -> None:
    """Refuse losses that need more than a sample of each answer.

    Raises:
        RecipeError: that names the loss.
    """
    following = [term for term in terms if "teacher" in losses.loss_inputs(term.kind) and term.teacher == FROZEN]
    unfit = [term.kind for term in following if term.kind in {"hard", "mse"} or term.options.get("standardize")]
    several = len({term.options["temperature"] for term in following if "temperature" in term.options}) > 1
    if not unfit and not several and form.is_single_softmax:
        return
    why = f"'{unfit[0]}' needs all logits" if unfit else "several temperatures" if several else "answers that are not one softmax"
    raise RecipeError(f'distill.losses: {why}, and of {classes} classes samples are kept; expected distill.soft_target_storage = "dense"')
