# SPDX-License-Identifier: Apache-2.0
"""The trainer: owns module, optimizer and schedule, and trains one job; teacher, student, baselines and search all use it.

Source:
    One-cycle learning rate: Smith and Topin, arXiv 1708.07120, with cosine annealing.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edgekd import usercode
from edgekd.domain.losses import TEACHERS
from edgekd.errors import RecipeError, StageError
from edgekd.kd.output_spec import count_correct
from edgekd.kd.reproducible import derive_seed, deterministic, seed_all
from edgekd.kd.training import distributed
from edgekd.kd.training.callbacks import Checkpoint, job_callbacks
from edgekd.kd.training.dry_run import choose_memory_format
from edgekd.kd.training.execution import FLOAT32, forward, inputs_to_device, module_to_device, targets_to_device
from edgekd.kd.training.jobs import EpochResult

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from edgekd.kd.data import Samples
    from edgekd.kd.training.callbacks import Callback
    from edgekd.kd.training.jobs import TrainingJob, TrainingSettings
    from edgekd.ports import Progress

_WARM_UP, _START, _END = 0.3, 1 / 25, 1 / 250_000  # share of the steps; learning rates as shares of the peak
_REPORTS_PER_EPOCH = 20


@dataclass(slots=True)
class Trainer:
    """A job in training."""

    job: TrainingJob
    memory_format: torch.memory_format
    module: nn.Module
    optimizer: torch.optim.Optimizer
    callbacks: Sequence[Callback] = ()
    curve: list[EpochResult] = field(default_factory=list)

    def run_epoch(self, epoch: int, progress: Progress) -> None:
        """Train and validate one epoch; append its result to the curve and run the callbacks."""
        ranks = [distributed.rank()] if distributed.rank() else []
        seed_all(derive_seed(self.job.settings.seed, "epoch", epoch, *ranks))
        train_loss, train_accuracy = self.train_epoch(epoch, progress)
        distributed.average_buffers([self.module, *(module for callback in self.callbacks for module in callback.modules())])
        loss, accuracy = self.validate(epoch)
        _check_finite(self.job, loss, f"on the validation split after epoch {epoch + 1}")
        rate = self.optimizer.param_groups[0]["lr"]
        self.curve.append(EpochResult(epoch + 1, train_loss, train_accuracy, loss, accuracy, rate))
        for callback in self.callbacks:
            callback.after_epoch(self)

    def train_epoch(self, epoch: int, progress: Progress) -> tuple[float, float | None]:
        """Train one epoch; return the mean loss of its samples, and the accuracy on those that have a class."""
        import torch

        job, settings = self.job, self.job.settings
        self.module.train()
        shuffling = torch.Generator().manual_seed(derive_seed(settings.seed, "shuffle", epoch))
        augmenting = torch.Generator().manual_seed(derive_seed(settings.seed, "augment", epoch))
        samples = job.train if job.view is None else job.view(epoch)
        batches = _batches(torch.randperm(len(samples), generator=shuffling), settings.batch_size)
        total_loss, correct, labelled = 0.0, 0, 0
        for step, rows in enumerate(batches):
            batch = samples.pick(rows)
            inputs = batch.inputs if job.augment is None else job.augment(batch.inputs, augmenting)
            rate = one_cycle(epoch * len(batches) + step, settings.epochs * len(batches), settings.learning_rate)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss, value, logits = self._batch_loss(batch, inputs_to_device(inputs, self.memory_format, settings.mode), epoch)
            self.optimizer.zero_grad(set_to_none=True)
            usercode.call_user_code(loss.backward, job.entry)
            distributed.all_reduce_gradients(parameter for group in self.optimizer.param_groups for parameter in group["params"])
            self.optimizer.step()
            for callback in self.callbacks:
                callback.after_step(self)
            _check_finite(job, value, f"in epoch {epoch + 1}, step {step + 1} of {len(batches)}")
            total_loss += value * len(rows)
            batch_correct, batch_labelled = count_correct(job.output, logits, batch.labels)
            correct, labelled = correct + batch_correct, labelled + batch_labelled
            if step % max(1, len(batches) // _REPORTS_PER_EPOCH) == 0:
                progress((epoch + step / len(batches)) / settings.epochs, f"epoch {epoch + 1}/{settings.epochs}, loss {value:.3f}")
        return total_loss / len(samples), correct / labelled if labelled else None

    def validate(self, epoch: int) -> tuple[float, float | None]:
        """Return loss and accuracy on the validation split; accuracy is None if no sample has a class."""
        import torch

        job = self.job
        self.module.eval()
        total_loss, correct, labelled = 0.0, 0, 0
        with torch.inference_mode():
            for rows in _batches(torch.arange(len(job.validation)), job.settings.batch_size):
                batch = job.validation.pick(rows)
                inputs = inputs_to_device(batch.inputs, self.memory_format, job.settings.mode)
                _, value, logits = self._batch_loss(batch, inputs, epoch)
                total_loss += value * len(rows)
                batch_correct, batch_labelled = count_correct(job.output, logits, batch.labels)
                correct, labelled = correct + batch_correct, labelled + batch_labelled
        return total_loss / len(job.validation), correct / labelled if labelled else None

    def _batch_loss(self, batch: Samples, inputs: Sequence[Tensor], epoch: int) -> tuple[Tensor, float, Tensor]:
        """Return the loss of a batch (its gradient is this rank's part), its value, and the logits.

        ``inputs`` are those of the batch after augmentation, on the device.
        """
        import torch

        job = self.job
        rows, sizes = distributed.shard(len(batch)), distributed.shard_sizes(len(batch))
        mode = job.settings.mode if self.module.training else replace(job.settings.mode, precision=FLOAT32)  # float32 is what ships
        shard = [item[rows] for item in inputs]
        if not len(shard[0]):
            raise RecipeError(
                f"{job.section}: a batch of {len(batch)} is too small for {distributed.world_size()} ranks; raise {job.section}.batch_size"
            )
        logits = distributed.all_gather(forward(self.module, job.entry, shard, mode), sizes)
        frozen_logits, labels = targets_to_device(batch, logits.shape[1], mode)
        teacher_logits: dict[str, Tensor | None] = {**dict.fromkeys(TEACHERS), TEACHERS[0]: frozen_logits}
        for callback in self.callbacks:
            for name, tensor in callback.teacher_logits(shard, epoch).items():
                teacher_logits[name] = distributed.all_gather(tensor, sizes)
        loss = job.objective(logits, teacher_logits, labels, epoch)
        # the means over the ranks' samples, weighted by their number
        feature_loss = torch.as_tensor(sum(callback.loss(shard, epoch) for callback in self.callbacks)) * (len(shard[0]) / len(batch))
        return loss + feature_loss, loss.item() + distributed.all_reduce(feature_loss.item()), logits.detach().cpu()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "curve": [asdict(result) for result in self.curve],
            "callbacks": {callback.name: callback.state_dict() for callback in self.callbacks if callback.name},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what a checkpoint holds."""
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.curve = [EpochResult(**result) for result in state["curve"]]
        for callback in self.callbacks:
            if callback.name:
                callback.load_state_dict(state["callbacks"][callback.name])


def fit(
    job: TrainingJob, work: Path, progress: Progress, callbacks: Sequence[Callback] = ()
) -> tuple[dict[str, Tensor], list[EpochResult]]:
    """Train a job and return the weights after the last epoch and the curve.

    The last epoch, when the learning rate has come down, is better than the one that is best on a small validation split by luck.

    Args:
        job: What is trained.
        work: The folder of the checkpoint; it belongs to this job alone. A training that was killed resumes from it.
        progress: Is called with the share done.
        callbacks: Run after those of the job, before the checkpoint is written.

    Raises:
        RecipeError: if the module cannot be trained on these samples, or its code fails.
        StageError: if the loss is not finite.
    """
    settings = job.settings
    with deterministic(settings.threads, settings.mode.accelerator):
        checkpoint = Checkpoint(work)
        trainer = make_trainer(job, choose_memory_format(job), [*callbacks, *([] if distributed.rank() else [checkpoint])])
        checkpoint.restore(trainer)
        for epoch in range(len(trainer.curve), settings.epochs):
            trainer.run_epoch(epoch, progress)
            progress((epoch + 1) / settings.epochs, _describe(trainer.curve[-1], settings.epochs))
    return {name: value.detach().cpu() for name, value in trainer.module.state_dict().items()}, trainer.curve


def make_trainer(job: TrainingJob, memory_format: torch.memory_format, callbacks: Sequence[Callback] = ()) -> Trainer:
    """Return a trainer with fresh weights, and with the callbacks of its job before further ones."""
    seed_all(derive_seed(job.settings.seed, "init"))
    module = module_to_device(job.build(), memory_format, job.settings.mode, job.section)
    callbacks = [*job_callbacks(job, module, memory_format), *callbacks]
    parameters = [*module.parameters(), *(parameter for callback in callbacks for parameter in callback.parameters())]
    return Trainer(job, memory_format, module, _optimizer(parameters, job.settings), callbacks)


def epoch_runner(job: TrainingJob) -> Callable[[], object]:
    """Return a function that trains one epoch of a job at each call and stores nothing: to be timed, within ``deterministic``."""
    trainer = make_trainer(job, choose_memory_format(job))
    return lambda: trainer.train_epoch(0, lambda _share, _text: None)


def one_cycle(step: int, steps: int, peak: float) -> float:
    """Return the learning rate of a step: half a cosine up to the peak, half a cosine down to nearly nothing.

    Source:
        Smith and Topin, arXiv 1708.07120; shares as in the defaults of torch's OneCycleLR.
    """
    top = _WARM_UP * steps
    if step < top:
        low, share = _START, 1 - step / top
    else:
        low, share = _END, (step - top) / max(steps - top, 1)
    return peak * (low + (1 - low) * (1 + math.cos(math.pi * share)) / 2)


def _batches(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    """Return rows in batches of at most ``size``, as equal as they can be: no tiny last one to upset batch norm."""
    return rows.tensor_split(math.ceil(len(rows) / size))


def _check_finite(job: TrainingJob, loss: float, where: str) -> None:
    if not math.isfinite(loss):
        rate = job.settings.learning_rate
        raise StageError(
            f"{job.section}: the loss is {loss} {where}; lower {job.section}.learning_rate (now {rate:g}), or check the scale of the inputs"
        )


def _optimizer(parameters: Sequence[nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    import torch

    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(trainable, rate, momentum=0.9, nesterov=True, weight_decay=decay, fused=True)
    return torch.optim.AdamW(trainable, rate, weight_decay=decay, fused=True)


def _describe(result: EpochResult, epochs: int) -> str:
    accuracy = "" if result.validation_accuracy is None else f", {100 * result.validation_accuracy:.2f} %"
    return f"epoch {result.epoch}/{epochs}, validation loss {result.validation_loss:.3f}{accuracy}"
