# SPDX-License-Identifier: Apache-2.0
"""One batch is tried on a module of its own, before anything long: can it be trained on these samples, and in which layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from edgekd import usercode
from edgekd.errors import RecipeError
from edgekd.kd.reproducible import seed_all
from edgekd.kd.training import execution

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from edgekd.kd.data import Samples
    from edgekd.kd.training.execution import ExecutionMode
    from edgekd.kd.training.loop import TrainingJob

DRY_RUN_SAMPLES = 8  # samples of the batch


def choose_memory_format(job: TrainingJob) -> torch.memory_format:
    """Return the memory layout to train in, after one batch was tried on a module of its own.

    Channels-last makes small convolutional networks 1.2 to 1.4 times faster on CPUs (measured: a plain, a depthwise and
    a residual network). Code that calls ``view`` on an image cannot run in it; it trains in the default layout, as bfloat16 does.

    Raises:
        RecipeError: if the module cannot be trained on these samples.
    """
    import torch

    if job.settings.mode.precision == execution.BFLOAT16:
        _try_one_batch(job, torch.contiguous_format)
        return torch.contiguous_format
    try:
        _try_one_batch(job, torch.channels_last)
    except RecipeError as error:
        if not isinstance(error.__cause__, RuntimeError):
            raise
        _try_one_batch(job, torch.contiguous_format)
        return torch.contiguous_format
    return torch.channels_last


def _try_one_batch(job: TrainingJob, layout: torch.memory_format) -> None:
    import torch

    from edgekd.kd.training.auxiliary import auxiliary_models

    seed_all(job.settings.seed)
    module = build_on_device(job, layout).train()
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise RecipeError(f"{job.entry}: the module has no parameter to train")
    batch = job.train.pick(torch.arange(min(DRY_RUN_SAMPLES, len(job.train))))
    given = inputs_to_device(batch.inputs, layout, job.settings.mode)
    guides = auxiliary_models(job, module, layout)
    logits = execution.forward(module, job.entry, given, job.settings.mode)
    _check_logits(job, logits, len(batch))
    epoch = job.settings.epochs - 1
    outputs, labels = targets_to_device(batch, job.settings.mode)
    loss = job.objective(logits, guides.answers(given, outputs, epoch), labels, epoch) + guides.loss(given, epoch)
    usercode.call_user_code(loss.backward, job.entry)


def _check_logits(job: TrainingJob, logits: Any, samples: int) -> None:
    import torch

    matrix = 2
    if not isinstance(logits, torch.Tensor):
        raise RecipeError(f"{job.entry}: answered with {type(logits).__name__}; expected one tensor of logits (n, classes)")
    if logits.ndim != matrix or len(logits) != samples or not logits.is_floating_point():
        found = f"{logits.dtype} {list(logits.shape)}".removeprefix("torch.")
        raise RecipeError(f"{job.entry}: answered {samples} samples with {found}; expected float logits [{samples}, classes]")
    classes = logits.shape[1]
    if job.train.outputs is not None and job.train.outputs.shape[1] != classes:
        raise RecipeError(f"{job.entry}: answers with {classes} classes; the teacher answers with {job.train.outputs.shape[1]}")
    if not job.form.is_single_softmax:  # inspect has checked its labels
        return
    for split, samples_of in (("train", job.train), ("validation", job.validation)):
        highest = int(samples_of.labels.max())
        if highest >= classes:
            raise RecipeError(f"{job.entry}: answers with {classes} classes; the {split} split has the label {highest}")


def build_on_device(job: TrainingJob, layout: torch.memory_format) -> nn.Module:
    """Return the module with fresh weights, in a layout, where it is trained.

    Raises:
        RecipeError: if the accelerator does not take it.
    """
    return to_device(job.build(), layout, job.settings.mode, job.section)


def to_device(module: nn.Module, layout: torch.memory_format, mode: ExecutionMode, section: str) -> nn.Module:
    """Return a module in a layout, where a way has it; ``section`` is the recipe's, for messages.

    Raises:
        RecipeError: if the accelerator does not take it.
    """
    try:
        return module.to(device=mode.accelerator, memory_format=layout)  # type: ignore[call-overload,no-any-return]  # an overload torch forgot
    except (RuntimeError, AssertionError) as error:  # no driver, no memory, a torch without it
        why = str(error).splitlines()[0]
        raise RecipeError(
            f'{section}.accelerator: {mode.accelerator} fails: {why}; expected it to work, or accelerator = "none"'
        ) from error


def inputs_to_device(inputs: tuple[Tensor, ...], layout: torch.memory_format, mode: ExecutionMode) -> list[Tensor]:
    """Return inputs as a module in this layout takes them, where a way has it."""
    images = 4
    found = (item.contiguous(memory_format=layout) if item.ndim == images else item for item in inputs)
    return [item.to(mode.accelerator) for item in found]


def targets_to_device(batch: Samples, mode: ExecutionMode) -> tuple[Tensor | None, Tensor]:
    """Return the teacher's outputs for a batch, if there are any, and its labels, where a way has the student."""
    outputs = cast("Tensor | None", batch.outputs)  # a batch's are in memory
    return None if outputs is None else outputs.to(mode.accelerator), batch.labels.to(mode.accelerator)
