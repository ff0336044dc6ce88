# SPDX-License-Identifier: Apache-2.0
"""Soft targets: the frozen teacher runs once on every sample; all that is distilled from it later reads the stored logits."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import lru_cache, partial
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
    from edgekd.kd.teachers.layouts import Padding, Submit
    from edgekd.kd.views import ViewOptions
    from edgekd.ports import Context, Progress

    Teacher = Callable[[list[np.ndarray]], np.ndarray]
    Predict = Callable[[list[np.ndarray], range], Callable[[], np.ndarray]]

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
BATCH_SIZE, MIN_BATCH_SIZE, ACCELERATOR_BATCH_SIZE = 64, 8, 128
BATCH_NUMBERS = 2**18  # in the inputs of a batch on a CPU: larger ones do not fit its caches, and take memory in each thread
_QUALITY_NUMBERS = 2**25  # outputs on validation samples that the teacher is judged by
CHUNK = 2048  # samples that are stored at once; the next ones are computed meanwhile, so a kill loses at most the work of two chunks


@dataclass(frozen=True, slots=True)
class SoftTargetParams:
    """All that may change the result of a step, beside its inputs. ``model`` and ``augment`` are entry points.

    ``model`` is None for a teacher whose file is a whole model. ``mode`` is where the teacher runs, always in float32.
    """

    model: str | None
    augment: str | None
    views: int
    mixup: float | None
    output: OutputSpec
    soft_target_storage: str
    mode: ExecutionMode
    instruction_set: str


def steps(recipe: Recipe, targets: Sequence[Target]) -> list[Step[SoftTargetParams]]:
    """Return a step for each teacher. Its key has nothing of the distillation: the teacher does not run again for another temperature.

    Nor has it the number of threads: each batch is computed by one thread, so the logits are the same bits for any number.
    """
    del targets  # soft targets do not depend on them
    machine, distill = runner.facts(), recipe.distill
    threads = distributed.world(distill.threads, machine["cores"])["threads"]
    accelerator, accelerator_name = [*execution.allowed_devices("distill", distill.accelerator).items()][-1]
    planned = []
    for name, source in recipe.soft_target_sources.items():
        params = SoftTargetParams(
            model=None if source.model is None else str(source.model),
            augment=None if distill.augment is None else str(distill.augment),
            views=distill.views or 1,
            mixup=distill.mixup,
            output=OutputSpec(recipe.student.task, recipe.student.heads),
            soft_target_storage=distill.soft_target_storage,
            mode=execution.DEFAULT_MODE
            if source.model is None
            else ExecutionMode(accelerator=accelerator, accelerator_name=accelerator_name),
            instruction_set=machine["instruction_set"],
        )
        inputs = {"teacher": source.artifact, "code": source.code, "views.code": "inspect:views.code.json"}
        for split in SPLITS:
            inputs |= data.split_references(recipe, split, labels=split == "validation")
        runtime = ("onnxruntime",) if source.artifact.endswith(".onnx") else ()
        planned.append(Step(name, NAME, params, inputs, ("torch", "numpy", "safetensors", *runtime), threads))
    return planned


def run(step: Step[SoftTargetParams], inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Run the teacher; write ``SPLIT.soft_targets.safetensors`` for each split (``kd.soft_targets.storage``), one view of validation."""
    from edgekd.kd import views
    from edgekd.kd.reproducible import deterministic
    from edgekd.kd.teachers import layouts

    params = step.params
    options = views.view_options(context.recipe_dir, params.augment, params.mixup)
    splits = {split: data.load_arrays(inputs, split) for split in SPLITS}
    entry = None if params.model is None else EntryPoint.parse(params.model)
    with deterministic(1, params.mode.accelerator):  # one thread per batch
        batch = [array[:BATCH_SIZE] for array in splits["train"]]
        accelerator = None if params.mode.accelerator == execution.CPU else params.mode.accelerator
        teachers, notes = layouts.load_teachers(context.recipe_dir, entry, inputs["teacher"].path, accelerator, step.threads, batch)
        padding, further_notes = layouts.removable_padding(teachers[0], splits["train"])
        classes = teachers[0]([array[:1] for array in batch]).shape[1]
        headers = {split: _header(params, inputs, split, len(arrays[0]), classes) for split, arrays in splits.items()}
        progress = _RowProgress(context.progress, sum(header.rows for header in headers.values()))
        recompute: dict[str, Recompute] = {}
        with layouts.run_in_threads(teachers, entry) as submit:
            for split, arrays in splits.items():
                make_view = _view_cache(arrays, split, None if split == "validation" else options)
                predict = partial(_predict, submit, padding, _batch_size(params, arrays))
                _fill(predict, headers[split], make_view, _partial_file(context, split), progress)
                recompute[split] = _recompute(teachers[0], make_view)
        if distributed.rank():  # the first rank has the files
            return StageResult()
        soft_targets = {}
        for split, header in headers.items():  # only now, when no work can be lost
            path = context.out / f"{split}.soft_targets.safetensors"
            storage.finish(_partial_file(context, split), header, path)
            soft_targets[split] = storage.open_expected(path, header, recompute[split])
    labels = _class_labels(inputs)
    notes += further_notes
    notes += _shift_warnings(soft_targets, labels, params) if params.output.is_single_softmax else []
    notes += _quality_warnings(step, soft_targets["validation"], inputs)
    metrics = {"samples": progress.total, "classes": classes, "validation_accuracy": _accuracy(soft_targets["validation"], labels)}
    return StageResult(metrics, tuple(notes))


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


