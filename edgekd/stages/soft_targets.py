# SPDX-License-Identifier: Apache-2.0
"""Soft targets: the frozen teacher runs once on every sample; all that is distilled from it later reads the stored logits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError
from edgekd.harness import runner
from edgekd.kd import data
from edgekd.kd.output_spec import REGRESSION, OutputSpec
from edgekd.kd.soft_targets import storage
from edgekd.kd.training import distributed, execution
from edgekd.kd.training.execution import ExecutionMode
from edgekd.ports import StageResult, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.recipe import Recipe
    from edgekd.domain.target import Target
    from edgekd.kd.soft_targets.storage import Header, Recompute, SoftTargets
    from edgekd.kd.views import Augment
    from edgekd.ports import Context, Progress

    Teacher = Callable[[list[np.ndarray]], np.ndarray]

NAME = "soft_targets"
CODE: tuple[str, ...] = (
    "stages/soft_targets",
    "kd/data",
    "kd/losses",
    "kd/modules",
    "kd/output_spec",
    "kd/reproducible",
    "kd/soft_targets",
    "kd/teachers",
    "kd/training/distributed",
    "kd/training/execution",
    "kd/views",
    "store/arrays",
    "usercode",
    "domain/losses",
)
SPLITS = ("train", "validation", "unlabelled")
BATCH_SIZE = 128
_QUALITY_NUMBERS = 2**25  # outputs on validation samples that the teacher is judged by
CHUNK = 16 * BATCH_SIZE  # samples; a kill loses at most the work of one chunk


@dataclass(frozen=True, slots=True)
class SoftTargetParams:
    """All that may change the result of a step, beside its inputs. ``model`` and ``augment`` are entry points.

    ``model`` is None for a teacher whose file is a whole model. ``mode`` is where the teacher runs, always in float32.
    """

    model: str | None
    augment: str | None
    views: int
    output: OutputSpec
    soft_target_storage: str
    mode: ExecutionMode
    threads: int
    instruction_set: str


def steps(recipe: Recipe, targets: Sequence[Target]) -> list[Step[SoftTargetParams]]:
    """Return a step for each teacher. Its key has nothing of the distillation: the teacher does not run again for another temperature."""
    del targets  # soft targets do not depend on them
    machine, distill = runner.facts(), recipe.distill
    accelerator, accelerator_name = [*execution.allowed_devices("distill", distill.accelerator).items()][-1]
    planned = []
    for name, source in recipe.soft_target_sources.items():
        params = SoftTargetParams(
            model=None if source.model is None else str(source.model),
            augment=None if distill.augment is None else str(distill.augment),
            views=distill.views or 1,
            output=OutputSpec(recipe.student.task, recipe.student.heads),
            soft_target_storage=distill.soft_target_storage,
            mode=execution.DEFAULT_MODE
            if source.model is None
            else ExecutionMode(accelerator=accelerator, accelerator_name=accelerator_name),
            threads=distributed.world(None, machine["cores"])["threads"],
            instruction_set=machine["instruction_set"],
        )
        inputs = {"teacher": source.artifact, "code": source.code, "views.code": "inspect:views.code.json"}
        for split in SPLITS:
            inputs |= data.split_references(recipe, split, labels=split == "validation")
        runtime = ("onnxruntime",) if source.artifact.endswith(".onnx") else ()
        planned.append(Step(name, NAME, params, inputs, ("torch", "numpy", "safetensors", *runtime)))
    return planned


def run(step: Step[SoftTargetParams], inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Run the teacher; write ``SPLIT.soft_targets.safetensors`` for each split (``kd.soft_targets.storage``), one view of validation."""
    from edgekd.kd import views
    from edgekd.kd.reproducible import deterministic

    params = step.params
    augment = None if params.augment is None else views.load_augmentation(context.recipe_dir, EntryPoint.parse(params.augment))
    splits = {split: data.load_arrays(inputs, split) for split in SPLITS}
    with deterministic(params.threads, params.mode.accelerator):
        teacher, notes = _load_teacher(params, inputs, context.recipe_dir, [array[:BATCH_SIZE] for array in splits["train"]])
        classes = teacher([array[:1] for array in splits["train"]]).shape[1]
        headers = {split: _header(params, inputs, split, len(arrays[0]), classes) for split, arrays in splits.items()}
        progress = _RowProgress(context.progress, sum(header.rows for header in headers.values()))
        recompute: dict[str, Recompute] = {}
        for split, arrays in splits.items():
            make_view = _view_cache(arrays, split, None if split == "validation" else augment)
            _fill(teacher, headers[split], make_view, _partial_file(context, split), progress)
            recompute[split] = _recompute(teacher, make_view)
        if distributed.rank():  # the first rank has the files
            return StageResult()
        soft_targets = {}
        for split, header in headers.items():  # only now, when no work can be lost
            path = context.out / f"{split}.soft_targets.safetensors"
            storage.finish(_partial_file(context, split), header, path)
            soft_targets[split] = storage.open_expected(path, header, recompute[split])
    labels = _class_labels(inputs)
    notes += _shift_warnings(soft_targets, labels) if params.output.is_single_softmax else []
    notes += _quality_warnings(step, soft_targets["validation"], inputs)
    metrics = {"samples": progress.total, "classes": classes, "validation_accuracy": _accuracy(soft_targets["validation"], labels)}
    return StageResult(metrics, tuple(notes))


