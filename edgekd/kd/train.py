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
from edgekd.kd import ranks
from edgekd.kd.beside import Beside, beside
from edgekd.kd.forms import PLAIN, Form, counted
from edgekd.kd.repeatable import derive, keep, kept, repeatable, seed_all
from edgekd.kd.trial import laid_out, layout_for, moved, placed
from edgekd.kd.ways import FLOAT32, USUAL, Way, call

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from edgekd.domain.losses import Loss
    from edgekd.domain.recipe import Entry
    from edgekd.kd.data import Samples
    from edgekd.kd.taps import Network
    from edgekd.kd.views import Augment
    from edgekd.ports import Progress

CHECKPOINT = "checkpoint"
_WARM_UP, _START, _END = 0.3, 1 / 25, 1 / 250_000  # share of the steps; learning rates as shares of the peak
_TOLD = 20  # times an epoch tells how far it is


@dataclass(frozen=True, slots=True)
class Settings:
    """How to train; ``threads`` and the processor change the last bits of the weights."""

    epochs: int
    batch_size: int
    optimizer: str
    learning_rate: float
    weight_decay: float
    seed: int
    threads: int
    way: Way = USUAL

    @classmethod
    def of(cls, params: Mapping[str, Any], way: Way) -> Settings:
        """Return the settings of a step, which is trained in a way."""
        return cls(**{name: params[name] for name in cls.__slots__ if name != "way"}, way=way)


@dataclass(frozen=True, slots=True)
class Job:
    """What is trained, on what, towards what.

    ``section`` is the recipe's, for messages. ``build`` makes the module with fresh weights. ``objective`` maps
    (logits, each teacher's answers or None, labels, epoch) to the loss. ``augment`` maps (inputs, generator) to inputs, batch
    by batch; ``view`` maps an epoch to the training set as it is seen then, with the teacher's outputs for that.
    ``teacher`` makes the teacher whose insides the ``tapped`` losses follow; ``selves`` are those of the student that teach
    it. ``form`` says what the answers are. ``is_judged`` says whether an epoch's weights may be kept: whether its loss is the
    one that is meant in the end.
    """

    section: str
    entry: Entry
    build: Callable[[], nn.Module]
    train: Samples
    validation: Samples
    objective: Callable[[Tensor, Mapping[str, Tensor | None], Tensor, int], Tensor]
    settings: Settings
    augment: Augment | None = None
    view: Callable[[int], Samples] | None = None
    teacher: Callable[[], Network] | None = None
    tapped: Sequence[Loss] = ()
    selves: Sequence[str] = ()
    form: Form = PLAIN
    is_judged: Callable[[int], bool] = lambda _: True


@dataclass(frozen=True, slots=True)
class Epoch:
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
    curve: list[Epoch]
    best: dict[str, Tensor]
    beside: Beside


def fit(
    job: Job, work: Path, progress: Progress, after_epoch: Callable[[Epoch, nn.Module], None] | None = None
) -> tuple[dict[str, Tensor], list[Epoch]]:
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
    with repeatable(settings.threads, settings.way.accelerator):
        layout = layout_for(job)
        run = _resumed(job, layout, work) or _fresh(job, layout)
        for epoch in range(len(run.curve), settings.epochs):
            seed_all(derive(settings.seed, "epoch", epoch, *([ranks.own()] if ranks.own() else [])))
            train_loss, train_accuracy = _train_epoch(job, run, layout, epoch, progress)
            ranks.average_buffers([run.module, *run.beside.selves.values()])
            loss, accuracy = _score(job, run, layout, epoch)
            _check_finite(job, loss, f"on the validation split after epoch {epoch + 1}")
            line = Epoch(epoch + 1, train_loss, train_accuracy, loss, accuracy, run.optimizer.param_groups[0]["lr"], job.is_judged(epoch))
            if not run.curve or line.rank > max(earlier.rank for earlier in run.curve):
                run.best = {name: value.detach().clone() for name, value in run.module.state_dict().items()}
            run.curve.append(line)
            run.beside.after_epoch(run.module)
            if after_epoch is not None:
                after_epoch(line, run.module)
            if ranks.own() == 0:
                _save(run, work)
            progress((epoch + 1) / settings.epochs, _told(line, settings.epochs))
    return {name: value.cpu() for name, value in run.best.items()}, run.curve


def rehearsal(job: Job) -> Callable[[], object]:
    """Return what trains one epoch of a job each time it is called, and keeps nothing: to be timed, within ``repeatable``."""
    layout = layout_for(job)
    run = _fresh(job, layout)
    return lambda: _train_epoch(job, run, layout, 0, lambda _share, _text: None)


def best_of(curve: list[Epoch]) -> Epoch:
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


