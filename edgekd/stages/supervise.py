# SPDX-License-Identifier: Apache-2.0
"""Supervise: the frozen teacher answers every sample once; whatever is distilled from it later reads these logits."""

from __future__ import annotations

import io
import math
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from edgekd.domain.recipe import Entry
from edgekd.errors import RecipeError
from edgekd.harness import runner
from edgekd.kd import data
from edgekd.ports import StageResult, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.recipe import Recipe
    from edgekd.domain.target import Target
    from edgekd.kd.views import Augment
    from edgekd.ports import Context

NAME = "supervise"
VERSION = 3
SPLITS = ("train", "validation", "unlabelled")
BATCH_SIZE = 128
_CHUNK_BATCHES = 16  # a kill costs at most this much


def steps(recipe: Recipe, targets: Sequence[Target]) -> list[Step]:
    """Return a step for each teacher. Its key reads nothing of the distillation: a changed temperature asks no teacher."""
    del targets  # a teacher's answers do not depend on them
    machine = runner.facts()
    found = []
    for name, supervisor in recipe.supervisors.items():
        params = {
            "model": None if supervisor.model is None else str(supervisor.model),
            "augment": None if recipe.distill.augment is None else str(recipe.distill.augment),
            "views": recipe.distill.views or 1,
            **recipe.student.form,
            "batch_size": BATCH_SIZE,
            "threads": machine["cores"],
            "instruction_set": machine["instruction_set"],
        }
        inputs = {"teacher": supervisor.artifact, "code": supervisor.code, "views.code": "inspect:views.code.json"}
        for split in SPLITS:
            inputs |= data.references(recipe, split, labels=split == "validation")
        runtime = ("onnxruntime",) if supervisor.artifact.endswith(".onnx") else ()
        found.append(Step(name, NAME, params, inputs, ("torch", "numpy", "safetensors", *runtime)))
    return found


def run(step: Step, inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Let the teacher answer; write ``SPLIT.outputs.npy``, float32 logits (V, n, C), for each split: one view of validation."""
    import numpy as np

    from edgekd.kd import models, shift, views
    from edgekd.kd.repeatable import repeatable

    params = cast("dict[str, Any]", step.params)
    entry = None if params["model"] is None else Entry(*params["model"].rsplit(":", 1))
    augment = None if params["augment"] is None else views.load(context.recipe_dir, Entry(*params["augment"].rsplit(":", 1)))
    splits = {split: data.arrays(inputs, split) for split in SPLITS}
    numbers = {split: range(1 if split == "validation" else params["views"]) for split in SPLITS}
    total = sum(len(numbers[split]) * len(found[0]) for split, found in splits.items())
    done, classes, sureness = 0, 0, {}
    with repeatable(params["threads"]):
        teacher = models.load_teacher(context.recipe_dir, entry, inputs["teacher"].path)
        for split, arrays in splits.items():
            answers = []
            for number in numbers[split]:
                seen = _seen(arrays, None if split == "validation" else augment, split, number)
                told = f", view {number + 1} of {len(numbers[split])}" if len(numbers[split]) > 1 else ""
                for rows in _chunks(len(arrays[0]), params["batch_size"]):
                    path = context.work / f"{split}.{number}.{rows.start}"
                    if (found := _kept(path)) is None:
                        found = _ask(teacher, seen(), rows, params["batch_size"])
                        _check_finite(found, split, rows.start)
                        _keep(path, found)
                    answers.append(found)
                    done += len(rows)
                    context.progress(done / total, f"{split}: {rows.stop} of {len(arrays[0])} samples{told}")
            classes = answers[0].shape[1] if answers else classes
            outputs = np.concatenate(answers) if answers else np.zeros((0, classes), dtype=np.float32)
            shaped = outputs.reshape(len(numbers[split]), len(arrays[0]), classes)
            np.save(context.out / f"{split}.outputs.npy", shaped, allow_pickle=False)
            sureness[split] = shift.sureness(shaped)
    # numbers and several softmaxes have no one confidence
    warning = None if "answers" in params else shift.warning(sureness["validation"], sureness["unlabelled"])
    metrics = {"samples": total, "classes": classes, "validation_accuracy": _accuracy(inputs, context.out)}
    return StageResult(metrics, () if warning is None else (f"warning: {warning}",))


def _seen(arrays: list[np.ndarray], augment: Augment | None, split: str, number: int) -> Callable[[], list[np.ndarray]]:
    """Return what gives the inputs as they are in a view; it is made once, and only if it is asked for."""

    @cache
    def made() -> list[np.ndarray]:
        return arrays if augment is None else data.view(augment, split, arrays, number)

    return made


def _accuracy(inputs: Mapping[str, Artifact], out: Path) -> float | None:
    """Return the teacher's accuracy on the validation split, or None if no sample there has a class."""
    import numpy as np

    labels = np.load(inputs["validation.labels"].path, allow_pickle=False)
    if labels.dtype != np.int64 or labels.ndim != 1 or not (labels >= 0).any():
        return None
    [outputs] = np.load(out / "validation.outputs.npy", allow_pickle=False)
    return float((outputs.argmax(1) == labels)[labels >= 0].mean())


def _chunks(samples: int, batch_size: int) -> list[range]:
    size = batch_size * _CHUNK_BATCHES
    return [range(start, min(start + size, samples)) for start in range(0, samples, size)]


def _ask(teacher: Callable[[list[np.ndarray]], np.ndarray], arrays: list[np.ndarray], rows: range, batch_size: int) -> np.ndarray:
    import numpy as np

    cuts = [slice(start, min(start + batch_size, rows.stop)) for start in range(rows.start, rows.stop, batch_size)]
    return np.concatenate([teacher([array[cut] for array in arrays]) for cut in cuts])


def _kept(path: Path) -> np.ndarray | None:
    """Return the answers that an earlier run stored before it was killed, or None."""
    import numpy as np

    from edgekd.kd.repeatable import kept

    packed = kept(path)
    found: np.ndarray | None = None if packed is None else np.load(io.BytesIO(packed), allow_pickle=False)
    return found


def _keep(path: Path, answers: np.ndarray) -> None:
    import numpy as np

    from edgekd.kd.repeatable import keep

    buffer = io.BytesIO()
    np.save(buffer, answers, allow_pickle=False)
    keep(path, buffer.getvalue())


def _check_finite(answers: np.ndarray, split: str, first: int) -> None:
    import numpy as np

    if math.isfinite(float(answers.sum(dtype=np.float64))):  # NaN and infinity spread: one pass finds any
        return
    row, column = np.argwhere(~np.isfinite(answers))[0]
    raise RecipeError(
        f"teacher: its answer to {split}[{first + row}] is {answers[row, column]} for class {column}; "
        "expected finite logits; check the weights and the scale of the inputs"
    )