def _load_teacher(
    params: SoftTargetParams, inputs: Mapping[str, Artifact], recipe_dir: Path, batch: list[np.ndarray]
) -> tuple[Teacher, list[str]]:
    """Return the teacher, and a warning if it runs on the CPU because the accelerator fails or returns other logits for a batch."""
    import numpy as np

    from edgekd.kd.teachers.load import load_teacher

    entry, path = None if params.model is None else EntryPoint.parse(params.model), inputs["teacher"].path
    cpu_teacher, accelerator = load_teacher(recipe_dir, entry, path), params.mode.accelerator
    if accelerator == execution.CPU:
        return cpu_teacher, []
    try:
        teacher = load_teacher(recipe_dir, entry, path, accelerator)
        logits, expected = teacher(batch), cpu_teacher(batch)
        difference = float((np.abs(logits - expected) / np.maximum(1.0, np.abs(expected).max(axis=1, keepdims=True))).max())
        if difference <= storage.TOLERANCE:
            return teacher, []
        why = f"its logits differ by {difference:.2g} of the largest"
    except (RecipeError, RuntimeError, AssertionError) as error:  # no driver, not enough memory, an unsupported operator
        why = str(error).splitlines()[0]
    return cpu_teacher, [f"warning: the teacher runs on the CPU, not on {accelerator}: {why}"]


def _header(params: SoftTargetParams, inputs: Mapping[str, Artifact], split: str, samples: int, classes: int) -> Header:
    return storage.make_header(
        split,
        (1 if split == "validation" else params.views, samples, classes),
        teacher=inputs["teacher"].digest,
        augment=data.digest_of(inputs, "views.code"),
        data=data.digest_of(inputs, f"{split}.inputs."),
        precision="float32" if params.output.task == REGRESSION else "float16",
        slots=0 if params.soft_target_storage == "dense" or params.output.task == REGRESSION else None,
    )


@dataclass(slots=True)
class _RowProgress:
    """Reports how many of all rows are stored."""

    report: Progress
    total: int
    stored: int = 0


def _view_cache(arrays: list[np.ndarray], split: str, augment: Augment | None) -> Callable[[int], list[np.ndarray]]:
    """Return a function that returns a view of a split by its number, and keeps the last one: a single view is in memory at a time."""

    @lru_cache(maxsize=1)
    def make_view(number: int) -> list[np.ndarray]:
        return arrays if augment is None else data.make_view(augment, split, arrays, number)

    return make_view


