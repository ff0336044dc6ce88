# SPDX-License-Identifier: Apache-2.0
"""Supervise: the frozen teacher answers every sample once; whatever is distilled from it later reads these logits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, cast

from edgekd.domain.recipe import Entry
from edgekd.errors import RecipeError
from edgekd.harness import runner
from edgekd.kd import answers, data, ranks, ways
from edgekd.kd.ways import Way
from edgekd.ports import StageResult, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.recipe import Recipe
    from edgekd.domain.target import Target
    from edgekd.kd.answers import Header, Recompute
    from edgekd.kd.views import Augment
    from edgekd.ports import Context

    Teacher = Callable[[list[np.ndarray]], np.ndarray]

NAME = "supervise"
VERSION = 5
SPLITS = ("train", "validation", "unlabelled")
BATCH_SIZE = 128
CHUNK = 16 * BATCH_SIZE  # samples; a kill costs at most this much


def steps(recipe: Recipe, targets: Sequence[Target]) -> list[Step]:
    """Return a step for each teacher. Its key reads nothing of the distillation: a changed temperature asks no teacher."""
    del targets  # a teacher's answers do not depend on them
    machine = runner.facts()
    kind, title = [*ways.places("distill", recipe.distill.accelerator).items()][-1]
    found = []
    for name, supervisor in recipe.supervisors.items():
        params = {
            "model": None if supervisor.model is None else str(supervisor.model),
            "augment": None if recipe.distill.augment is None else str(recipe.distill.augment),
            "views": recipe.distill.views or 1,
            **recipe.student.form,
            "answers_kept": recipe.distill.answers_kept,
            "batch_size": BATCH_SIZE,
            "threads": ranks.crew(None, machine["cores"])["threads"],
            "instruction_set": machine["instruction_set"],
            **(Way(accelerator=kind, name=title).told if supervisor.model else {}),
        }
        inputs = {"teacher": supervisor.artifact, "code": supervisor.code, "views.code": "inspect:views.code.json"}
        for split in SPLITS:
            inputs |= data.references(recipe, split, labels=split == "validation")
        runtime = ("onnxruntime",) if supervisor.artifact.endswith(".onnx") else ()
        found.append(Step(name, NAME, params, inputs, ("torch", "numpy", "safetensors", *runtime)))
    return found


def run(step: Step, inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Let the teacher answer; write ``SPLIT.outputs.safetensors`` (``kd.answers``), for each split: one view of validation."""
    from edgekd.kd import models, shift, views
    from edgekd.kd.repeatable import repeatable

    params = cast("dict[str, Any]", step.params)
    entry = None if params["model"] is None else Entry.of(params["model"])
    augment = None if params["augment"] is None else views.load(context.recipe_dir, Entry.of(params["augment"]))
    splits = {split: data.arrays(inputs, split) for split in SPLITS}
    numbers = {split: 1 if split == "validation" else params["views"] for split in SPLITS}
    filling = _Filling(context, sum(numbers[split] * len(found[0]) for split, found in splits.items()))
    device = params.get("accelerator", ways.CPU)
    with repeatable(params["threads"], device):
        here = models.load_teacher(context.recipe_dir, entry, inputs["teacher"].path)
        classes = here([array[:1] for array in splits["train"]]).shape[1]
        notes: list[str] = []
        teacher = here
        if device != ways.CPU:
            there = partial(models.load_teacher, context.recipe_dir, entry, inputs["teacher"].path, device)
            teacher, notes = _sited(here, there, [array[:BATCH_SIZE] for array in splits["train"]], device)
        headers, checks = {}, {}
        for split, arrays in splits.items():
            headers[split] = answers.plan(
                split,
                (numbers[split], len(arrays[0]), classes),
                teacher=inputs["teacher"].digest,
                augment=data.digest_of(inputs, "views.code"),
                data=data.digest_of(inputs, f"{split}.inputs."),
                slots=0 if params["answers_kept"] == "dense" else None,
            )
            checks[split] = _fill(teacher, headers[split], arrays, None if split == "validation" else augment, filling)
        if ranks.own():  # the first rank has the files
            return StageResult()
        for split, header in headers.items():  # now that no work can be lost
            target = context.out / f"{split}.outputs.safetensors"
            answers.finish(_part(context, split), header, target)
            answers.load(target, header, checks[split])
    kept = {split: answers.opened(context.out / f"{split}.outputs.safetensors") for split in SPLITS}
    sureness = {split: shift.sureness(kept[split]) for split in ("validation", "unlabelled")}
    labels = _labels(inputs)
    home, other = sureness["validation"], sureness["unlabelled"]
    if "answers" not in params and shift.differs(home, other):  # numbers and several softmaxes have no one confidence
        expected = None if labels is None else shift.expected_accuracy(kept["validation"], labels, kept["unlabelled"])
        notes.append(f"warning: {shift.warning(home, other, expected)}")
    accuracy = None if labels is None else float((shift.tops(kept["validation"], 0).classes == labels)[labels >= 0].mean())
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
        if gap <= answers.TOLERANCE:
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
    is_first = ranks.own() == 0
    stored = ranks.agreed(answers.begin(path, header) if is_first else 0)
    filling.done += stored

    @lru_cache(maxsize=1)  # a view at a time is in memory
    def seen(number: int) -> list[np.ndarray]:
        return arrays if augment is None else data.view(augment, split, arrays, number)

    while stored < header.rows:
        number, first = divmod(stored, header.samples)
        rows = range(first, min(header.samples, (first // CHUNK + 1) * CHUNK))
        found = _ask(teacher, seen(number), rows)
        stored = answers.append(path, header, stored, found) if is_first else stored + len(rows)
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
    shares = [cuts[ranks.share(len(cuts), rank)] for rank in range(ranks.count())]
    sizes = [sum(cut.stop - cut.start for cut in part) for part in shares]
    given = shares[ranks.own()] or cuts[:1]  # one that has nothing to do asks all the same: it must know the shape
    found = np.concatenate([teacher([array[cut] for array in arrays]) for cut in given])
    return ranks.whole(torch.from_numpy(found[: sizes[ranks.own()]]), sizes).numpy()
