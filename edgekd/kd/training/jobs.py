# SPDX-License-Identifier: Apache-2.0
"""Training jobs: the module, the data, the objective and the settings of one training, for teacher and student alike."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edgekd.domain.losses import AUTO, FROZEN, LABEL_LOSSES, TAPPED, Loss
from edgekd.domain.recipe import MOST_EPOCHS, EntryPoint
from edgekd.errors import RecipeError
from edgekd.kd import data, losses, modules, output_spec, views
from edgekd.kd.losses.taps import Network
from edgekd.kd.output_spec import MULTICLASS_OUTPUT, OutputSpec
from edgekd.kd.training.execution import DEFAULT_MODE, ExecutionMode, read_execution_mode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.recipe import Distill, Training
    from edgekd.kd.data import Samples
    from edgekd.kd.views import Augment

CHOSEN_FILE, TRAINED_FILE, EPOCHS_FILE = "chosen.json", "trained.safetensors", "epochs.json"  # of a search, and of the limit of epochs


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How to train. The number of threads and of ranks changes the last bits of the weights."""

    epochs: int
    batch_size: int
    optimizer: str
    learning_rate: float
    weight_decay: float
    seed: int
    threads: int
    ranks: int = field(default=1, kw_only=True)
    mode: ExecutionMode = field(default=DEFAULT_MODE, kw_only=True)

    @classmethod
    def from_recipe(cls, options: Distill | Training, world: Mapping[str, int], mode: ExecutionMode) -> TrainingSettings:
        """Return the settings of ``[distill]`` or ``[teacher.train]``; ``world`` is from ``distributed.world``."""
        return cls(
            MOST_EPOCHS if options.epochs == AUTO else options.epochs,
            options.batch_size,
            options.optimizer,
            options.learning_rate,
            options.weight_decay,
            options.seed,
            mode=mode,
            **world,
        )

    def with_mode(self, inputs: Mapping[str, Artifact]) -> TrainingSettings:
        """Return the settings with the execution mode that autotune chose, if the step has that as an input."""
        return replace(self, mode=read_execution_mode(inputs["execution_mode"])) if "execution_mode" in inputs else self


@dataclass(frozen=True, slots=True)
class StudentParams:
    """The parameters of a step that trains a student: all that may change its weights, beside the inputs.

    ``model``, ``augment`` and ``teacher`` (for losses with taps) are entry points. ``checkpoints`` is how many earlier
    checkpoints of the teacher teach before it does.
    """

    model: str
    losses: tuple[Loss, ...]
    settings: TrainingSettings
    instruction_set: str
    output: OutputSpec = MULTICLASS_OUTPUT
    augment: str | None = None
    views: int | None = None
    mixup: float | None = None
    ensemble: data.Ensemble | None = None
    checkpoints: int = 0
    teacher: str | None = None


@dataclass(frozen=True, slots=True)
class SearchParams:
    """The parameters of a search.

    ``share``: the epochs of all trials together, as a share of the student's; ``labels_only``: a student without a teacher is tried too.
    """

    student: StudentParams
    share: float
    labels_only: bool


@dataclass(frozen=True, slots=True)
class EpochLimitParams:
    """The parameters of the step that limits the epochs; a limit that is None is none.

    ``reference`` is the teacher's entry point, None for a file that is a whole model; ``search_share`` is 0 without a search.
    """

    student: StudentParams
    minutes: float | None
    search_share: float
    inferences: int | None
    reference: str | None


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """What is trained, on what data, towards which objective.

    ``section`` is the recipe's, for messages. ``build`` makes the module with fresh weights. ``objective`` maps
    (logits, the logits of each teacher or None, labels, epoch) to the loss. ``augment`` maps (inputs, generator) to inputs, batch
    by batch. ``view`` maps an epoch to its view of the training set, with the teacher's logits for that view.
    ``teacher`` loads the teacher for the ``tapped`` losses. ``auxiliary`` names the copies of the student that teach it
    (``ema``, ``last_epoch``).
    """

    section: str
    entry: EntryPoint
    build: Callable[[], nn.Module]
    train: Samples
    validation: Samples
    objective: Callable[[Tensor, Mapping[str, Tensor | None], Tensor, int], Tensor]
    settings: TrainingSettings
    augment: Augment | None = None
    view: Callable[[int], Samples] | None = None
    teacher: Callable[[], Network] | None = None
    tapped: Sequence[Loss] = ()
    auxiliary: Sequence[str] = ()
    output: OutputSpec = MULTICLASS_OUTPUT


@dataclass(frozen=True, slots=True)
class EpochResult:
    """One line of the curve; ``learning_rate`` is the last step's, accuracies are None without classes.

    ``train_accuracy`` is that of the logits that were trained on: as the weights were at each step, dropout and views included.
    """

    epoch: int
    train_loss: float
    train_accuracy: float | None
    validation_loss: float
    validation_accuracy: float | None
    learning_rate: float


