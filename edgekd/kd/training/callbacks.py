# SPDX-License-Identifier: Apache-2.0
"""Callbacks of the trainer: copies of the student that teach it, taps into the teacher, checkpoints."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Protocol

from edgekd.domain.losses import EMA, LAST_EPOCH
from edgekd.kd.losses import taps
from edgekd.kd.modules import serialize_weights
from edgekd.kd.reproducible import load_verified, save_verified
from edgekd.kd.training.execution import DEFAULT_MODE, forward, inputs_to_device, module_to_device
from edgekd.store.digests import write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from edgekd.domain.recipe import EntryPoint
    from edgekd.kd.training.jobs import EpochResult, TrainingJob

DRY_RUN_SAMPLES = 8  # samples of the batch on which taps and modules are checked
CHECKPOINT = "checkpoint"
_MIN_EMA_STEPS = 2  # steps that the EMA spans at least


class Trainer(Protocol):
    """What callbacks see of the trainer."""

    module: nn.Module
    curve: list[EpochResult]

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what a checkpoint holds."""
        ...


class Callback:
    """What may take part in a training; each method does nothing by default. ``name`` is its key in a checkpoint."""

    name = ""

    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained beside the student."""
        return []

    def modules(self) -> list[nn.Module]:
        """Return the modules whose buffers all ranks share."""
        return []

    def teacher_logits(self, inputs: Sequence[Tensor], epoch: int) -> dict[str, Tensor]:
        """Return further teachers' logits for a batch, by the names of ``domain.losses.TEACHERS``."""
        del inputs, epoch
        return {}

    def loss(self, inputs: Sequence[Tensor], epoch: int) -> Tensor | float:
        """Return a loss to add, for the batch that the student has just seen."""
        del inputs, epoch
        return 0.0

    def after_step(self, trainer: Trainer) -> None:
        """Run after each optimizer step."""

    def after_epoch(self, trainer: Trainer) -> None:
        """Run after each epoch, when its result is the last of ``trainer.curve``."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint has to hold."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what a checkpoint holds."""


class AuxiliaryModel(Callback):
    """A copy of the student that teaches it, in eval mode and without gradients.

    ``ema``: an exponential moving average of its weights over about an epoch; ``last_epoch``: the student after the epoch before.

    Source:
        Tarvainen and Valpola, arXiv 1703.01780; Kim et al., arXiv 2006.12000.
    """

    def __init__(self, name: str, student: nn.Module, entry: EntryPoint, steps_per_epoch: int) -> None:
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        self.name, self.entry = name, entry
        decay = 0.0 if name == LAST_EPOCH else 1 - 1 / max(_MIN_EMA_STEPS, steps_per_epoch)
        self.model: Any = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)  # type: ignore[no-untyped-call]  # torch's own
        self.model.requires_grad_(requires_grad=False)

    def modules(self) -> list[nn.Module]:
        return [self.model]

    def teacher_logits(self, inputs: Sequence[Tensor], epoch: int) -> dict[str, Tensor]:
        import torch

        if self.name == LAST_EPOCH and epoch == 0:
            return {}
        with torch.no_grad():
            return {self.name: forward(self.model.eval(), self.entry, inputs, DEFAULT_MODE)}

    def after_step(self, trainer: Trainer) -> None:
        if self.name == EMA:
            self.model.update_parameters(trainer.module)

    def after_epoch(self, trainer: Trainer) -> None:
        if self.name == LAST_EPOCH:
            self.model.update_parameters(trainer.module)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.model.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state)


class FeatureLosses(Callback):
    """The losses of tapped tensors; the teacher runs beside the student, and the adapters are trained with it."""

    name = "adapters"

    def __init__(self, tapped: taps.TappedNetworks) -> None:
        self.tapped = tapped

    def parameters(self) -> list[nn.Parameter]:
        return list(self.tapped.adapters.parameters())

    def loss(self, inputs: Sequence[Tensor], epoch: int) -> Tensor | float:
        if not self.tapped.is_active_in(epoch):
            return 0.0
        self.tapped.run_teacher(inputs)
        return self.tapped.loss(epoch)

    def state_dict(self) -> dict[str, Any]:
        return self.tapped.adapters.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.tapped.adapters.load_state_dict(state)


class Checkpoint(Callback):
    """The state of the trainer after each epoch, in one file, so that a training that is killed resumes."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / CHECKPOINT

    def after_epoch(self, trainer: Trainer) -> None:
        import torch

        buffer = io.BytesIO()
        torch.save(trainer.state_dict(), buffer)
        save_verified(self.path, buffer.getvalue())

    def restore(self, trainer: Trainer) -> None:
        """Load the checkpoint into a trainer, if there is one that is not damaged."""
        import torch

        content = load_verified(self.path)
        if content is not None:
            trainer.load_state_dict(torch.load(io.BytesIO(content), weights_only=True, map_location="cpu"))


class SaveWeights(Callback):
    """The weights after some epochs (from 1), as safetensors in a folder that survives a kill."""

    def __init__(self, epochs: Sequence[int], folder: Path) -> None:
        self.epochs = epochs
        self.paths = [folder / f"checkpoint.{number}" for number in range(len(epochs))]

    def after_epoch(self, trainer: Trainer) -> None:
        epoch = trainer.curve[-1].epoch
        if epoch in self.epochs:
            write_atomically(self.paths[self.epochs.index(epoch)], serialize_weights(trainer.module.state_dict()))


def job_callbacks(job: TrainingJob, module: nn.Module, memory_format: torch.memory_format) -> list[Callback]:
    """Return the callbacks that the losses of a job ask for, attached to its module.

    Raises:
        RecipeError: if taps do not match.
    """
    import torch

    steps_per_epoch = len(job.train) // job.settings.batch_size
    # copies are made before hooks are put on the student, which they would share
    callbacks: list[Callback] = [AuxiliaryModel(name, module, job.entry, steps_per_epoch) for name in job.auxiliary]
    if job.teacher is not None:
        teacher = job.teacher()
        module_to_device(teacher.module, memory_format, job.settings.mode, job.section)
        batch = job.train.pick(torch.arange(min(DRY_RUN_SAMPLES, len(job.train))))
        student = taps.Network("student", module, job.entry)
        inputs = inputs_to_device(batch.inputs, memory_format, job.settings.mode)
        callbacks.append(FeatureLosses(taps.attach_taps(student, teacher, job.tapped, inputs, job.settings.seed)))
    return callbacks
