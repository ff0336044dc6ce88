# SPDX-License-Identifier: Apache-2.0
"""Evaluate: run teacher, student, exports and candidates on the same samples; store outputs and scores of each sample."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekd import registry, usercode
from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError, StageError
from edgekd.harness import runner
from edgekd.plan import quantized_candidates, runtimes_of
from edgekd.ports import Context, StageResult, Step
from edgekd.stats import jackknife
from edgekd.store.arrays import open_array
from edgekd.usercode import metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.recipe import Recipe
    from edgekd.domain.target import Target

NAME = "evaluate"
CODE: tuple[str, ...] = (
    "stages/evaluate",
    "harness/runner",
    "kd/modules",
    "kd/reproducible",
    "kd/teachers",
    "stats/intervals",
    "stats/jackknife",
    "stats/paired",
    "store/arrays",
    "usercode",
)
BATCH = 256  # of models in PyTorch; model files run one sample at a time


@dataclass(frozen=True, slots=True)
class EvaluateParams:
    """What may change outputs and scores, where a model runs in PyTorch or on a ``runtime``.

    ``model`` is the entry point of a module in PyTorch, None for a teacher that is a whole-model file, and for model files.
    ``metric`` is None for top-1 and for a ``score`` per sample.
    """

    metric: str | None
    score: str | None
    instruction_set: str
    threads: int
    model: str | None = None
    runtime: str | None = None


def steps(recipe: Recipe, targets: Sequence[Target]) -> list[Step[EvaluateParams]]:
    """Return a step for the teacher, each student in PyTorch, each export of the student and each quantized candidate."""
    facts, inputs_count = runner.facts(), len(recipe.student.inputs)
    metric = None if isinstance(recipe.evaluate.metric, str) else str(recipe.evaluate.metric)
    score = None if recipe.evaluate.score is None else str(recipe.evaluate.score)
    samples = {f"inputs.{i}": f"inspect:evaluation.inputs.{i}.npy" for i in range(inputs_count)}
    samples |= {name: f"inspect:evaluation.{name}.npy" for name in ("labels", "groups")}
    samples |= {"metric": "inspect:metric.code.json", "parts": "inspect:metric.parts.json"}

    def in_torch(name: str, model: EntryPoint | None, weights: str, code: str) -> Step[EvaluateParams]:
        params = EvaluateParams(metric, score, facts["instruction_set"], facts["cores"], model=None if model is None else str(model))
        inputs = {"model": weights, "code": f"inspect:{code}.code.json", **samples}
        return Step(f"evaluate/{name}", NAME, params, inputs, ("torch", "numpy", "safetensors"))

    def on_runtime(step: str, name: str) -> Step[EvaluateParams]:
        runtime = registry.runtime(name)
        params = EvaluateParams(metric, score, facts["instruction_set"], 1, runtime=name)
        return Step(f"evaluate/{step}", NAME, params, {"model": f"{step}:model.{runtime.FORMAT}", **samples}, (runtime.PACKAGE, "numpy"))

    student = recipe.student.model
    further_students = [step for method in recipe.methods.values() for step in method if step != "distill"]  # other seeds, and baselines
    model_files = {f"export/student/{name}": name for name in runtimes_of(recipe, targets)}
    model_files |= {step: candidate.runtime for step, candidate in quantized_candidates(recipe, targets).items()}
    return [
        in_torch("teacher", recipe.teacher.model, recipe.teacher.artifact, "teacher"),
        in_torch("student", student, "distill:student.safetensors", "student"),
        *(in_torch(step, student, f"{step}:student.safetensors", "student") for step in further_students),
        *(on_runtime(step, name) for step, name in model_files.items()),
    ]


def run(step: Step[EvaluateParams], inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Write ``outputs.npy``, ``scores.npy`` (or ``jackknife.npy``, a metric of the whole set without each part) and ``summary.json``.

    Raises:
        StageError: if an output is not finite.
        RecipeError: if the user's metric is wrong.
    """
    import numpy as np

    params, path = step.params, inputs["model"].path
    arrays = [open_array(artifact.path).load() for name, artifact in inputs.items() if name.startswith("inputs.")]
    labels = np.load(inputs["labels"].path, allow_pickle=False)
    groups = np.load(inputs["groups"].path, allow_pickle=False)
    outputs = _run_in_torch(params, path, context, arrays) if params.runtime is None else _run_on_runtime(params, path, context, arrays)
    not_finite = np.flatnonzero(~np.isfinite(outputs).all(axis=1))
    if len(not_finite):
        raise StageError(f"{step.id}: the output for sample {not_finite[0]} is not finite ({len(not_finite)} of {len(outputs)} samples)")
    np.save(context.out / "outputs.npy", outputs)
    summary: dict[str, Any] = {"samples": len(labels), "groups": len(np.unique(groups)), "instruction_set": params.instruction_set}
    limit = json.loads(inputs["parts"].path.read_text())["parts"]
    try:
        summary |= _score(params, context, outputs, labels, jackknife.assign_parts(groups, limit))
    except RecipeError as error:
        if params.runtime is None:
            raise
        raise StageError(f"{step.id}: {error}") from error  # sound on the student's outputs, so it is about this file
    (context.out / "summary.json").write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n")
    return StageResult({name: summary[name] for name in ("accuracy", "undefined", "parts") if name in summary})


