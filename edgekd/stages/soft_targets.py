# SPDX-License-Identifier: Apache-2.0
"""Supervise: the frozen teacher answers every sample once; whatever is distilled from it later reads these logits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, cast

from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError
from edgekd.harness import runner
from edgekd.kd import data
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
    from edgekd.kd.soft_targets.storage import Header, Recompute
    from edgekd.kd.views import Augment
    from edgekd.ports import Context

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
    "usercode",
    "domain/losses",
)
SPLITS = ("train", "validation", "unlabelled")
BATCH_SIZE = 128
CHUNK = 16 * BATCH_SIZE  # samples; a kill costs at most this much


def steps(recipe: Recipe, targets: Sequence[Target]) -> list[Step[Any]]:
    """Return a step for each teacher. Its key reads nothing of the distillation: a changed temperature asks no teacher."""
    del targets  # a teacher's answers do not depend on them
    machine = runner.facts()
    kind, title = [*execution.accelerators_for("distill", recipe.distill.accelerator).items()][-1]
    found = []
    for name, supervisor in recipe.soft_target_sources.items():
        params = {
            "model": None if supervisor.model is None else str(supervisor.model),
            "augment": None if recipe.distill.augment is None else str(recipe.distill.augment),
            "views": recipe.distill.views or 1,
            **recipe.student.form,
            "soft_target_storage": recipe.distill.soft_target_storage,
            "batch_size": BATCH_SIZE,
            "threads": distributed.world(None, machine["cores"])["threads"],
            "instruction_set": machine["instruction_set"],
            **(ExecutionMode(accelerator=kind, name=title).to_dict() if supervisor.model else {}),
        }
        inputs = {"teacher": supervisor.artifact, "code": supervisor.code, "views.code": "inspect:views.code.json"}
        for split in SPLITS:
            inputs |= data.split_references(recipe, split, labels=split == "validation")
        runtime = ("onnxruntime",) if supervisor.artifact.endswith(".onnx") else ()
        found.append(Step(name, NAME, params, inputs, ("torch", "numpy", "safetensors", *runtime)))
    return found


def run(step: Step[Any], inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Let the teacher answer; write ``SPLIT.outputs.safetensors`` (``kd.answers``), for each split: one view of validation."""
    from edgekd.kd import views
    from edgekd.kd.reproducible import deterministic
    from edgekd.kd.soft_targets import shift
    from edgekd.kd.teachers.load import load_teacher

    params = cast("dict[str, Any]", step.params)
    entry = None if params["model"] is None else EntryPoint.parse(params["model"])
    augment = None if params["augment"] is None else views.load_augmentation(context.recipe_dir, EntryPoint.parse(params["augment"]))
    splits = {split: data.load_arrays(inputs, split) for split in SPLITS}
    numbers = {split: 1 if split == "validation" else params["views"] for split in SPLITS}
    filling = _Filling(context, sum(numbers[split] * len(found[0]) for split, found in splits.items()))
    device = params.get("accelerator", execution.CPU)
    with deterministic(params["threads"], device):
        here = load_teacher(context.recipe_dir, entry, inputs["teacher"].path)
        classes = here([array[:1] for array in splits["train"]]).shape[1]
        notes: list[str] = []
        teacher = here
        if device != execution.CPU:
            there = partial(load_teacher, context.recipe_dir, entry, inputs["teacher"].path, device)
            teacher, notes = _sited(here, there, [array[:BATCH_SIZE] for array in splits["train"]], device)
        headers, checks = {}, {}
        for split, arrays in splits.items():
            headers[split] = storage.make_header(
                split,
                (numbers[split], len(arrays[0]), classes),
                teacher=inputs["teacher"].digest,
                augment=data.digest_of(inputs, "views.code"),
                data=data.digest_of(inputs, f"{split}.inputs."),
                slots=0 if params["soft_target_storage"] == "dense" else None,
            )
            checks[split] = _fill(teacher, headers[split], arrays, None if split == "validation" else augment, filling)
        if distributed.rank():  # the first rank has the files
            return StageResult()
        for split, header in headers.items():  # now that no work can be lost
            target = context.out / f"{split}.outputs.safetensors"
            storage.finish(_part(context, split), header, target)
            storage.open_expected(target, header, checks[split])
    kept = {split: storage.open_soft_targets(context.out / f"{split}.outputs.safetensors") for split in SPLITS}
    mean_confidence = {split: shift.mean_confidence(kept[split]) for split in ("validation", "unlabelled")}
    labels = _labels(inputs)
    home, other = mean_confidence["validation"], mean_confidence["unlabelled"]
    if "task" not in params and shift.has_shifted(home, other):  # numbers and several softmaxes have no one confidence
        expected = None if labels is None else shift.expected_accuracy(kept["validation"], labels, kept["unlabelled"])
        notes.append(f"warning: {shift.warning(home, other, expected)}")
    accuracy = None if labels is None else float((shift.top1(kept["validation"], 0).classes == labels)[labels >= 0].mean())
    metrics = {"samples": filling.total, "classes": classes, "validation_accuracy": accuracy}
    return StageResult(metrics, tuple(notes))


