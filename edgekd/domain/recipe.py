# SPDX-License-Identifier: Apache-2.0
"""The recipe: what a person writes in ``edgekd.toml``. Field names are the keys of the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated

from edgekd.domain.rules import Between, Name, NonEmpty, OneOf
from edgekd.domain.scheme import SCHEMES

Positive = Between(0, above=True)
DTYPES = ("float32", "int32", "int64")
# each kind of loss, with its options and what they are where a recipe does not say; sources: edgekd/kd/losses.py
LOSSES: Mapping[str, Mapping[str, float | bool]] = {
    "ce": {"label_smoothing": 0.0},
    "dist": {"temperature": 1.0, "inter_weight": 1.0, "intra_weight": 1.0},
    "dkd": {"temperature": 4.0, "target_weight": 1.0, "rest_weight": 8.0},
    "hard": {},
    "kl": {"temperature": 4.0, "standardize": False},
    "mse": {},
}
DISTILLED = "distilled"
TWINS = {"alone": 0.0, "smoothed": 0.1}  # students that are trained alike without a teacher, and their label smoothing
OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True, slots=True)
class Entry:
    """User code, written ``file.py:function``; the file is found from the recipe's folder."""

    file: str
    function: str

    def __str__(self) -> str:
        """Return it as it is written."""
        return f"{self.file}:{self.function}"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input of the student; ``shape`` with the batch axis, which is 1."""

    name: Annotated[str, NonEmpty()]
    shape: Annotated[tuple[Annotated[int, Between(1)], ...], NonEmpty()]
    dtype: Annotated[str, OneOf("a dtype", DTYPES)] = "float32"


@dataclass(frozen=True, slots=True)
class Data:
    """``splits()`` returns a mapping from split to torch data set of ``(input, label)`` items.

    Splits: train, validation, calibration (from train), evaluation, and unlabelled if there is one (items are inputs).
    ``max_overlap`` is how many samples of one split may stand, byte for byte, in another.
    """

    splits: Entry
    max_overlap: Annotated[int, Between(0)] = 0


@dataclass(frozen=True, slots=True)
class Training:
    """How the teacher is taught, if the recipe asks: cross-entropy, one-cycle learning rate.

    ``augment(inputs, generator) -> inputs`` works on a batch (a tensor, or a tuple for several inputs).
    """

    epochs: Annotated[int, Between(1)]
    batch_size: Annotated[int, Between(1)] = 128
    optimizer: Annotated[str, OneOf("an optimizer", OPTIMIZERS)] = "adamw"
    learning_rate: Annotated[float, Positive] = 0.003
    weight_decay: Annotated[float, Between(0)] = 0.01
    label_smoothing: Annotated[float, Between(0, 1)] = 0.0
    augment: Entry | None = None
    seed: Annotated[int, Between(0)] = 0
    threads: Annotated[int, Between(1)] | None = None


@dataclass(frozen=True, slots=True)
class Teacher:
    """The reference: a module with weights (or to be taught), or a file that is a whole model.

    ``weights`` is ``.safetensors``, or a file that ``torch.load(weights_only=True)`` reads.
    ``file`` is TorchScript (``.ts``), ``torch.export`` (``.pt2``) or ONNX (``.onnx``).
    """

    model: Entry | None = None
    weights: str | None = None
    file: str | None = None
    train: Training | None = None

    @property
    def artifact(self) -> str:
        """Return the artifact that holds the teacher, ``step:file name``.

        ``inspect`` checks a given teacher and keeps it: weights as ``teacher.safetensors``, a whole model under its suffix.
        """
        if self.file is not None:
            return f"inspect:teacher.{self.file.rpartition('.')[2]}"
        return "teach:teacher.safetensors" if self.train else "inspect:teacher.safetensors"


@dataclass(frozen=True, slots=True)
class Student:
    """``model()`` returns the module; ``inputs`` are its positional arguments in order."""

    model: Entry
    inputs: Annotated[tuple[TensorSpec, ...], NonEmpty()]


@dataclass(frozen=True, slots=True)
class Loss:
    """One term of the distillation loss. An option that is None has the value of ``LOSSES``; a kind takes those it has there."""

    kind: Annotated[str, OneOf("a loss", LOSSES)]
    weight: Annotated[float, Positive] = 1.0
    temperature: Annotated[float, Positive] | None = None
    standardize: bool | None = None
    label_smoothing: Annotated[float, Between(0, 1)] | None = None
    target_weight: Annotated[float, Between(0)] | None = None
    rest_weight: Annotated[float, Between(0)] | None = None
    inter_weight: Annotated[float, Between(0)] | None = None
    intra_weight: Annotated[float, Between(0)] | None = None

    @property
    def given(self) -> dict[str, float | bool]:
        """Return the options that the recipe gives."""
        return {item.name: getattr(self, item.name) for item in fields(self)[2:] if getattr(self, item.name) is not None}

    @property
    def options(self) -> dict[str, float | bool]:
        """Return all options of this kind."""
        return {**LOSSES[self.kind], **self.given}


@dataclass(frozen=True, slots=True)
class Control:
    """Twins: the same student, trained alike without a teacher, from as many seeds; they say whether distillation helps."""

    seeds: Annotated[int, Between(2, 100)]


@dataclass(frozen=True, slots=True)
class Distill:
    """How the student is trained: one-cycle learning rate, epoch chosen on the validation split.

    ``augment`` is as the teacher's; of each sample ``views`` augmented ones are made, the teacher answers each once, and the
    epochs take them in turns.
    """

    epochs: Annotated[int, Between(1)]
    losses: Annotated[tuple[Loss, ...], NonEmpty()] = (Loss("kl", 0.9), Loss("ce", 0.1))
    batch_size: Annotated[int, Between(1)] = 128
    optimizer: Annotated[str, OneOf("an optimizer", OPTIMIZERS)] = "adamw"
    learning_rate: Annotated[float, Positive] = 0.003
    weight_decay: Annotated[float, Between(0)] = 0.01
    seed: Annotated[int, Between(0)] = 0
    threads: Annotated[int, Between(1)] | None = None
    augment: Entry | None = None
    views: Annotated[int, Between(1)] | None = None
    control: Control | None = None


@dataclass(frozen=True, slots=True)
class Quantize:
    """Which candidates are made. ``auto`` is all that the target allows.

    ``io`` is the type of the model's inputs and outputs. ``max_float_ops`` is how many ops a statically quantized
    candidate may keep in float.
    """

    schemes: str | tuple[Annotated[str, OneOf("a scheme", SCHEMES)], ...] = "auto"
    runtimes: str | tuple[str, ...] = "auto"
    io: Annotated[str, OneOf("an io type", ("float32", "int8"))] = "float32"
    max_float_ops: Annotated[int, Between(0)] = 0


@dataclass(frozen=True, slots=True)
class Evaluate:
    """What is scored: ``top1``, or the user's own function.

    ``score(outputs, labels) -> array (n,)`` scores each sample in [0, 1];
    ``metric(outputs, labels) -> float`` scores the whole set and is judged by a bootstrap.
    """

    metric: str | Entry = "top1"
    score: Entry | None = None


@dataclass(frozen=True, slots=True)
class Budget:
    """The product's limits; a line that is None is not judged. Drops are against the teacher."""

    max_accuracy_drop_pp: Annotated[float, Between(0, 100)] | None = None
    min_accuracy_pct: Annotated[float, Between(0, 100)] | None = None
    max_class_drop_pp: Annotated[float, Between(0, 100)] | None = None
    max_latency_p50_ms: Annotated[float, Positive] | None = None
    max_latency_p95_ms: Annotated[float, Positive] | None = None
    max_latency_p99_ms: Annotated[float, Positive] | None = None
    min_speedup_x: Annotated[float, Positive] | None = None
    max_peak_rss_mib: Annotated[float, Positive] | None = None
    max_size_kib: Annotated[float, Positive] | None = None