def _view_cache(arrays: list[np.ndarray], split: str, options: ViewOptions | None) -> Callable[[int], list[np.ndarray]]:
    """Return a function that returns a view of a split by its number, and keeps the last one: a single view is in memory at a time."""

    @lru_cache(maxsize=1)
    def make_view(number: int) -> list[np.ndarray]:
        return arrays if options is None else data.make_view(options, split, arrays, number)

    return make_view


def _fill(predict: Predict, header: Header, make_view: Callable[[int], list[np.ndarray]], path: Path, progress: _RowProgress) -> None:
    """Store the logits of a split, from where a run that was killed stopped; meanwhile the next ones are computed."""
    is_first = distributed.rank() == 0
    stored = distributed.broadcast_number(storage.begin(path, header) if is_first else 0)
    progress.stored += stored
    pending: deque[tuple[int, range, Callable[[], np.ndarray]]] = deque()
    submitted = stored
    while stored < header.rows:
        while submitted < header.rows and submitted - stored <= CHUNK:
            view, first = divmod(submitted, header.samples)
            rows = range(first, min(header.samples, (first // CHUNK + 1) * CHUNK))
            pending.append((view, rows, predict(make_view(view), rows)))
            submitted += len(rows)
        view, rows, wait_for_logits = pending.popleft()
        logits = wait_for_logits()
        stored = storage.append(path, header, stored, logits) if is_first else stored + len(rows)
        progress.stored += len(rows)
        which = f", view {view + 1} of {header.views}" if header.views > 1 else ""
        progress.report(progress.stored / progress.total, f"{header.split}: {rows.stop} of {header.samples} samples{which}")


def _recompute(teacher: Teacher, make_view: Callable[[int], list[np.ndarray]]) -> Recompute:
    """Return a function that runs the teacher again on some rows of a view."""
    return lambda view, rows: teacher([array[rows] for array in make_view(view)])


def _batch_size(params: SoftTargetParams, arrays: list[np.ndarray]) -> int:
    """Return how many samples are run at once: a function of their size alone, because other batches give other bits."""
    if params.mode.accelerator != execution.CPU:
        return ACCELERATOR_BATCH_SIZE
    numbers = sum(array[:1].size for array in arrays)
    return max(MIN_BATCH_SIZE, min(BATCH_SIZE, BATCH_NUMBERS // max(1, numbers)))


def _predict(submit: Submit, padding: Padding | None, batch_size: int, arrays: list[np.ndarray], rows: range) -> Callable[[], np.ndarray]:
    """Begin to compute the logits of rows, and return a function that waits for them. Rows of similar length share a batch.

    Each rank runs the teacher on its share of the batches.
    """
    import numpy as np
    import torch

    from edgekd.kd.teachers import layouts

    order = np.arange(rows.start, rows.stop)
    if padding is not None:
        lengths = layouts.token_lengths([array[rows.start : rows.stop] for array in arrays], padding)
        order = order[(-lengths).argsort(kind="stable")]

    def make_batch(batch_rows: np.ndarray) -> list[np.ndarray]:
        batch = [array[batch_rows] for array in arrays]
        return batch if padding is None else padding.remove(batch)

    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    shards = [batches[distributed.shard(len(batches), rank)] for rank in range(distributed.world_size())]
    sizes = [sum(map(len, shard)) for shard in shards]
    shard = shards[distributed.rank()] or batches[:1]  # a rank without a batch needs the shape of the logits all the same
    parts = [submit(partial(make_batch, batch_rows)) for batch_rows in shard]

    def wait_for_logits() -> np.ndarray:
        logits = np.concatenate([part.result() for part in parts])
        gathered = distributed.all_gather(torch.from_numpy(logits[: sizes[distributed.rank()]]), sizes).numpy()
        in_order = np.empty_like(gathered)
        in_order[order - rows.start] = gathered
        return in_order

    return wait_for_logits


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


def _shift_warnings(soft_targets: Mapping[str, SoftTargets], labels: np.ndarray | None, params: SoftTargetParams) -> list[str]:
    """Return a warning if the unlabelled samples are from another domain than the validation split.

    Mixed views are: the teacher is less confident on them. Only the first is not mixed.
    """
    from edgekd.kd.soft_targets import shift

    views = None if params.mixup is None else 1
    in_domain, unlabelled = (shift.mean_confidence(soft_targets[split], views) for split in ("validation", "unlabelled"))
    if not shift.has_shifted(in_domain, unlabelled):
        return []
    expected = None if labels is None else shift.expected_accuracy(soft_targets["validation"], labels, soft_targets["unlabelled"], views)
    return [f"warning: {shift.warning(in_domain, unlabelled, expected)}"]
