# SPDX-License-Identifier: Apache-2.0
"""The recipe: what a person writes in ``edgekd.toml``. Field names are the keys of the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from edgekd.domain.losses import Loss
from edgekd.domain.rules import Between, Name, NonEmpty, OneOf
from edgekd.domain.scheme import SCHEMES

Positive = Between(0, above=True)
DTYPES = ("float32", "int32", "int64")
DISTILLED = "distilled"
BASELINES = {"no_teacher": 0.0, "label_smoothing": 0.1}  # students that are trained alike without a teacher, and their label smoothing
PSEUDO_LABELS = "pseudo_labels"  # the twin that follows the answers of the one that was trained alone
OPTIMIZERS = ("adamw", "sgd")
PRECISIONS = ("auto", "float32", "bfloat16")
NO_ACCELERATOR = "none"
ACCELERATORS = ("auto", NO_ACCELERATOR, "cuda", "mps")


@dataclass(frozen=True, slots=True)
class EntryPoint:
    """User code, written ``file.py:function``; the file is found from the recipe's folder."""

    file: str
    function: str

    def __str__(self) -> str:
        """Return it as it is written."""
        return f"{self.file}:{self.function}"

    @classmethod
    def parse(cls, text: str) -> EntryPoint:
        """Return the entry that is written so."""
        return cls(*text.rsplit(":", 1))


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

    splits: EntryPoint
    max_overlap: Annotated[int, Between(0)] = 0


@dataclass(frozen=True, slots=True)
class Training:
    """How the teacher is taught, if the recipe asks: cross-entropy, one-cycle learning rate.

    ``augment(inputs, generator) -> inputs`` works on a batch (a tensor, or a tuple for several inputs). ``precision`` and
    ``accelerator``: ``auto`` tries bfloat16 and the accelerators that this machine has, and takes what pays.
    """

    epochs: Annotated[int, Between(1)]
    batch_size: Annotated[int, Between(1)] = 128
    optimizer: Annotated[str, OneOf("an optimizer", OPTIMIZERS)] = "adamw"
    learning_rate: Annotated[float, Positive] = 0.003
    weight_decay: Annotated[float, Between(0)] = 0.01
    label_smoothing: Annotated[float, Between(0, 1)] = 0.0
    augment: EntryPoint | None = None
    precision: Annotated[str, OneOf("a precision", PRECISIONS)] = "auto"
    accelerator: Annotated[str, OneOf("an accelerator", ACCELERATORS)] = "auto"
    seed: Annotated[int, Between(0)] = 0
    threads: Annotated[int, Between(1)] | None = None
    checkpoints: Annotated[int, Between(0)] = 0


@dataclass(frozen=True, slots=True)
class Teacher:
    """The reference, or a further teacher: a module with weights (or to be taught), or a file that is a whole model.

    ``weights`` is ``.safetensors``, or a file that ``torch.load(weights_only=True)`` reads.
    ``file`` is TorchScript (``.ts``), ``torch.export`` (``.pt2``), ONNX (``.onnx``), or ``.safetensors``: answers that were
    stored with ``edgekd.save_teacher_logits``, of a teacher that is not here.
    ``checkpoints`` are earlier weights of the same module, the earliest first: they teach before it does, in turns of as many
    epochs. ``weight`` is its share where there are several teachers.
    """

    model: EntryPoint | None = None
    weights: str | None = None
    file: str | None = None
    train: Training | None = None
    checkpoints: tuple[str, ...] = ()
    weight: Annotated[float, Positive] = 1.0

    @property
    def artifact(self) -> str:
        """Return the artifact that holds the teacher, ``step:file name``.

        ``inspect`` checks a given teacher and keeps it: weights as ``teacher.safetensors``, a whole model under its suffix.
        """
        return "teach:teacher.safetensors" if self.train and self.file is None else f"inspect:teacher.{self.suffix}"

    @property
    def suffix(self) -> str:
        """Return the suffix of the file in which it is kept."""
        return "safetensors" if self.file is None else self.file.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class Assistant:
    """A network between teacher and student in size: it is distilled from the teacher, and the student from it."""

    model: EntryPoint
    epochs: Annotated[int, Between(1)] | None = None


@dataclass(frozen=True, slots=True)
class SoftTargetSource:
    """What answers the samples in a step of ``soft_targets``: the artifact that holds it, its code, and the entry of its module."""

    model: EntryPoint | None
    artifact: str
    code: str


@dataclass(frozen=True, slots=True)
class Student:
    """``model()`` returns the module; ``inputs`` are its positional arguments in order.

    ``answers`` (n, C) are logits of ``classes``, of independent ``labels``, or ``numbers``. ``heads`` are the widths of several
    softmaxes side by side, as of the tokens of a sequence; a sample then has a class for each.
    """

    model: EntryPoint
    inputs: Annotated[tuple[TensorSpec, ...], NonEmpty()]
    task: Annotated[str, OneOf("a task", ("multiclass", "multilabel", "regression"))] = "multiclass"
    heads: tuple[Annotated[int, Between(2)], ...] = ()

    @property
    def form(self) -> dict[str, Any]:
        """Return what is not one softmax, as plain JSON; nothing if it is one."""
        return {"task": self.task, "heads": list(self.heads)} if self.heads or self.task != "multiclass" else {}