def student_job(params: StudentParams, inputs: Mapping[str, Artifact], recipe_dir: Path) -> TrainingJob:
    """Return the job of training a student by its losses, none of which has an ``auto``.

    Raises:
        RecipeError: if the user's code cannot be loaded, or the losses need classes that the training split lacks.
    """
    entry, settings = EntryPoint.parse(params.model), params.settings.with_mode(inputs)
    teacher = None if params.teacher is None else EntryPoint.parse(params.teacher)
    options = views.view_options(recipe_dir, params.augment, params.mixup)
    section = "distill.losses" if "train.soft_targets" in inputs else "distill.baselines"
    common: dict[str, Any] = {"ensemble": params.ensemble, "output": params.output, "temperature": _temperature(params.losses)}

    def view(epoch: int) -> data.Samples:
        turn = epoch * (params.checkpoints + 1) // settings.epochs
        number = 0 if params.views is None else epoch % params.views
        checkpoint = turn if turn < params.checkpoints else None
        return training_set(inputs, params.losses, section, view=options, number=number, checkpoint=checkpoint, **common)

    def load_teacher(entry: EntryPoint) -> Network:
        return Network("teacher", modules.load_frozen_module(recipe_dir, entry, inputs["teacher"].path), entry)

    train = view(settings.epochs - 1)
    if isinstance(train.teacher_logits, data.SampledSoftTargets):
        _check_sampled(params.losses, params.output, train.teacher_logits.shape[1])
    return TrainingJob(
        section="distill",
        entry=entry,
        build=lambda: modules.build_module(recipe_dir, entry),
        train=train,
        validation=data.load_split(inputs, "validation", **common),
        objective=student_objective(params.losses, params.output),
        settings=settings,
        view=view if params.views is not None or params.checkpoints else None,
        teacher=None if teacher is None else lambda: load_teacher(teacher),
        tapped=[loss for loss in params.losses if loss.kind in TAPPED],
        auxiliary=sorted({loss.teacher for loss in params.losses} - {FROZEN}),
        output=params.output,
    )


def without_unread_teacher(
    params: StudentParams, inputs: Mapping[str, Artifact], recipe_losses: Sequence[Loss]
) -> tuple[StudentParams, Mapping[str, Artifact]]:
    """Return parameters and inputs without a teacher, if none of the losses has one: exactly those of a baseline.

    ``recipe_losses``: what would be trained with a teacher; it decides on the number of steps.
    """
    if any(loss.kind not in LABEL_LOSSES for loss in params.losses):
        return params, inputs
    dropped = [".soft_targets", *([] if losses.learns_unlabelled(recipe_losses) else ["unlabelled."])]
    remaining = {name: artifact for name, artifact in inputs.items() if not any(part in name for part in dropped)}
    return replace(params, ensemble=None, checkpoints=0, teacher=None), remaining


def student_objective(terms: Sequence[Loss], output: OutputSpec) -> Callable[[Tensor, Mapping[str, Tensor | None], Tensor, int], Tensor]:
    """Return the objective of the losses of logits; several heads count alike."""

    def objective(logits: Tensor, teacher_logits: Mapping[str, Tensor | None], labels: Tensor, epoch: int) -> Tensor:
        if output.is_single_softmax:
            return losses.total_loss(terms, logits, teacher_logits, labels, epoch)
        by_teacher = {name: None if tensor is None else output_spec.logit_rows(output, tensor) for name, tensor in teacher_logits.items()}
        heads = zip(output_spec.logit_rows(output, logits), output_spec.label_rows(output, labels), strict=True)
        parts = [
            losses.total_loss(
                terms, rows, {name: None if tensors is None else tensors[head] for name, tensors in by_teacher.items()}, head_labels, epoch
            )
            for head, (rows, head_labels) in enumerate(heads)
        ]
        return sum(parts[1:], start=parts[0]) / len(parts)

    return objective


def training_set(inputs: Mapping[str, Artifact], terms: Sequence[Loss], section: str, **options: Any) -> data.Samples:
    """Return the training split, followed by the unlabelled samples if a loss can learn from them.

    Args:
        inputs: The artifacts of the step.
        terms: The losses.
        section: The recipe's, for messages.
        options: Those of ``data.load_split``.

    Raises:
        RecipeError: if a loss needs classes and no sample has one.
    """
    import torch

    train = data.load_split(inputs, "train", **options)
    if bool((train.labels == losses.UNLABELLED).all()):
        for term in terms:
            if "labels" in losses.loss_inputs(term.kind):
                what = f"'{term.kind}' needs classes, and the train split has no class labels (int64 from 0)"
                raise RecipeError(f"{section}: {what}; use 'kl' alone, without distill.baselines")
    if "unlabelled.inputs.0" not in inputs:
        return train
    unlabelled = data.load_split(inputs, "unlabelled", **options)
    if not len(unlabelled):
        return train
    if "train.soft_targets" not in inputs:  # a baseline takes as many steps as the distilled student, on the samples that it can learn from
        return train.pick(torch.arange(len(train) + len(unlabelled)) % len(train))
    return data.concatenate(train, unlabelled) if losses.learns_unlabelled(terms) else train


def _temperature(terms: Sequence[Loss]) -> float:
    """Return the temperature at which sampled soft targets are read: that of the losses that follow them."""
    values = [float(term.options["temperature"]) for term in terms if term.teacher == FROZEN and "temperature" in term.options]
    return values[0] if values else 1.0


def _check_sampled(terms: Sequence[Loss], output: OutputSpec, classes: int) -> None:
    """Refuse losses that need all logits of a sample.

    Raises:
        RecipeError: that names the loss.
    """
    following = [term for term in terms if "teacher" in losses.loss_inputs(term.kind) and term.teacher == FROZEN]
    unfit = [term.kind for term in following if term.kind in {"hard", "mse"} or term.options.get("standardize")]
    several = len({term.options["temperature"] for term in following if "temperature" in term.options}) > 1
    if not unfit and not several and output.is_single_softmax:
        return
    why = f"'{unfit[0]}' needs all logits" if unfit else "several temperatures" if several else "outputs that are not one softmax"
    raise RecipeError(
        f"distill.losses: {why}, and soft targets of {classes} classes are stored as samples; "
        'expected distill.soft_target_storage = "dense"'
    )