def _train_epoch(job: Job, run: Run, layout: torch.memory_format, epoch: int, progress: Progress) -> tuple[float, float | None]:
    """Train one epoch and return the mean loss of its samples, and the accuracy on those that have a class."""
    import torch

    settings, module, optimizer = job.settings, run.module.train(), run.optimizer
    shuffling = torch.Generator().manual_seed(derive(settings.seed, "shuffle", epoch))
    augmenting = torch.Generator().manual_seed(derive(settings.seed, "augment", epoch))
    samples = job.train if job.view is None else job.view(epoch)
    batches = _batches(torch.randperm(len(samples), generator=shuffling), settings.batch_size)
    summed, right, labelled = 0.0, 0, 0
    for step, rows in enumerate(batches):
        batch = samples.pick(rows)
        inputs = batch.inputs if job.augment is None else job.augment(batch.inputs, augmenting)
        rate = one_cycle(epoch * len(batches) + step, settings.epochs * len(batches), settings.learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, value, logits = _seen(job, run, batch, laid_out(inputs, layout, settings.way), epoch)
        optimizer.zero_grad(set_to_none=True)
        usercode.call(loss.backward, job.entry)
        ranks.sum_gradients(parameter for group in optimizer.param_groups for parameter in group["params"])
        optimizer.step()
        run.beside.after_step(module)
        _check_finite(job, value, f"in epoch {epoch + 1}, step {step + 1} of {len(batches)}")
        summed += value * len(rows)
        right, labelled = (sum(pair) for pair in zip((right, labelled), counted(job.form, logits, batch.labels), strict=True))
        if step % max(1, len(batches) // _TOLD) == 0:
            progress((epoch + step / len(batches)) / settings.epochs, f"epoch {epoch + 1}/{settings.epochs}, loss {value:.3f}")
    return summed / len(samples), right / labelled if labelled else None


def _score(job: Job, run: Run, layout: torch.memory_format, epoch: int) -> tuple[float, float | None]:
    """Return loss and accuracy on the validation split; accuracy is None if no sample has a class."""
    import torch

    run.module.eval()
    summed, right, labelled = 0.0, 0, 0
    with torch.inference_mode():
        for rows in _batches(torch.arange(len(job.validation)), job.settings.batch_size):
            batch = job.validation.pick(rows)
            _, value, logits = _seen(job, run, batch, laid_out(batch.inputs, layout, job.settings.way), epoch)
            summed += value * len(rows)
            right, labelled = (sum(pair) for pair in zip((right, labelled), counted(job.form, logits, batch.labels), strict=True))
    return summed / len(job.validation), right / labelled if labelled else None


def _seen(job: Job, run: Run, batch: Samples, inputs: Sequence[Tensor], epoch: int) -> tuple[Tensor, float, Tensor]:
    """Return the loss of a batch (its gradient is this rank's part), its value, and the logits. ``inputs``: the batch's, or its view's."""
    own, sizes = ranks.share(len(batch)), ranks.sizes(len(batch))
    way = job.settings.way if run.module.training else replace(job.settings.way, precision=FLOAT32)  # what ships is float32
    given = [item[own] for item in inputs]
    if not len(given[0]):
        raise RecipeError(f"{job.section}: a batch of {len(batch)} is too small for {ranks.count()} ranks; raise {job.section}.batch_size")
    logits = ranks.whole(call(run.module, job.entry, given, way), sizes)
    outputs, labels = moved(batch, way)
    answers = run.beside.answers(given, outputs, epoch)
    for name in run.beside.selves:
        answers[name] = None if (found := answers[name]) is None else ranks.whole(found, sizes)
    loss = job.objective(logits, answers, labels, epoch)
    tapped = run.beside.loss(given, epoch) * (len(given[0]) / len(batch))  # the means of the ranks' samples, weighted by their number
    return loss + tapped, loss.item() + ranks.summed(float(tapped)), logits.detach().cpu()


def _batches(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    """Return rows in batches of at most ``size``, as equal as they can be: no tiny last one to upset batch norm."""
    return rows.tensor_split(math.ceil(len(rows) / size))


def _check_finite(job: Job, loss: float, where: str) -> None:
    if not math.isfinite(loss):
        rate = job.settings.learning_rate
        raise StageError(
            f"{job.section}: the loss is {loss} {where}; lower {job.section}.learning_rate (now {rate:g}), or check the scale of the inputs"
        )


def _fresh(job: Job, layout: torch.memory_format) -> Run:
    seed_all(derive(job.settings.seed, "init"))
    module = placed(job, layout)
    guides = beside(job, module, layout)
    return Run(module, _optimizer([*module.parameters(), *guides.parameters()], job.settings), [], {}, guides)


def _optimizer(given: Sequence[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
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
        "beside": run.beside.state(),
    }
    packed = io.BytesIO()
    torch.save(state, packed)
    keep(work / CHECKPOINT, packed.getvalue())


def _resumed(job: Job, layout: torch.memory_format, work: Path) -> Run | None:
    """Return the run that a checkpoint holds, or None if there is none that is undamaged."""
    import torch

    packed = kept(work / CHECKPOINT)
    if packed is None:
        return None
    state = torch.load(io.BytesIO(packed), weights_only=True, map_location="cpu")
    run = _fresh(job, layout)
    run.module.load_state_dict(state["module"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.beside.load(state["beside"])
    return Run(run.module, run.optimizer, [Epoch(**line) for line in state["curve"]], state["best"], run.beside)


def _told(line: Epoch, epochs: int) -> str:
    right = "" if line.validation_accuracy is None else f", {100 * line.validation_accuracy:.2f} %"
    return f"epoch {line.epoch}/{epochs}, validation loss {line.validation_loss:.3f}{right}"