@dataclass(frozen=True, slots=True)
class Baselines:
    """Twins: the same student, trained alike without a teacher, from as many seeds; they say whether distillation helps.

    With ``pseudo_labels``, one more learns from the labels and from what the student alone says of the unlabelled samples.

    Source: pseudo-labels: Lee, ICML workshop on challenges in representation learning, 2013.
    """

    seeds: Annotated[int, Between(2, 100)]
    pseudo_labels: bool = False


@dataclass(frozen=True, slots=True)
class Distill:
    """How the student is trained: one-cycle learning rate, epoch chosen on the validation split.

    ``augment`` is as the teacher's; of each sample ``views`` augmented ones are made, the teacher answers each once, and the
    epochs take them in turns. ``teachers`` are further ones beside the reference: the student follows the mean of all their
    answers, by their weights, or for each sample by their ``confidence`` too. ``assistants`` make a chain.
    ``soft_target_storage``: of more than 256 classes, a sample of each of the teacher's answers is kept, unless it is ``dense``.
    ``search_share``: how many epochs may be spent on choosing what losses leave to ``auto``, as a share of ``epochs``.
    ``break_even_inferences``: training ends after as many epochs as so many inferences on the device win back, by an estimate.
    ``sizes`` are students of other widths or depths: they are distilled alike, and the report says which would be large enough.
    """

    epochs: Annotated[int, Between(1)]
    losses: Annotated[tuple[Loss, ...], NonEmpty()] = (Loss("kl", 0.9), Loss("ce", 0.1))
    batch_size: Annotated[int, Between(1)] = 128
    optimizer: Annotated[str, OneOf("an optimizer", OPTIMIZERS)] = "adamw"
    learning_rate: Annotated[float, Positive] = 0.003
    weight_decay: Annotated[float, Between(0)] = 0.01
    seed: Annotated[int, Between(0)] = 0
    threads: Annotated[int, Between(1)] | None = None
    augment: EntryPoint | None = None
    views: Annotated[int, Between(1)] | None = None
    teachers: tuple[Teacher, ...] = ()
    teacher_weighting: Annotated[str, OneOf("a teacher weighting", ("fixed", "confidence"))] = "fixed"
    assistants: tuple[Assistant, ...] = ()
    search_share: Annotated[float, Positive] = 1.0
    break_even_inferences: Annotated[int, Between(1)] | None = None
    sizes: tuple[EntryPoint, ...] = ()
    precision: Annotated[str, OneOf("a precision", PRECISIONS)] = "auto"
    accelerator: Annotated[str, OneOf("an accelerator", ACCELERATORS)] = "auto"
    soft_target_storage: Annotated[str, OneOf("a storage", ("auto", "dense"))] = "auto"
    baselines: Baselines | None = None


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

    metric: str | EntryPoint = "top1"
    score: EntryPoint | None = None


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
class TargetOverrides:
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
    target: Mapping[str, TargetOverrides] = field(default_factory=dict)

    @property
    def soft_target_sources(self) -> dict[str, SoftTargetSource]:
        """Return what answers the samples, by its step: the reference first, then further teachers, checkpoints, assistants."""
        found = {"soft_targets": SoftTargetSource(self.teacher.model, self.teacher.artifact, "inspect:teacher.code.json")}
        for number, teacher in enumerate(self.distill.teachers):
            kept, code = f"inspect:teacher.{number}.{teacher.suffix}", f"inspect:teacher.{number}.code.json"
            found[f"soft_targets/teacher/{number}"] = SoftTargetSource(teacher.model, kept, code)
        for number in range(self.checkpoints):
            kept = f"{'teach' if self.teacher.train else 'inspect'}:checkpoint.{number}.safetensors"
            found[f"soft_targets/checkpoint/{number}"] = SoftTargetSource(self.teacher.model, kept, "inspect:teacher.code.json")
        for number, assistant in enumerate(self.distill.assistants):
            kept, code = f"distill/assistant/{number}:student.safetensors", f"inspect:assistant.{number}.code.json"
            found[f"soft_targets/assistant/{number}"] = SoftTargetSource(assistant.model, kept, code)
        for number, name in enumerate(self.arms.get(PSEUDO_LABELS, ())):
            kept = f"{self.arms['no_teacher'][number]}:student.safetensors"
            found[f"soft_targets/{name.removeprefix('distill/')}"] = SoftTargetSource(self.student.model, kept, "inspect:student.code.json")
        return found

    @property
    def sizes(self) -> dict[str, EntryPoint]:
        """Return the students of other sizes, by the steps that train them."""
        return {f"distill/size/{number}": entry for number, entry in enumerate(self.distill.sizes)}

    @property
    def checkpoints(self) -> int:
        """Return how many earlier weights of the teacher teach."""
        return len(self.teacher.checkpoints) if self.teacher.train is None else self.teacher.train.checkpoints

    @property
    def arms(self) -> dict[str, tuple[str, ...]]:
        """Return the steps that train each arm of the control, seed by seed; the student that ships is the first of its arm."""
        if self.distill.baselines is None:
            return {}
        numbers = range(self.distill.baselines.seeds)
        names = (DISTILLED, *BASELINES, *([PSEUDO_LABELS] if self.distill.baselines.pseudo_labels else []))
        arms = {arm: tuple(f"distill/{arm}/{number}" for number in numbers) for arm in names}
        return {**arms, DISTILLED: ("distill", *arms[DISTILLED][1:])}

    def overrides_for(self, name: str) -> TargetOverrides:
        """Return the budget and quantization that hold for a target."""
        return self.target.get(name, TargetOverrides(self.budget, self.quantize))
