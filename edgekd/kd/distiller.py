# SPDX-License-Identifier: Apache-2.0
"""Distillation inside a training loop of the user's: a notebook, a plain loop, a Hugging Face ``Trainer``, a Lightning module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgekd.config.distill_rules import check_losses, is_interval
from edgekd.config.reader import Reader
from edgekd.domain.losses import FROZEN, REGRESSION_LOSSES, TAPPED, Loss
from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError
from edgekd.kd import losses as registry
from edgekd.kd.losses import taps
from edgekd.kd.output_spec import TORCH_IGNORED

if TYPE_CHECKING:
    from collections.abc import Sequence

LABELS, TEACHER_LOGITS = "labels", "teacher_logits"  # keys of a batch that is a mapping; all others are inputs
ATTENTION_MASK = "attention_mask"  # an input that says which tokens are padding
_MATRIX = 2
DEFAULT_LOSSES = ({"kind": "kl", "weight": 0.9}, {"kind": "ce", "weight": 0.1})


class Distiller(nn.Module):
    """The loss of a student that learns from a teacher. As a module, it holds the adapters that are trained with the student.

    The teacher is frozen and in eval mode, however often ``train()`` is called on the distiller, and is not part of its
    ``state_dict()``. Adapters of ``hint`` and ``hidden`` are: pass ``distiller.parameters()`` to the optimizer as well.

    Args:
        student: The module that is trained. It is not changed, except for hooks: on its taps, and one that gives it a copy of its
            inputs, so that the teacher gets the same even if the student changes them in place.
        teacher: A module that returns logits, or an object with ``.logits``. None if each batch has ``teacher_logits``,
            which were stored, and no loss has taps.
        losses: As ``distill.losses`` of a recipe: mappings such as ``{"kind": "kl", "temperature": 2.0}``.
        example: A batch, or the inputs of one, on which taps are checked; only needed for losses with taps.
        seed: Of the adapters' weights.

    Attributes:
        epoch: From 0; set it if losses have ``epochs``.

    Raises:
        RecipeError: all that is wrong with the losses or the taps.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        losses: Sequence[Mapping[str, Any]] = DEFAULT_LOSSES,
        *,
        example: Any = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.epoch = 0
        self._losses = _parse_losses(losses)
        if auxiliary := next((loss.teacher for loss in self._losses if loss.teacher != FROZEN), None):
            raise RecipeError(
                f"losses: '{auxiliary}' is a teacher of recipes only; pass such a copy of the student as teacher, and update it yourself"
            )
        # in a tuple, so that it is not a submodule
        self._teacher = () if teacher is None else (teacher.eval().requires_grad_(requires_grad=False),)
        if teacher is not None:
            student.register_forward_pre_hook(_copy_inputs, with_kwargs=True)
        self._tapped: taps.TappedNetworks | None = None
        self.adapters = nn.ModuleDict()
        if tapped_losses := [loss for loss in self._losses if loss.kind in TAPPED]:
            if teacher is None or example is None:
                raise RecipeError(
                    f"losses: '{tapped_losses[0].kind}' has taps; expected the teacher, and a batch to check them: Distiller(example=...)"
                )
            self._tapped = taps.attach_taps(
                taps.Network("student", student, EntryPoint("student", "forward")),
                taps.Network("teacher", teacher, EntryPoint("teacher", "forward")),
                tapped_losses,
                _split_batch(example)[0],
                seed,
            )
            self.adapters = self._tapped.adapters

    def forward(self, batch: Any, student_output: Any, *, teacher_logits: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the loss of a batch that the student just ran.

        Args:
            batch: Inputs alone (a tensor), ``(input, ..., labels)``, or a mapping with ``labels`` and the inputs by name,
                and ``teacher_logits`` if they were stored.
            student_output: Its logits, or an object that has them as ``.logits`` or ``["logits"]``.
            teacher_logits: Stored logits, instead of those in the batch.
            mask: The samples or tokens that count for losses of logits, as booleans. By default all samples; of tokens those that
                have a label, or if the batch has no labels, those of its ``attention_mask``.

        Raises:
            RecipeError: if a loss lacks the labels or the teacher's logits that it needs, or shapes or labels do not fit.

        Shapes:
            student_output, teacher_logits: (n, C), or (n, T, C) for T tokens: classes are the last axis; labels: (n,) or (n, T)
            int64, -1 (or -100) where there is none, for ``mse_labels`` (n, C) float; mask: (n,) or (n, T); result: ().
        """
        inputs, labels, stored_logits = _split_batch(batch)
        logits, teacher_logits = _logits(student_output), stored_logits if teacher_logits is None else teacher_logits
        needed = {name for loss in self._losses if loss.is_active_in(self.epoch) for name in registry.loss_inputs(loss.kind)}
        tapped = self._tapped if self._tapped is not None and self._tapped.is_active_in(self.epoch) else None
        is_missing = teacher_logits is None and "teacher" in needed
        if tapped is not None:  # its taps are recorded, whether or not its logits are needed
            output = tapped.run_teacher(inputs)
            teacher_logits = _logits(output) if is_missing else teacher_logits
        elif is_missing and self._teacher:
            teacher_logits = _logits(_run(self._teacher[0], inputs))
        if "teacher" in needed and teacher_logits is None:
            raise RecipeError(f"the losses need a teacher's logits; expected Distiller(teacher=...), or '{TEACHER_LOGITS}' with each batch")
        if "labels" in needed and labels is None:
            raise RecipeError(f"the losses need labels; expected them last in the batch, or as '{LABELS}' of a mapping")
        if teacher_logits is not None and teacher_logits.shape != logits.shape:
            shapes = f"{list(logits.shape)} and {list(teacher_logits.shape)}"
            raise RecipeError(f"the logits of student and teacher have shapes {shapes}; expected the same classes (or vocabulary)")
        loss = self._loss_of_logits(logits, teacher_logits, labels if "labels" in needed else None, _mask(logits, inputs, labels, mask))
        return loss if tapped is None else loss + tapped.loss(self.epoch)

    def _loss_of_logits(self, logits: Tensor, teacher_logits: Tensor | None, labels: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return the loss of the rows that count, 0 if there is none."""
        kinds = {loss.kind for loss in self._losses} - set(TAPPED)
        if logits.shape[-1] == 1 and kinds - set(REGRESSION_LOSSES):
            raise RecipeError(f"the logits have shape {list(logits.shape)}, one class; expected at least two, as the last axis")
        rows = _rows(logits, mask)
        if not len(rows):
            return logits.sum() * 0.0
        if labels is None:
            label_rows = torch.full((len(rows),), registry.UNLABELLED, device=logits.device)
        else:
            labels = _check_labels(labels, logits, kinds)
            label_rows = _rows(labels, mask) if labels.shape == logits.shape else _rows(labels[..., None], mask)[:, 0]
        teacher_rows = None if teacher_logits is None else _rows(teacher_logits, mask)
        return registry.total_loss(self._losses, rows, {FROZEN: teacher_rows}, label_rows, self.epoch)


def _rows(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """Return the samples or tokens that count as rows. Shapes: (n, C) or (n, T, C) -> (m, C)."""
    return tensor.reshape(-1, tensor.shape[-1]) if mask is None else tensor[mask]


def _copy_inputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return taps.clone_tensors(args), taps.clone_tensors(kwargs)


def _mask(logits: Tensor, inputs: Any, labels: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Return which samples, or which tokens, count; None for all. Shape: that of the logits without the last axis."""
    shape = logits.shape[:-1]
    if logits.ndim < _MATRIX or not logits.is_floating_point():
        kind = str(logits.dtype).removeprefix("torch.")
        raise RecipeError(
            f"the logits are {kind} {list(logits.shape)}; expected floating point numbers (n, classes) or (n, tokens, classes)"
        )
    if mask is None and logits.ndim > _MATRIX:
        attention = inputs.get(ATTENTION_MASK) if isinstance(inputs, Mapping) else None
        if isinstance(labels, Tensor) and labels.shape == shape and not labels.is_floating_point():
            mask = labels >= 0
        elif labels is None and isinstance(attention, Tensor) and attention.shape == shape:
            mask = attention != 0
    if mask is None:
        return None
    if mask.shape != shape:
        raise RecipeError(f"the mask has shape {list(mask.shape)}, the logits {list(logits.shape)}; expected {list(shape)}")
    return mask.to(logits.device, torch.bool)


def _check_labels(labels: Tensor, logits: Tensor, kinds: set[str]) -> Tensor:
    """Return labels as the losses take them.

    Raises:
        RecipeError: if they are not class ids below the number of classes, or for ``mse_labels`` numbers, one for each logit.
    """
    expected = logits.shape if "mse_labels" in kinds else logits.shape[:-1]
    if not isinstance(labels, Tensor):
        raise RecipeError(f"labels are {type(labels).__name__}; expected a tensor")
    if labels.shape != expected:
        shapes = f"labels have shape {list(labels.shape)}, the logits {list(logits.shape)}"
        raise RecipeError(f"{shapes}; expected labels {list(expected)}: classes are the last axis of logits")
    if "mse_labels" in kinds:
        return labels.float()
    if labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool:
        raise RecipeError(f"labels are {str(labels.dtype).removeprefix('torch.')}; expected class ids, int64")
    if labels.device.type == "meta":  # without values
        return labels.long()
    is_wrong = (labels >= logits.shape[-1]) | ((labels < registry.UNLABELLED) & (labels != TORCH_IGNORED))
    if bool(is_wrong.any()):
        classes = logits.shape[-1]
        raise RecipeError(
            f"a label is {int(labels[is_wrong][0])}; expected 0 to {classes - 1} for {classes} classes, or -1 or -100 for none"
        )
    return labels.long().clamp(min=registry.UNLABELLED)


def _run(teacher: nn.Module, inputs: Any) -> Any:
    teacher.eval()
    inputs = taps.clone_tensors(inputs)
    with torch.no_grad():
        return teacher(**inputs) if isinstance(inputs, Mapping) else teacher(*inputs)


def _parse_losses(losses: Sequence[Mapping[str, Any]]) -> list[Loss]:
    """Return the losses, read by the rules of a recipe.

    Raises:
        RecipeError: all that is wrong with them.
    """
    reader = Reader("Distiller")
    parsed = [reader.table(Loss, _plain(values), f"losses[{index}]") for index, values in enumerate(losses)]
    if not parsed:
        reader.problem("losses", "are empty; expected at least one loss")
    check_losses(reader)
    kinds = {loss.kind for _, loss in reader.all_parsed(Loss)}
    for key, loss in reader.all_parsed(Loss):
        if loss.has_auto:
            reader.problem(key, "a value is 'auto', which a search chooses in recipes only; expected a number")
        if loss.epochs is not None and not is_interval(loss.epochs):
            reader.problem(f"{key}.epochs", f"{list(loss.epochs)}; expected the first and the last epoch in which it is active, from 1")
        if "mse_labels" in kinds and loss.kind not in (*REGRESSION_LOSSES, *TAPPED):
            problem = f"'{loss.kind}' compares classes, 'mse_labels' numbers; expected one of the two"
            reader.problem(f"{key}.kind", problem)
    if reader.problems:
        raise RecipeError(*reader.problems)
    return parsed


def _plain(value: Any) -> Any:
    """Return a value as TOML has it: tables, arrays, and plain numbers in place of those of numpy."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def _split_batch(batch: Any) -> tuple[Any, Tensor | None, Tensor | None]:
    """Return the inputs of a batch, its labels and the stored logits of the teacher."""
    if isinstance(batch, Mapping):
        inputs = {name: item for name, item in batch.items() if name not in {LABELS, TEACHER_LOGITS}}
        return inputs, batch.get(LABELS), batch.get(TEACHER_LOGITS)
    if isinstance(batch, Tensor):
        return (batch,), None, None
    return tuple(batch[:-1]), batch[-1], None


def _logits(output: Any) -> Tensor:
    logits = output["logits"] if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise RecipeError(f"a network returned {type(output).__name__}; expected logits (n, classes), or an object that has .logits")
    return logits
