# SPDX-License-Identifier: Apache-2.0
"""Distillation inside a training loop of the user's: a notebook, a plain loop, a Hugging Face ``Trainer``, a Lightning module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgekd.config.distill_rules import loss_problems
from edgekd.domain.losses import FROZEN, TAPPED, Loss
from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError
from edgekd.kd import losses as registry
from edgekd.kd.losses import taps

if TYPE_CHECKING:
    from collections.abc import Sequence

LABELS, TEACHER_LOGITS = "labels", "teacher_logits"  # keys of a batch that is a mapping; all others are inputs
DEFAULT_LOSSES = ({"kind": "kl", "weight": 0.9}, {"kind": "ce", "weight": 0.1})


class Distiller(nn.Module):
    """The loss of a student that learns from a teacher. As a module, it holds the adapters that are trained with the student.

    The teacher is frozen and in eval mode, however often ``train()`` is called on the distiller, and is not part of its
    ``state_dict()``. Adapters of ``hint`` and ``hidden`` are: pass ``distiller.parameters()`` to the optimizer as well.

    Args:
        student: The module that is trained. It is not changed, except that hooks are put on its taps.
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
        self._losses = [_parse_loss(index, values) for index, values in enumerate(losses)]
        if problems := [problem for index, loss in enumerate(self._losses) for problem in loss_problems(loss, f"losses[{index}]")]:
            raise RecipeError(*problems)
        if auxiliary := next((loss.teacher for loss in self._losses if loss.teacher != FROZEN), None):
            raise RecipeError(
                f"losses: '{auxiliary}' is a teacher of recipes only; pass such a copy of the student as teacher, and update it yourself"
            )
        # in a tuple, so that it is not a submodule
        self._teacher = () if teacher is None else (teacher.eval().requires_grad_(requires_grad=False),)
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

    def forward(self, batch: Any, student_output: Any, *, teacher_logits: Tensor | None = None) -> Tensor:
        """Return the loss of a batch that the student just ran.

        Args:
            batch: Inputs alone (a tensor), ``(input, ..., labels)``, or a mapping with ``labels`` and the inputs by name,
                and ``teacher_logits`` if they were stored.
            student_output: Its logits, or an object that has them as ``.logits`` or ``["logits"]``.
            teacher_logits: Stored logits, instead of those in the batch.

        Raises:
            RecipeError: if a loss lacks the labels or the teacher's logits that it needs.

        Shapes:
            student_output, teacher_logits: (n, C); labels: (n,) int64, -1 (or -100) where there is none; result: ().
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
        if labels is None:
            labels = torch.full((len(logits),), registry.UNLABELLED, device=logits.device)
        labels = labels.clamp(min=registry.UNLABELLED)  # other libraries ignore -100
        loss = registry.total_loss(self._losses, logits, {FROZEN: teacher_logits}, labels, self.epoch)
        return loss if tapped is None else loss + tapped.loss(self.epoch)


def _run(teacher: nn.Module, inputs: Any) -> Any:
    teacher.eval()
    with torch.no_grad():
        return teacher(**inputs) if isinstance(inputs, Mapping) else teacher(*inputs)


def _parse_loss(index: int, values: Mapping[str, Any]) -> Loss:
    try:
        return Loss.from_dict(values)
    except TypeError as error:
        raise RecipeError(f"losses[{index}]: {str(error).removeprefix('Loss.__init__() ')}; expected the keys of distill.losses") from error


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
