# SPDX-License-Identifier: Apache-2.0
"""The training loop, for a teacher that is taught (labels) and a student that is distilled (the teacher's outputs too).

The same job gives the same bytes, also if it is killed and started again: each epoch draws from generators seeded by
(seed, epoch) alone, the learning rate is a function of the step, and a checkpoint after each epoch holds the rest.
"""

from __future__ import annotations

import io
import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from edgekd import usercode
from edgekd.errors import RecipeError, StageError
from edgekd.kd.output_spec import MULTICLASS_OUTPUT, OutputSpec, count_correct
from edgekd.kd.reproducible import derive_seed, deterministic, load_verified, save_verified, seed_all
from edgekd.kd.training import distributed
from edgekd.kd.training.auxiliary import AuxiliaryModels, auxiliary_models
from edgekd.kd.training.dry_run import build_on_device, choose_memory_format, inputs_to_device, targets_to_device
from edgekd.kd.training.execution import DEFAULT, FLOAT32, ExecutionMode, forward

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from edgekd.domain.losses import Loss
    from edgekd.domain.recipe import EntryPoint
    from edgekd.kd.data import Samples
    from edgekd.kd.losses.taps import Network
    from edgekd.kd.views import Augment
    from edgekd.ports import Progress

CHECKPOINT = "checkpoint"
_WARM_UP, _START, _END = 0.3, 1 / 25, 1 / 250_000  # share of the steps; learning rates as shares of the peak
_TOLD = 20  # times an epoch tells how far it is


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How to train; ``threads`` and the processor change the last bits of the weights."""

    epochs: int
    batch_size: int
    optimizer: str
    learning_rate: float
    weight_decay: float
    seed: int
    threads: int
    mode: ExecutionMode = DEFAULT

    @classmethod
    def from_params(cls, params: Mapping[str, Any], mode: ExecutionMode) -> TrainingSettings:
        """Return the settings of a step, which is trained in a way."""
        return cls(**{name: params[name] for name in cls.__slots__ if name != "mode"}, mode=mode)


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """What is trained, on what, towards what.

    ``section`` is the recipe's, for messages. ``build`` makes the module with fresh weights. ``objective`` maps
    (logits, each teacher's answers or None, labels, epoch) to the loss. ``augment`` maps (inputs, generator) to inputs, batch
    by batch; ``view`` maps an epoch to the training set as it is seen then, with the teacher's outputs for that.
    ``teacher`` makes the teacher whose insides the ``tapped`` losses follow; ``selves`` are those of the student that teach
    it. ``form`` says what the answers are. ``is_judged`` says whether an epoch's weights may be kept: whether its loss is the
    one that is meant in the end.
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
    selves: Sequence[str] = ()
    form: OutputSpec = MULTICLASS_OUTPUT
    is_judged: Callable[[int], bool] = lambda _: True


@dataclass(frozen=True, slots=True)
class EpochResult:
    """One line of the curve; ``learning_rate`` is the last step's, accuracies are None without classes.

    ``train_accuracy`` is that of the answers that were trained on: as the weights were at each step, dropout and views included.
    """

    epoch: int
    train_loss: float
    train_accuracy: float | None
    validation_loss: float
    validation_accuracy: float | None
    learning_rate: float
    judged: bool = True

    @property
    def rank(self) -> tuple[bool, float, float]:
        """Return what the epochs are compared by: accuracy, then the lower loss, both on the validation split."""
        return (self.judged, 0.0 if self.validation_accuracy is None else self.validation_accuracy, -self.validation_loss)


@dataclass(slots=True)
class Run:
    """A run between two epochs: what a checkpoint holds. ``best`` are the weights of the best epoch."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    curve: list[EpochResult]
    best: dict[str, Tensor]
    auxiliary: AuxiliaryModels


def fit(
    job: TrainingJob, work: Path, progress: Progress, after_epoch: Callable[[EpochResult, nn.Module], None] | None = None
) -> tuple[dict[str, Tensor], list[EpochResult]]:
    """Train and return the weights of the best epoch (the first of equals) and the curve.

    Args:
        job: What is trained.
        work: Where the checkpoint lies; it belongs to this job alone.
        progress: Is told how far it is.
        after_epoch: Is given the line of each finished epoch, and the module as it is then, before it is checkpointed.

    Raises:
        RecipeError: if the module cannot be trained on these samples, or its code fails.
        StageError: if the loss is not finite.
    """
    settings = job.settings
    with deterministic(settings.threads, settings.mode.accelerator):
        layout = choose_memory_format(job)
        run = _resumed(job, layout, work) or _fresh(job, layout)
        for epoch in range(len(run.curve), settings.epochs):
            seed_all(derive_seed(settings.seed, "epoch", epoch, *([distributed.rank()] if distributed.rank() else [])))
            train_loss, train_accuracy = _train_epoch(job, run, layout, epoch, progress)
            distributed.average_buffers([run.module, *run.auxiliary.selves.values()])
            loss, accuracy = _score(job, run, layout, epoch)
            _check_finite(job, loss, f"on the validation split after epoch {epoch + 1}")
            line = EpochResult(
                epoch + 1, train_loss, train_accuracy, loss, accuracy, run.optimizer.param_groups[0]["lr"], job.is_judged(epoch)
            )
            if not run.curve or line.rank > max(earlier.rank for earlier in run.curve):
                run.best = {name: value.detach().clone() for name, value in run.module.state_dict().items()}
            run.curve.append(line)
            run.auxiliary.after_epoch(run.module)
            if after_epoch is not None:
                after_epoch(line, run.module)
            if distributed.rank() == 0:
                _save(run, work)
            progress((epoch + 1) / settings.epochs, _told(line, settings.epochs))
    return {name: value.cpu() for name, value in run.best.items()}, run.curve


def epoch_runner(job: TrainingJob) -> Callable[[], object]:
    """Return what trains one epoch of a job each time it is called, and keeps nothing: to be timed, within ``repeatable``."""
    layout = choose_memory_format(job)
    run = _fresh(job, layout)
    return lambda: _train_epoch(job, run, layout, 0, lambda _share, _text: None)


def best_epoch(curve: list[EpochResult]) -> EpochResult:
    """Return the epoch whose weights were kept."""
    return max(curve, key=lambda line: line.rank)  # max returns the first of equals, as fit keeps it


def one_cycle(step: int, steps: int, peak: float) -> float:
    """Return the learning rate of a step: half a cosine up to the peak, half a cosine down to nearly nothing.

    Source:
        Smith and Topin, arXiv 1708.07120; shares as torch's OneCycleLR has them by default.
    """
    top = _WARM_UP * steps
    if step < top:
        low, share = _START, 1 - step / top
    else:
        low, share = _END, (step - top) / max(steps - top, 1)
    return peak * (low + (1 - low) * (1 + math.cos(math.pi * share)) / 2)


def _train_epoch(job: TrainingJob, run: Run, layout: torch.memory_format, epoch: int, progress: Progress) -> tuple[float, float | None]:
    """Train one epoch and return the mean loss of its samples, and the accuracy on those that have a class."""
    import torch

    settings, module, optimizer = job.settings, run.module.train(), run.optimizer
    shuffling = torch.Generator().manual_seed(derive_seed(settings.seed, "shuffle", epoch))
    augmenting = torch.Generator().manual_seed(derive_seed(settings.seed, "augment", epoch))
    samples = job.train if job.view is None else job.view(epoch)
    batches = _batches(torch.randperm(len(samples), generator=shuffling), settings.batch_size)
    summed, right, labelled = 0.0, 0, 0
    for step, rows in enumerate(batches):
        batch = samples.pick(rows)
        inputs = batch.inputs if job.augment is None else job.augment(batch.inputs, augmenting)
        rate = one_cycle(epoch * len(batches) + step, settings.epochs * len(batches), settings.learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, value, logits = _seen(job, run, batch, inputs_to_device(inputs, layout, settings.mode), epoch)
        optimizer.zero_grad(set_to_none=True)
        usercode.call_user_code(loss.backward, job.entry)
        distributed.all_reduce_gradients(parameter for group in optimizer.param_groups for parameter in group["params"])
        optimizer.step()
        run.auxiliary.after_step(module)
        _check_finite(job, value, f"in epoch {epoch + 1}, step {step + 1} of {len(batches)}")
        summed += value * len(rows)
        right, labelled = (sum(pair) for pair in zip((right, labelled), count_correct(job.form, logits, batch.labels), strict=True))
        if step % max(1, len(batches) // _TOLD) == 0:
            progress((epoch + step / len(batches)) / settings.epochs, f"epoch {epoch + 1}/{settings.epochs}, loss {value:.3f}")
    return summed / len(samples), right / labelled if labelled else None


def _score(job: TrainingJob, run: Run, layout: torch.memory_format, epoch: int) -> tuple[float, float | None]:
    """Return loss and accuracy on the validation split; accuracy is None if no sample has a class."""
    import torch

    run.module.eval()
    summed, right, labelled = 0.0, 0, 0
    with torch.inference_mode():
        for rows in _batches(torch.arange(len(job.validation)), job.settings.batch_size):
            batch = job.validation.pick(rows)
            _, value, logits = _seen(job, run, batch, inputs_to_device(batch.inputs, layout, job.settings.mode), epoch)
            summed += value * len(rows)
            right, labelled = (sum(pair) for pair in zip((right, labelled), count_correct(job.form, logits, batch.labels), strict=True))
    return summed / len(job.validation), right / labelled if labelled else None


def _seen(job: TrainingJob, run: Run, batch: Samples, inputs: Sequence[Tensor], epoch: int) -> tuple[Tensor, float, Tensor]:
    """Return the loss of a batch (its gradient is this rank's part), its value, and the logits. ``inputs``: the batch's, or its view's."""
    own, sizes = distributed.shard(len(batch)), distributed.shard_sizes(len(batch))
    mode = job.settings.mode if run.module.training else replace(job.settings.mode, precision=FLOAT32)  # what ships is float32
    given = [item[own] for item in inputs]
    if not len(given[0]):
        raise RecipeError(
            f"{job.section}: a batch of {len(batch)} is too small for {distributed.world_size()} ranks; raise {job.section}.batch_size"
        )
    logits = distributed.all_gather(forward(run.module, job.entry, given, mode), sizes)
    outputs, labels = targets_to_device(batch, mode)
    answers = run.auxiliary.answers(given, outputs, epoch)
    for name in run.auxiliary.selves:
        answers[name] = None if (found := answers[name]) is None else distributed.all_gather(found, sizes)
    loss = job.objective(logits, answers, labels, epoch)
    tapped = run.auxiliary.loss(given, epoch) * (len(given[0]) / len(batch))  # the means of the ranks' samples, weighted by their number
    return loss + tapped, loss.item() + distributed.all_reduce(float(tapped)), logits.detach().cpu()


def _batches(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    """Return rows in batches of at most ``size``, as equal as they can be: no tiny last one to upset batch norm."""
    return rows.tensor_split(math.ceil(len(rows) / size))


def _check_finite(job: TrainingJob, loss: float, where: str) -> None:
    if not math.isfinite(loss):
        rate = job.settings.learning_rate
        raise StageError(
            f"{job.section}: the loss is {loss} {where}; lower {job.section}.learning_rate (now {rate:g}), or check the scale of the inputs"
        )


def _fresh(job: TrainingJob, layout: torch.memory_format) -> Run:
    seed_all(derive_seed(job.settings.seed, "init"))
    module = build_on_device(job, layout)
    guides = auxiliary_models(job, module, layout)
    return Run(module, _optimizer([*module.parameters(), *guides.parameters()], job.settings), [], {}, guides)


def _optimizer(given: Sequence[nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    import torch

    parameters = [parameter for parameter in given if parameter.requires_grad]
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, rate, momentum=0.9, nesterov=True, weight_decay=decay, fused=True)
    return torch.optim.AdamW(parameters, rate, weight_decay=decay, fused=True)


def _save(run: Run, work: Path) -> None:
    import torch

    state = {
        "module": run.module.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "curve": [asdict(line) for line in run.curve],
        "best": run.best,
        "auxiliary": run.auxiliary.state(),
    }
    packed = io.BytesIO()
    torch.save(state, packed)
    save_verified(work / CHECKPOINT, packed.getvalue())


def _resumed(job: TrainingJob, layout: torch.memory_format, work: Path) -> Run | None:
    """Return the run that a checkpoint holds, or None if there is none that is undamaged."""
    import torch

    packed = load_verified(work / CHECKPOINT)
    if packed is None:
        return None
    state = torch.load(io.BytesIO(packed), weights_only=True, map_location="cpu")
    run = _fresh(job, layout)
    run.module.load_state_dict(state["module"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.auxiliary.load(state["auxiliary"])
    return Run(run.module, run.optimizer, [EpochResult(**line) for line in state["curve"]], state["best"], run.auxiliary)


def _told(line: EpochResult, epochs: int) -> str:
    right = "" if line.validation_accuracy is None else f", {100 * line.validation_accuracy:.2f} %"
    return f"epoch {line.epoch}/{epochs}, validation loss {line.validation_loss:.3f}{right}"
