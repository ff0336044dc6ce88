# SPDX-License-Identifier: Apache-2.0
"""Distillation inside a loop of one's own: a notebook, a plain loop, a Hugging Face ``Trainer``, a Lightning module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgekd.config.distill_rules import problems_of
from edgekd.domain.losses import FROZEN, TAPPED, Loss
from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError
from edgekd.kd import losses as formulas
from edgekd.kd.losses import taps

if TYPE_CHECKING:
    from collections.abc import Sequence

LABELS, OUTPUTS = "labels", "teacher_outputs"  # of a batch that is a mapping; all else are inputs
DEFAULT = ({"kind": "kl", "weight": 0.9}, {"kind": "ce", "weight": 0.1})


class Distiller(nn.Module):
    """The loss of a student that follows a teacher; as a module, it holds what is trained beside the student.

    The teacher is frozen and in eval mode, however often ``train()`` is called on what holds it, and is no part of
    ``state_dict()``. Adapters of ``hint`` and ``hidden`` are: give ``distiller.parameters()`` to the optimizer as well.

    Args:
        student: The module that is trained; it stays as it is, but for hooks on its taps.
        teacher: A module that answers with logits, or has ``.logits`` in its answer. None if each batch brings
            ``teacher_outputs``, which were stored, and nothing is tapped.
        losses: As a recipe's ``distill.losses``: mappings such as ``{"kind": "kl", "temperature": 2.0}``.
        example: A batch, or the inputs of one; only needed for losses with taps, which it is used to check.
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
        losses: Sequence[Mapping[str, Any]] = DEFAULT,
        *,
        example: Any = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.epoch = 0
        self._terms = [_read(index, item) for index, item in enumerate(losses)]
        if problems := [problem for index, term in enumerate(self._terms) for problem in problems_of(term, f"losses[{index}]")]:
            raise RecipeError(*problems)
        if own := next((term.teacher for term in self._terms if term.teacher != FROZEN), None):
            raise RecipeError(
                f"losses: '{own}' is a teacher of recipes only; give such a copy of the student as teacher, and update it yourself"
            )
        self._held: tuple[nn.Module, ...] = (
            () if teacher is None else (teacher.eval().requires_grad_(requires_grad=False),)
        )  # in a tuple: no part of this module
        self._tapped: taps.TappedNetworks | None = None
        self.adapters = nn.ModuleDict()
        tapped = [term for term in self._terms if term.kind in TAPPED]
        if tapped:
            if teacher is None or example is None:
                raise RecipeError(f"losses: '{tapped[0].kind}' has taps: expected the teacher, and example: a batch to check them on")
            networks = [taps.Network(role, one, EntryPoint(role, "forward")) for role, one in (("student", student), ("teacher", teacher))]
            self._tapped = taps.attach_taps(networks[0], networks[1], tapped, _parts(example)[0], seed)
            self.adapters = self._tapped.adapters

    def forward(self, batch: Any, student_outputs: Any, *, teacher_outputs: Tensor | None = None) -> Tensor:
        """Return the loss of a batch that the student has just answered.

        Args:
            batch: Inputs alone (a tensor), ``(input, ..., labels)``, or a mapping with ``labels`` and the inputs by name,
                and ``teacher_outputs`` if they were stored.
            student_outputs: Its logits, or something that has them as ``.logits`` or ``["logits"]``.
            teacher_outputs: Stored logits, instead of those in the batch.

        Raises:
            RecipeError: if a loss lacks the labels or the teacher's outputs that it needs.

        Shapes:
            student_outputs, teacher_outputs: (n, C); labels: (n,) int64, -1 (or -100) where there is none; result: ().
        """
        inputs, labels, stored = _parts(batch)
        logits, answers = _logits(student_outputs), stored if teacher_outputs is None else teacher_outputs
        active = [term for term in self._terms if term.counts_in(self.epoch)]
        wanted = {name for term in active for name in formulas.loss_inputs(term.kind)}
        tapped = self._tapped if self._tapped is not None and self._tapped.counts_in(self.epoch) else None
        if tapped is not None:
            asked = tapped.ask(inputs)
            answers = _logits(asked) if answers is None and "teacher" in wanted else answers
        elif answers is None and "teacher" in wanted and self._held:
            answers = _logits(self._ask(inputs))
        if "teacher" in wanted and answers is None:
            raise RecipeError(f"the losses need a teacher's outputs; expected Distiller(teacher=...), or '{OUTPUTS}' with each batch")
        if "labels" in wanted and labels is None:
            raise RecipeError(f"the losses need labels; expected them last in the batch, or as '{LABELS}' of a mapping")
        if answers is not None and answers.shape != logits.shape:
            shapes = f"{list(logits.shape)} and {list(answers.shape)}"
            raise RecipeError(f"student and teacher answer with {shapes}; expected the same classes (or vocabulary)")
        known = (
            torch.full((len(logits),), formulas.UNLABELLED, device=logits.device)
            if labels is None
            else labels.clamp(min=formulas.UNLABELLED)
        )
        loss = formulas.total_loss(self._terms, logits, {FROZEN: answers}, known, self.epoch)
        return loss if tapped is None else loss + tapped.loss(self.epoch)

    def _ask(self, inputs: Any) -> Any:
        teacher = self._held[0].eval()
        with torch.no_grad():
            return teacher(**inputs) if isinstance(inputs, Mapping) else teacher(*inputs)


def _read(index: int, given: Mapping[str, Any]) -> Loss:
    try:
        return Loss.from_dict(given)
    except TypeError as error:
        raise RecipeError(f"losses[{index}]: {str(error).removeprefix('Loss.__init__() ')}; expected the keys of distill.losses") from error


def _parts(batch: Any) -> tuple[Any, Tensor | None, Tensor | None]:
    """Return the inputs of a batch, its labels and the stored outputs of the teacher."""
    if isinstance(batch, Mapping):
        return {name: item for name, item in batch.items() if name not in {LABELS, OUTPUTS}}, batch.get(LABELS), batch.get(OUTPUTS)
    if isinstance(batch, Tensor):
        return (batch,), None, None
    return tuple(batch[:-1]), batch[-1], None


def _logits(answer: Any) -> Tensor:
    found = answer["logits"] if isinstance(answer, Mapping) else getattr(answer, "logits", answer)
    if not isinstance(found, Tensor):
        raise RecipeError(f"an answer is {type(answer).__name__}; expected logits (n, classes), or something that has .logits")
    return found