def _fill(teacher: Teacher, header: Header, make_view: Callable[[int], list[np.ndarray]], path: Path, progress: _RowProgress) -> None:
    """Store the logits of a split, from where a run that was killed stopped."""
    is_first = distributed.rank() == 0
    stored = distributed.broadcast_number(storage.begin(path, header) if is_first else 0)
    progress.stored += stored
    while stored < header.rows:
        view, first = divmod(stored, header.samples)
        rows = range(first, min(header.samples, (first // CHUNK + 1) * CHUNK))
        logits = _predict(teacher, make_view(view), rows)
        stored = storage.append(path, header, stored, logits) if is_first else stored + len(rows)
        progress.stored += len(rows)
        which = f", view {view + 1} of {header.views}" if header.views > 1 else ""
        progress.report(progress.stored / progress.total, f"{header.split}: {rows.stop} of {header.samples} samples{which}")


def _recompute(teacher: Teacher, make_view: Callable[[int], list[np.ndarray]]) -> Recompute:
    """Return a function that runs the teacher again on some rows of a view."""
    return lambda view, rows: teacher([array[rows] for array in make_view(view)])


def _predict(teacher: Teacher, arrays: list[np.ndarray], rows: range) -> np.ndarray:
    """Return the logits of rows; each rank runs the teacher on its share of the batches."""
    import numpy as np
    import torch

    batches = [slice(start, min(start + BATCH_SIZE, rows.stop)) for start in range(rows.start, rows.stop, BATCH_SIZE)]
    shards = [batches[distributed.shard(len(batches), rank)] for rank in range(distributed.world_size())]
    sizes = [sum(batch.stop - batch.start for batch in shard) for shard in shards]
    shard = shards[distributed.rank()] or batches[:1]  # a rank without a batch needs the shape of the logits all the same
    logits = np.concatenate([teacher([array[batch] for array in arrays]) for batch in shard])
    return distributed.all_gather(torch.from_numpy(logits[: sizes[distributed.rank()]]), sizes).numpy()


def _partial_file(context: Context, split: str) -> Path:
    return context.work / f"{split}.soft_targets"


def _class_labels(inputs: Mapping[str, Artifact]) -> np.ndarray | None:
    """Return the classes of the validation split, or None if no sample there has one."""
    import numpy as np

    labels: np.ndarray = np.load(inputs["validation.labels"].path, allow_pickle=False)
    return labels if labels.dtype == np.int64 and labels.ndim == 1 and (labels >= 0).any() else None


def _accuracy(validation: SoftTargets, labels: np.ndarray | None) -> float | None:
    from edgekd.kd.soft_targets import shift

    return None if labels is None else float((shift.top1(validation, 0).classes == labels)[labels >= 0].mean())


def _quality_warnings(step: Step[SoftTargetParams], validation: SoftTargets, inputs: Mapping[str, Artifact]) -> list[str]:
    """Return warnings about a network whose soft targets are hardly worth learning from; ``inspect`` refuses a teacher that exists.

    Raises:
        RecipeError: if the teacher was trained here and is certainly no better than a constant output.
    """
    import numpy as np

    from edgekd.kd.teachers.quality import quality_problems

    path = inputs["teacher"].path
    labels = np.load(inputs["validation.labels"].path, allow_pickle=False)
    rows = np.linspace(0, len(labels) - 1, min(len(labels), max(1, _QUALITY_NUMBERS // validation.header.classes))).astype(np.int64)
    problems = quality_problems(step.params.output, validation.read(0, rows).astype(np.float32), labels[rows])
    name = f"{step.id.removeprefix('soft_targets/') if '/' in step.id else 'the teacher'} ({step.params.model or path.name})"
    if worthless := [problem.text for problem in problems if problem.is_worthless and step.inputs["teacher"].startswith("teach:teacher.")]:
        raise RecipeError(*(f"{name} {text}; train it longer, or with another teacher.train.learning_rate" for text in worthless))
    return [f"warning: {name} {problem.text}" for problem in problems]


def _shift_warnings(soft_targets: Mapping[str, SoftTargets], labels: np.ndarray | None) -> list[str]:
    """Return a warning if the unlabelled samples are from another domain than the validation split."""
    from edgekd.kd.soft_targets import shift

    in_domain, unlabelled = (shift.mean_confidence(soft_targets[split]) for split in ("validation", "unlabelled"))
    if not shift.has_shifted(in_domain, unlabelled):
        return []
    expected = None if labels is None else shift.expected_accuracy(soft_targets["validation"], labels, soft_targets["unlabelled"])
    return [f"warning: {shift.warning(in_domain, unlabelled, expected)}"]
