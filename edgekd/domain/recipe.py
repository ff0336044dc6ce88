# SPDX-License-Identifier: Apache-2.0
"""The recipe: what a person writes in ``edgekd.toml``. Field names are the keys of the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from edgekd.domain.budget import Budget
from edgekd.domain.losses import Loss
from edgekd.domain.rules import Between, Name, NonEmpty, OneOf, Positive, Threads
from edgekd.domain.scheme import Quantize

DTYPES = ("float32", "int32", "int64")
DISTILLED = "distilled"
BASELINES = {"no_teacher": 0.0, "label_smoothing": 0.1}  # students without a teacher; their label smoothing, where none is searched
PSEUDO_LABELS = "pseudo_labels"  # the baseline that learns from predictions of the baseline no_teacher
OPTIMIZERS = ("adamw", "sgd")
PRECISIONS = ("auto", "float32", "bfloat16")
MOST_EPOCHS = 1000  # of "auto"
NO_ACCELERATOR = "none"
ACCELERATORS = ("auto", NO_ACCELERATOR, "cuda", "mps")


@dataclass(frozen=True, slots=True)
class EntryPoint:
    """User code, written ``file.py:function``; the path is relative to the recipe's folder."""

    file: str
    function: str

    def __str__(self) -> str:
        """Return the entry point as a recipe has it."""
        return f"{self.file}:{self.function}"

    @classmethod
    def parse(cls, text: str) -> EntryPoint:
        """Return the entry point of ``file.py:function``."""
        return cls(*text.rsplit(":", 1))


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input of the student.

    Attributes:
        name: Name of the input in the model file.
        shape: Shape with the batch axis, which is 1.
        dtype: Type of the elements.
    """

    name: Annotated[str, NonEmpty()]
    shape: Annotated[tuple[Annotated[int, Between(1)], ...], NonEmpty()]
    dtype: Annotated[str, OneOf("a dtype", DTYPES)] = "float32"


@dataclass(frozen=True, slots=True)
class Data:
    """The data sets.

    Attributes:
        splits: Function that maps train, validation, calibration, evaluation and unlabelled to data sets of ``(input, label)``.
        max_overlap: How many samples of one split may also be in another, byte for byte.
        reads: Files, folders and globs (from the recipe's folder) that compiled code or another process reads, which edgekd cannot see.
    """

    splits: EntryPoint
    max_overlap: Annotated[int, Between(0)] = 0
    reads: tuple[Annotated[str, NonEmpty()], ...] = ()


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """Options of every training, with a one-cycle learning rate.

    Attributes:
        epochs: Number of epochs; for a student, "auto" is as many as fit in ``max_minutes``, at most 1,000.
        batch_size: Samples per step.
        optimizer: The optimizer.
        learning_rate: Peak of the one-cycle schedule.
        weight_decay: Decoupled weight decay (AdamW), or L2 penalty (SGD).
        augment: Function ``augment(inputs, generator) -> inputs`` of a batch (a tensor, or a tuple for several inputs).
        precision: Precision of the forward and backward pass; "auto" uses bfloat16 where a dry run shows that it is faster.
        accelerator: The accelerator; "auto" uses one of this machine where a dry run shows that it is faster.
        seed: Seed of weights, data order and augmentation.
        threads: CPU threads, by default all cores; another number gives other bits.
    """

    epochs: Annotated[int, Between(1, 100_000)] | Literal["auto"]
    batch_size: Annotated[int, Between(1)] = 128
    optimizer: Annotated[str, OneOf("an optimizer", OPTIMIZERS)] = "adamw"
    learning_rate: Annotated[float, Between(0, 1000, above=True)] = 0.003
    weight_decay: Annotated[float, Between(0, 1000)] = 0.01
    augment: EntryPoint | None = None
    precision: Annotated[str, OneOf("a precision", PRECISIONS)] = "auto"
    accelerator: Annotated[str, OneOf("an accelerator", ACCELERATORS)] = "auto"
    seed: Annotated[int, Between(0, 2**32 - 1)] = 0
    threads: Annotated[int, Threads] | None = None


@dataclass(frozen=True, slots=True)
class Training(TrainingOptions):
    """How the teacher is trained: with cross-entropy.

    Attributes:
        epochs: Number of epochs.
        label_smoothing: Share of the target distribution that is uniform.
        checkpoints: How many earlier weights are saved; the student learns from these first.
    """

    epochs: Annotated[int, Between(1, 100_000)]
    label_smoothing: Annotated[float, Between(0, 1)] = 0.0
    checkpoints: Annotated[int, Between(0)] = 0


@dataclass(frozen=True, slots=True)
class Teacher:
    """A teacher: a module with weights, a module to train, or a file that is a whole model. The first teacher is the reference.

    Attributes:
        model: Function that returns the module.
        weights: Weights of the module: ``.safetensors``, or a file that ``torch.load(weights_only=True)`` reads (``.pt``, ``.pth``,
            ``.bin``, ``.ckpt``, ...), also with a prefix or in a checkpoint.
        file: A whole model: TorchScript (``.ts``), ``torch.export`` (``.pt2``), ONNX, or logits stored by ``save_teacher_logits``.
        trusted: Allows a ``file`` that is a program, TorchScript or ``torch.export``: it can read and write files when it runs.
        train: Trains the module, instead of ``weights``.
        checkpoints: Earlier weights of the same module, the earliest first; each teaches for an equal share of the epochs.
        weight: Share of this teacher in an ensemble.
    """

    model: EntryPoint | None = None
    weights: str | None = None
    file: str | None = None
    trusted: bool = False
    train: Training | None = None
    checkpoints: tuple[str, ...] = ()
    weight: Annotated[float, Positive] = 1.0

    @property
    def artifact(self) -> str:
        """Return the artifact that holds the teacher, ``step:file name``.

        ``inspect`` checks and stores a teacher that exists: weights as ``teacher.safetensors``, a whole model under its suffix.
        """
        return "teach:teacher.safetensors" if self.train and self.file is None else f"inspect:teacher.{self.suffix}"

    @property
    def suffix(self) -> str:
        """Return the suffix of the artifact."""
        return "safetensors" if self.file is None else self.file.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class Assistant:
    """A network between teacher and student in size: distilled from the teacher, and then the teacher of the student.

    Attributes:
        model: Function that returns the module.
        epochs: Number of epochs, by default as for the student.
    """

    model: EntryPoint
    epochs: Annotated[int, Between(1)] | None = None


@dataclass(frozen=True, slots=True)
class SoftTargetSource:
    """The network of a step of ``soft_targets``: the artifact that holds it, that of its code, and the entry point of its module."""

    model: EntryPoint | None
    artifact: str
    code: str


@dataclass(frozen=True, slots=True)
class Student:
    """The network that ships.

    Attributes:
        model: Function that returns the module.
        inputs: Positional arguments of the module, in order.
        task: What the outputs (n, C) are: logits of one softmax, logits of independent labels, or numbers.
        heads: Widths of several softmaxes side by side, such as the tokens of a sequence; a sample has a class for each.
    """

    model: EntryPoint
    inputs: Annotated[tuple[TensorSpec, ...], NonEmpty()]
    task: Annotated[str, OneOf("a task", ("multiclass", "multilabel", "regression"))] = "multiclass"
    heads: tuple[Annotated[int, Between(2)], ...] = ()


@dataclass(frozen=True, slots=True)
class Baselines:
    """Students trained in the same manner without a teacher, with and without label smoothing; they show whether distillation helps.

    Attributes:
        seeds: How many students of each kind, one per seed.
        pseudo_labels: Add a baseline that learns from pseudo-labels of unlabelled samples (Lee, ICML workshop 2013).
    """

    seeds: Annotated[int, Between(2, 100)]
    pseudo_labels: bool = False


@dataclass(frozen=True, slots=True)
class Distill(TrainingOptions):
    """How the student is trained.

    Attributes:
        max_minutes: End training after as many epochs as fit in so many minutes, the search included (an estimate).
        losses: Terms of the loss; their weighted sum is minimized.
        views: How many augmented or mixed versions of each sample are made; teacher and student see the same, the epochs use them in turn.
        mixup: Mix each sample of a view with another, and their labels; the alpha of the beta distribution that draws the shares.
        teachers: Further teachers; the student learns from the weighted mean of the ensemble's logits.
        teacher_weighting: Weights of an ensemble: those of the teachers, or for each sample also their confidence.
        assistants: Networks between teacher and student, as a chain.
        search_share: Epochs that the search for "auto" values may take, as a share of ``epochs``.
        ships: "best": a student of the labels alone if it is as good on validation (default with "auto"); or always "distilled".
        break_even_inferences: End training after as many epochs as so many inferences on the device pay for (an estimate).
        sizes: Students of other widths or depths, distilled in the same manner; the report shows which would be large enough.
        soft_target_storage: "auto" stores a sample of the logits if there are more than 256 classes, "dense" stores all.
        baselines: Students without a teacher, for comparison.
    """

    max_minutes: Annotated[float, Positive] | None = None
    losses: Annotated[tuple[Loss, ...], NonEmpty()] = (Loss("kl", 0.9), Loss("ce", 0.1))
    views: Annotated[int, Between(1, 10_000)] | None = None
    mixup: Annotated[float, Between(0.01, 100)] | None = None
    teachers: tuple[Teacher, ...] = ()
    teacher_weighting: Annotated[str, OneOf("a teacher weighting", ("fixed", "confidence"))] = "fixed"
    assistants: tuple[Assistant, ...] = ()
    search_share: Annotated[float, Positive] = 3.0
    ships: Annotated[str, OneOf("what ships", ("best", "distilled"))] | None = None
    break_even_inferences: Annotated[int, Between(1)] | None = None
    sizes: tuple[EntryPoint, ...] = ()
    soft_target_storage: Annotated[str, OneOf("a storage", ("auto", "dense"))] = "auto"
    baselines: Baselines | None = None


@dataclass(frozen=True, slots=True)
class Evaluate:
    """How outputs are scored.

    Attributes:
        metric: "top1", or a function ``metric(outputs, labels) -> float`` of the whole set, at most 1, higher for better outputs.
        score: Function ``score(outputs, labels) -> array (n,)`` that scores each sample from 0 to 1.
    """

    metric: Literal["top1"] | EntryPoint = "top1"
    score: EntryPoint | None = None


@dataclass(frozen=True, slots=True)
class TargetOverrides:
    """What one target changes, key by key.

    Attributes:
        budget: Limits for this target.
        quantize: Candidates for this target.
    """

    budget: Budget = field(default_factory=Budget)
    quantize: Quantize = field(default_factory=Quantize)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to build, and the budget that it has to meet.

    Attributes:
        schema: Version of this format.
        name: Name of the model file.
        data: The data sets.
        teacher: The reference for accuracy and latency.
        student: The network that ships.
        distill: How the student is trained.
        quantize: Which candidates are built.
        evaluate: How outputs are scored.
        budget: The product's limits.
        target: Budget and quantization for single targets, by their names.
    """

    schema: Annotated[int, Between(1, 1)]
    name: Annotated[str, Name()]
    data: Data
    teacher: Teacher
    student: Student
    distill: Distill
    quantize: Quantize = field(default_factory=Quantize)
    evaluate: Evaluate = field(default_factory=Evaluate)
    budget: Budget = field(default_factory=Budget)
    target: Mapping[str, TargetOverrides] = field(default_factory=dict)

    @property
    def soft_target_sources(self) -> dict[str, SoftTargetSource]:
        """Return the networks whose logits are stored, by step: the reference, further teachers, checkpoints, assistants, baselines."""
        reference, student = self.teacher.model, self.student.model
        code = "inspect:teacher.code.json"
        sources = {"soft_targets": SoftTargetSource(reference, self.teacher.artifact, code)}
        for number, teacher in enumerate(self.distill.teachers):
            name = f"inspect:teacher.{number}"
            sources[f"soft_targets/teacher/{number}"] = SoftTargetSource(teacher.model, f"{name}.{teacher.suffix}", f"{name}.code.json")
        stage = "teach" if self.teacher.train else "inspect"
        for number in range(self.checkpoint_count):
            artifact = f"{stage}:checkpoint.{number}.safetensors"
            sources[f"soft_targets/checkpoint/{number}"] = SoftTargetSource(reference, artifact, code)
        for number, assistant in enumerate(self.distill.assistants):
            artifact = f"distill/assistant/{number}:student.safetensors"
            sources[f"soft_targets/assistant/{number}"] = SoftTargetSource(
                assistant.model, artifact, f"inspect:assistant.{number}.code.json"
            )
        for step, baseline in zip(self.methods.get(PSEUDO_LABELS, ()), self.methods.get("no_teacher", ()), strict=False):
            name = step.replace("distill", "soft_targets", 1)
            sources[name] = SoftTargetSource(student, f"{baseline}:student.safetensors", "inspect:student.code.json")
        return sources

    @property
    def sizes(self) -> dict[str, EntryPoint]:
        """Return the students of other sizes, by the steps that train them."""
        return {f"distill/size/{number}": entry for number, entry in enumerate(self.distill.sizes)}

    @property
    def checkpoint_count(self) -> int:
        """Return how many earlier weights of the teacher the student learns from."""
        return len(self.teacher.checkpoints) if self.teacher.train is None else self.teacher.train.checkpoints

    @property
    def methods(self) -> dict[str, tuple[str, ...]]:
        """Return the steps that train each method of the comparison, one per seed; the first distilled student is the one that ships."""
        if self.distill.baselines is None:
            return {}
        seeds = range(self.distill.baselines.seeds)
        names = (DISTILLED, *BASELINES, *([PSEUDO_LABELS] if self.distill.baselines.pseudo_labels else []))
        methods = {method: tuple(f"distill/{method}/{seed}" for seed in seeds) for method in names}
        return {**methods, DISTILLED: ("distill", *methods[DISTILLED][1:])}

    def overrides_for(self, name: str) -> TargetOverrides:
        """Return the budget and quantization for a target."""
        return self.target.get(name, TargetOverrides(self.budget, self.quantize))