@dataclass(frozen=True, slots=True)
class ForTarget:
    """What one target changes, key by key, in ``[target.NAME.budget]`` and ``[target.NAME.quantize]``."""

    budget: Budget = Budget()
    quantize: Quantize = Quantize()


@dataclass(frozen=True, slots=True)
class Recipe:
    """One ``edgekd.toml``. ``target`` holds, for each target that is named, the budget and quantization that hold there."""

    schema: Annotated[int, Between(1, 1)]
    name: Annotated[str, Name()]
    data: Data
    teacher: Teacher
    student: Student
    distill: Distill
    quantize: Quantize = Quantize()
    evaluate: Evaluate = Evaluate()
    budget: Budget = Budget()
    target: Mapping[str, ForTarget] = field(default_factory=dict)

    @property
    def arms(self) -> dict[str, tuple[str, ...]]:
        """Return the steps that train each arm of the control, seed by seed; the student that ships is the first of its arm."""
        if self.distill.control is None:
            return {}
        numbers = range(self.distill.control.seeds)
        arms = {arm: tuple(f"distill/{arm}/{number}" for number in numbers) for arm in (DISTILLED, *TWINS)}
        return {**arms, DISTILLED: ("distill", *arms[DISTILLED][1:])}

    def for_target(self, name: str) -> ForTarget:
        """Return the budget and quantization that hold for a target."""
        return self.target.get(name, ForTarget(self.budget, self.quantize))
