# SPDX-License-Identifier: Apache-2.0
"""What a recipe can say of a distillation loss: its terms, their options, and the taps that some of them match."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from edgekd.domain.rules import Between, NonEmpty, OneOf

if TYPE_CHECKING:
    from collections.abc import Mapping

# each kind of loss, with its options and what they are where a recipe does not say; sources: edgekd/kd/losses.py
LOSSES: Mapping[str, Mapping[str, float | bool | str]] = {
    "attention": {"over": "channels"},
    "block": {},
    "ce": {"label_smoothing": 0.0},
    "dist": {"temperature": 1.0, "inter_weight": 1.0, "intra_weight": 1.0},
    "dkd": {"temperature": 4.0, "target_weight": 1.0, "rest_weight": 8.0},
    "hard": {},
    "hidden": {},
    "hint": {},
    "kl": {"temperature": 4.0, "standardize": False},
    "mse": {},
    "relation": {"distance_weight": 1.0, "angle_weight": 2.0},
    "squared": {},
}
REGRESSION_LOSSES = ("mse", "squared")  # losses that need no classes
TAPPED = ("attention", "block", "hidden", "hint", "relation")  # losses of tensors inside the networks; the others are of answers
FROZEN: Final = "frozen"
EMA, LAST_EPOCH = "ema", "last_epoch"
AUTO: Final = "auto"  # what is left to be chosen
TEACHERS = (FROZEN, EMA, LAST_EPOCH)  # whose answers a loss follows: the given teachers', or the student's own earlier ones


@dataclass(frozen=True, slots=True)
class Tap:
    """Two tensors that are matched: the outputs of a module of the student and of one of the teacher, by dotted path.

    ``path:1`` is the second of the outputs of a module that returns several.
    """

    student: Annotated[str, NonEmpty()]
    teacher: Annotated[str, NonEmpty()]


@dataclass(frozen=True, slots=True)
class Loss:
    """One term of the distillation loss. An option that is None has the value of ``LOSSES``; a kind takes those it has there.

    ``auto`` is chosen by short runs, on the validation split.
    ``epochs`` are the first and the last (from 1) in which the term counts; ``taps`` are for the kinds of ``TAPPED``.
    """

    kind: Annotated[str, OneOf("a loss", LOSSES)]
    weight: Annotated[float, Between(0, above=True)] | Literal["auto"] = 1.0
    epochs: tuple[Annotated[int, Between(1)], ...] | None = None
    taps: tuple[Tap, ...] = ()
    teacher: Annotated[str, OneOf("a teacher", TEACHERS)] = FROZEN
    temperature: Annotated[float, Between(0, above=True)] | Literal["auto"] | None = None
    standardize: bool | Literal["auto"] | None = None
    label_smoothing: Annotated[float, Between(0, 1)] | Literal["auto"] | None = None
    target_weight: Annotated[float, Between(0)] | None = None
    rest_weight: Annotated[float, Between(0)] | None = None
    inter_weight: Annotated[float, Between(0)] | None = None
    intra_weight: Annotated[float, Between(0)] | None = None
    over: Annotated[str, OneOf("an axis", ("channels", "heads"))] | None = None
    distance_weight: Annotated[float, Between(0)] | None = None
    angle_weight: Annotated[float, Between(0)] | None = None

    @property
    def given(self) -> dict[str, float | bool | str]:
        """Return the options that the recipe gives."""
        names = [item.name for item in fields(self)[5:]]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def options(self) -> dict[str, float | bool | str]:
        """Return all options of this kind."""
        return {**LOSSES[self.kind], **self.given}

    @property
    def is_open(self) -> bool:
        """Return whether something is left to be chosen."""
        return AUTO in (self.weight, *self.given.values())

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON, options spelled out; :meth:`from_dict` reads it."""
        more: dict[str, Any] = {} if self.epochs is None else {"epochs": list(self.epochs)}
        more |= {"taps": [asdict(tap) for tap in self.taps]} if self.taps else {}
        more |= {"teacher": self.teacher} if self.teacher != FROZEN else {}
        return {"kind": self.kind, "weight": self.weight, **more, **self.options}

    def counts_in(self, epoch: int) -> bool:
        """Return whether the term counts in an epoch, from 0; in the first there is no previous self to follow."""
        return (self.epochs is None or self.epochs[0] <= epoch + 1 <= self.epochs[1]) and (epoch > 0 or self.teacher != LAST_EPOCH)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Loss:
        """Return the loss that :meth:`to_dict` wrote."""
        epochs = tuple(values["epochs"]) if "epochs" in values else None
        return cls(**{**values, "epochs": epochs, "taps": tuple(Tap(**tap) for tap in values.get("taps", ()))})