def _run_in_torch(params: EvaluateParams, path: Path, context: Context, arrays: Sequence[np.ndarray]) -> np.ndarray:
    import numpy as np

    from edgekd.kd.reproducible import deterministic
    from edgekd.kd.teachers.load import load_teacher

    entry = None if params.model is None else EntryPoint.parse(params.model)
    batches, total = [], len(arrays[0])
    with deterministic(params.threads):
        network = load_teacher(context.recipe_dir, entry, path)
        for start in range(0, total, BATCH):
            batches.append(network([np.array(array[start : start + BATCH]) for array in arrays]))
            context.progress(min(1.0, (start + BATCH) / total), f"{total} samples")
    return np.concatenate(batches).astype(np.float32)


def _run_on_runtime(params: EvaluateParams, path: Path, context: Context, arrays: Sequence[np.ndarray]) -> np.ndarray:
    import numpy as np

    session: Any = registry.runtime(str(params.runtime)).open(path, params.threads)
    columns = [_quantize_input(array, tensor) for array, tensor in zip(arrays, session.inputs, strict=True)]
    rows, total = [], len(arrays[0])
    for row in range(total):
        rows.append(session.run([column[row : row + 1] for column in columns])[0])
        if row % 500 == 0:
            context.progress(row / total, f"{total} samples")
    outputs = np.concatenate(rows)
    tensor = session.outputs[0]
    if tensor["scale"] is not None and outputs.dtype.kind in "iu":
        outputs = (outputs.astype(np.float32) - tensor["zero_point"]) * np.float32(tensor["scale"])
    dequantized: np.ndarray = outputs.astype(np.float32)
    return dequantized


def _quantize_input(array: np.ndarray, tensor: Mapping[str, Any]) -> np.ndarray:
    """Return an input as the model file takes it: quantized by the tensor's scale and zero point where it has them."""
    import numpy as np

    if tensor["dtype"] == array.dtype.name or (array.dtype.kind in "iu" and tensor["scale"] is None):
        return np.ascontiguousarray(array.astype(tensor["dtype"], copy=False))
    if tensor["scale"] is None:
        expected = f"expects {tensor['dtype']} for input '{tensor['name']}' without a scale"
        raise StageError(f"the model {expected}, and the samples are {array.dtype.name}")
    limits = np.iinfo(tensor["dtype"])
    integers = np.clip(np.round(array / tensor["scale"]) + tensor["zero_point"], limits.min, limits.max)
    quantized_array: np.ndarray = integers.astype(tensor["dtype"])
    return quantized_array


def _score(params: EvaluateParams, context: Context, outputs: np.ndarray, labels: np.ndarray, parts: np.ndarray) -> dict[str, Any]:
    """Write ``scores.npy`` or ``jackknife.npy``, and return what belongs to the summary."""
    import numpy as np

    if params.metric is not None:
        without_part, summary = _score_set(params.metric, context, outputs, labels, parts)
        np.save(context.out / "jackknife.npy", without_part)
        return summary
    scores = _score_samples(params.score, context, outputs, labels)
    np.save(context.out / "scores.npy", scores)
    classes = np.unique(labels) if labels.ndim == 1 else ()  # samples with several labels have no single class
    by_class = {str(c): {"samples": int((labels == c).sum()), "accuracy": float(scores[labels == c].mean())} for c in classes}
    return {"accuracy": float(scores.mean()), "classes": by_class}


def _score_samples(score: str | None, context: Context, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    import numpy as np

    if score is None:
        correct: np.ndarray = (outputs.argmax(1) == labels).astype(np.float64)
        return correct
    function, entry = _load_function(score, context)
    return metrics.score_samples(function, entry, outputs, labels)


def _score_set(
    metric: str, context: Context, outputs: np.ndarray, labels: np.ndarray, parts: np.ndarray
) -> tuple[np.ndarray, dict[str, float]]:
    """Return a metric without each part, nan where it is undefined, and with all of them, for the summary."""
    import numpy as np

    function, entry = _load_function(metric, context)
    accuracy = metrics.score_set(function, entry, outputs, labels)
    count = int(parts.max()) + 1
    values = np.full(count, np.nan)
    for part in range(count if count > 1 else 0):
        rows = parts != part  # the order of the samples stays
        with contextlib.suppress(RecipeError):  # as for the area under a curve without a positive
            values[part] = metrics.score_set(function, entry, outputs[rows], labels[rows])
        context.progress(part / count, f"{count} parts")
    undefined = int(np.isnan(values).sum())
    return values, {"accuracy": accuracy, "support": jackknife.support(labels, parts), "undefined": undefined, "parts": count}


def _load_function(name: str, context: Context) -> tuple[Callable[..., Any], EntryPoint]:
    entry = EntryPoint.parse(name)
    return usercode.load_function(context.recipe_dir, entry), entry
