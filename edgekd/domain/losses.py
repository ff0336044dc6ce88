# SPDX-License-Identifier: Apache-2.0
"""The losses that a recipe can name: their kinds, their options, and the taps that some of them match."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from edgekd.domain.rules import Between, NonEmpty, OneOf

if TYPE_CHECKING:
    from collections.abc import Mapping

# each kind of loss, with its options and their defaults; sources: edgekd/kd/losses/
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
    "mse_labels": {},
    "relation": {"distance_weight": 1.0, "angle_weight": 2.0},
}
REGRESSION_LOSSES = ("mse", "mse_labels")  # losses that need no classes
LABEL_LOSSES = ("ce", "mse_labels")  # losses of labels alone, without a teacher
TAPPED = ("attention", "block", "hidden", "hint", "relation")  # losses of tensors inside the networks; the others take logits
FROZEN: Final = "frozen"
EMA, LAST_EPOCH = "ema", "last_epoch"
AUTO: Final = "auto"  # a value that a search chooses
TEACHERS = (FROZEN, EMA, LAST_EPOCH)  # whose logits a loss compares: the trained teachers', or those of an auxiliary model


@dataclass(frozen=True, slots=True)
class Tap:
    """Two tensors to match: the output of a module of the student and that of a module of the teacher.

    Attributes:
        student: Dotted path of the module; ``path:1`` is the second output of a module that returns several.
        teacher: Dotted path in the teacher.
    """

    student: Annotated[str, NonEmpty()]
    teacher: Annotated[str, NonEmpty()]


@dataclass(frozen=True, slots=True)
class Loss:
    """One term of the distillation loss. An option that is None has the default of its kind, in ``LOSSES``.

    Attributes:
        kind: Name of the loss.
        weight: Factor of the term in the sum; "auto" lets short runs choose it on the validation split.
        epochs: First and last epoch (from 1) in which the term is active.
        taps: Pairs of modules, for losses of tensors inside the networks.
        teacher: Whose logits the loss compares: the trained teacher's, or those of an earlier version of the student.
        temperature: Divisor of the logits before softmax, or "auto".
        standardize: Standardize the logits of each sample first, or "auto".
        label_smoothing: Share of the target distribution that is uniform, or "auto".
        target_weight: Weight of the KL divergence between the label and all other classes.
        rest_weight: Weight of the KL divergence among the other classes.
        inter_weight: Weight of the correlation between the classes of a sample.
        intra_weight: Weight of the correlation between the samples of a class.
        over: What attention is computed over: channels of feature maps, or heads of attention probabilities.
        distance_weight: Weight of distances between samples.
        angle_weight: Weight of angles between samples.
    """

    kind: Annotated[str, OneOf("a loss", LOSSES)]
    weight: Annotated[float, Between(0, 1e6, above=True)] | Literal["auto"] = 1.0
    epochs: tuple[Annotated[int, Between(1)], ...] | None = None
    taps: tuple[Tap, ...] = ()
    teacher: Annotated[str, OneOf("a teacher", TEACHERS)] = FROZEN
    temperature: Annotated[float, Between(0.01, 1000)] | Literal["auto"] | None = None
    standardize: bool | Literal["auto"] | None = None
    label_smoothing: Annotated[float, Between(0, 1)] | Literal["auto"] | None = None
    target_weight: Annotated[float, Between(0, 1e6)] | None = None
    rest_weight: Annotated[float, Between(0, 1e6)] | None = None
    inter_weight: Annotated[float, Between(0, 1e6)] | None = None
    intra_weight: Annotated[float, Between(0, 1e6)] | None = None
    over: Annotated[str, OneOf("an axis", ("channels", "heads"))] | None = None
    distance_weight: Annotated[float, Between(0, 1e6)] | None = None
    angle_weight: Annotated[float, Between(0, 1e6)] | None = None

    @property
    def explicit_options(self) -> dict[str, float | bool | str]:
        """Return the options that the recipe sets."""
        options = {item.name: getattr(self, item.name) for item in fields(self)[5:]}
        return {name: value for name, value in options.items() if value is not None}

    @property
    def options(self) -> dict[str, float | bool | str]:
        """Return all options of this kind, with defaults."""
        return {**LOSSES[self.kind], **self.explicit_options}

    @property
    def has_auto(self) -> bool:
        """Return whether a search has to choose something."""
        return AUTO in (self.weight, *self.explicit_options.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the loss as plain JSON with all options; :meth:`from_dict` reads it."""
        optional: dict[str, Any] = {} if self.epochs is None else {"epochs": list(self.epochs)}
        optional |= {"taps": [asdict(tap) for tap in self.taps]} if self.taps else {}
        optional |= {"teacher": self.teacher} if self.teacher != FROZEN else {}
        return {"kind": self.kind, "weight": self.weight, **optional, **self.options}

    def describe(self) -> str:
        """Return the loss as reports show it: its weight, its kind, and the options that are neither 0 nor false.

        >>> Loss("kl", 0.9, temperature=2.0, standardize=True).describe(), Loss("ce").describe()
        ('0.9 kl (temperature 2, standardize)', 'ce')
        """
        options = {name: value for name, value in self.to_dict().items() if value and name not in {"kind", "weight", "taps"}}
        values = {name: f" {value:g}" if type(value) is float else f" {value}" for name, value in options.items()}
        parts = [name + ("" if options[name] is True else values[name]) for name in options]
        weight = "" if self.weight == 1 else f"{self.weight:g} "
        return weight + self.kind + (f" ({', '.join(parts)})" if parts else "")

    def is_active_in(self, epoch: int) -> bool:
        """Return whether the term is active in an epoch, from 0; there is no last epoch's model in the first."""
        return (self.epochs is None or self.epochs[0] <= epoch + 1 <= self.epochs[1]) and (epoch > 0 or self.teacher != LAST_EPOCH)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Loss:
        """Return the loss that :meth:`to_dict` wrote."""
        epochs = tuple(values["epochs"]) if "epochs" in values else None
        return cls(**{**values, "epochs": epochs, "taps": tuple(Tap(**tap) for tap in values.get("taps", ()))})