def _sited(here: Teacher, load: Callable[[], Teacher], batch: list[np.ndarray], device: str) -> tuple[Teacher, list[str]]:
    """Return the teacher on an accelerator if it answers a batch there as it does here, else the one here with a warning."""
    import numpy as np

    try:
        there = load()
        found, expected = there(batch), here(batch)
        gap = float((np.abs(found - expected) / np.maximum(1.0, np.abs(expected).max(axis=1, keepdims=True))).max())
        told = f"its answers differ by {gap:.2g} of the largest"
        if gap <= storage.TOLERANCE:
            return there, []
    except (RecipeError, RuntimeError, AssertionError) as error:  # no driver, no memory, an operator that it lacks
        told = str(error).splitlines()[0]
    return here, [f"warning: the teacher answers on the processor, not on {device}: {told}"]


@dataclass(slots=True)
class _Filling:
    """How many answers there are to get, and how many are stored."""

    context: Context
    total: int
    done: int = 0


def _fill(teacher: Teacher, header: Header, arrays: list[np.ndarray], augment: Augment | None, filling: _Filling) -> Recompute:
    """Fill the file of a split, going on where a run that was killed stopped; return what asks the teacher anew."""
    context, split = filling.context, header.split
    path = _part(context, split)
    is_first = distributed.rank() == 0
    stored = distributed.broadcast_number(storage.begin(path, header) if is_first else 0)
    filling.done += stored

    @lru_cache(maxsize=1)  # a view at a time is in memory
    def seen(number: int) -> list[np.ndarray]:
        return arrays if augment is None else data.make_view(augment, split, arrays, number)

    while stored < header.rows:
        number, first = divmod(stored, header.samples)
        rows = range(first, min(header.samples, (first // CHUNK + 1) * CHUNK))
        found = _ask(teacher, seen(number), rows)
        stored = storage.append(path, header, stored, found) if is_first else stored + len(rows)
        filling.done += len(rows)
        told = f", view {number + 1} of {header.views}" if header.views > 1 else ""
        context.progress(filling.done / filling.total, f"{split}: {rows.stop} of {header.samples} samples{told}")
    return lambda number, rows: teacher([array[rows] for array in seen(number)])


def _part(context: Context, split: str) -> Path:
    return context.work / f"{split}.answers"


def _labels(inputs: Mapping[str, Artifact]) -> np.ndarray | None:
    """Return the classes of the validation split, or None if no sample there has one."""
    import numpy as np

    labels: np.ndarray = np.load(inputs["validation.labels"].path, allow_pickle=False)
    return labels if labels.dtype == np.int64 and labels.ndim == 1 and (labels >= 0).any() else None


def _ask(teacher: Teacher, arrays: list[np.ndarray], rows: range) -> np.ndarray:
    """Return the answers to rows; of several ranks each asks for its share of the batches."""
    import numpy as np
    import torch

    cuts = [slice(start, min(start + BATCH_SIZE, rows.stop)) for start in range(rows.start, rows.stop, BATCH_SIZE)]
    shares = [cuts[distributed.shard(len(cuts), rank)] for rank in range(distributed.world_size())]
    sizes = [sum(cut.stop - cut.start for cut in part) for part in shares]
    given = shares[distributed.rank()] or cuts[:1]  # one that has nothing to do asks all the same: it must know the shape
    found = np.concatenate([teacher([array[cut] for array in arrays]) for cut in given])
    return distributed.all_gather(torch.from_numpy(found[: sizes[distributed.rank()]]), sizes).numpy()
