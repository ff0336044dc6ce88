# SPDX-License-Identifier: Apache-2.0
"""Evaluate: teacher, student, exports and candidates on the same samples; outputs and scores of each sample are kept."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from edgekd import registry, usercode
from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError, StageError
from edgekd.harness import runner
from edgekd.plan import quantized, runtimes_of
from edgekd.ports import Context, StageResult, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.recipe import Recipe
    from edgekd.domain.target import Target

NAME = "evaluate"
CODE: tuple[str, ...] = ("stages/evaluate", "kd/modules", "kd/reproducible", "kd/teachers", "stats/intervals", "usercode")
BATCH = 256  # of models in PyTorch; model files run one sample at a time
RESAMPLES = 1000
SEED = 0


def steps(recipe: Recipe, targets: Sequence[Target]) -> list[Step[Any]]:
    """Return a step for the teacher, the student, each export of the student and each quantized candidate."""
    evaluate, facts = recipe.evaluate, runner.facts()
    common = {
        "metric": None if isinstance(evaluate.metric, str) else str(evaluate.metric),
        "score": None if evaluate.score is None else str(evaluate.score),
        "instruction_set": facts["instruction_set"],
        "resamples": RESAMPLES,
        "seed": SEED,
    }
    shared = {f"inputs.{i}": f"inspect:evaluation.inputs.{i}.npy" for i in range(len(recipe.student.inputs))}
    shared |= {name: f"inspect:evaluation.{name}.npy" for name in ("labels", "groups")} | {"metric": "inspect:metric.code.json"}
    in_torch = {**common, "batch": BATCH, "threads": facts["cores"]}
    entry = recipe.teacher.model
    tools = ("torch", "numpy", "safetensors")
    found = [
        Step("evaluate/teacher", NAME, {**in_torch, "model": None if entry is None else str(entry)},
             {"model": recipe.teacher.artifact, "code": "inspect:teacher.code.json", **shared}, tools),
        Step("evaluate/student", NAME, {**in_torch, "model": str(recipe.student.model)},
             {"model": "distill:student.safetensors", "code": "inspect:student.code.json", **shared}, tools),
    ]  # fmt: skip
    for twin in (name for names in recipe.arms.values() for name in names if name != "distill"):
        inputs = {"model": f"{twin}:student.safetensors", "code": "inspect:student.code.json", **shared}
        found.append(Step(f"evaluate/{twin}", NAME, {**in_torch, "model": str(recipe.student.model)}, inputs, tools))
    files = {f"export/student/{name}": name for name in runtimes_of(recipe, targets)}
    files |= {step: candidate.runtime for step, candidate in quantized(recipe, targets).items()}
    for step, name in files.items():
        runtime = registry.runtime(name)
        inputs = {"model": f"{step}:model.{runtime.FORMAT}", **shared}
        found.append(Step(f"evaluate/{step}", NAME, {**common, "runtime": name}, inputs, (runtime.PACKAGE, "numpy")))
    return found


def run(step: Step[Any], inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Write ``outputs.npy``, ``scores.npy`` (or ``resampled.npy`` for a whole-set metric) and ``summary.json``.

    Raises:
        StageError: if an output is not finite.
        RecipeError: if the user's metric is wrong.
    """
    import numpy as np

    params: Mapping[str, Any] = step.params
    arrays: list[Any] = []
    while (name := f"inputs.{len(arrays)}") in inputs:
        arrays.append(np.load(inputs[name].path, mmap_mode="r", allow_pickle=False))
    labels = np.load(inputs["labels"].path, allow_pickle=False)
    groups = np.load(inputs["groups"].path, allow_pickle=False)
    outputs = _in_torch(params, inputs, context, arrays) if "model" in params else _on_runtime(params, inputs, context, arrays)
    bad = np.flatnonzero(~np.isfinite(outputs).all(axis=1))
    if len(bad):
        raise StageError(f"{step.id}: the output for sample {bad[0]} is not finite ({len(bad)} of {len(outputs)} samples)")
    np.save(context.out / "outputs.npy", outputs)
    summary: dict[str, Any] = {"samples": len(labels), "groups": len(np.unique(groups)), "instruction_set": params["instruction_set"]}
    if params["metric"] is not None:
        resampled, summary["accuracy"] = _whole_set(params, context, outputs, labels, groups)
        np.save(context.out / "resampled.npy", resampled)
    else:
        scores = _scores(params, context, outputs, labels)
        np.save(context.out / "scores.npy", scores)
        summary["accuracy"] = float(scores.mean())
        summary["classes"] = {
            str(c): {"samples": int((labels == c).sum()), "accuracy": float(scores[labels == c].mean())}
            for c in (np.unique(labels) if labels.ndim == 1 else ())  # of samples with several labels there are no classes to tell apart
        }
    (context.out / "summary.json").write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n")
    return StageResult({"accuracy": summary["accuracy"]})


def _in_torch(params: Mapping[str, Any], inputs: Mapping[str, Artifact], context: Context, arrays: Sequence[np.ndarray]) -> np.ndarray:
    import numpy as np

    from edgekd.kd.reproducible import deterministic
    from edgekd.kd.teachers.load import load_teacher

    entry = None if params["model"] is None else EntryPoint.parse(params["model"])
    rows, total = [], len(arrays[0])
    with deterministic(params["threads"]):
        answer = load_teacher(context.recipe_dir, entry, inputs["model"].path)
        for start in range(0, total, params["batch"]):
            rows.append(answer([np.array(array[start : start + params["batch"]]) for array in arrays]))
            context.progress(min(1.0, (start + params["batch"]) / total), f"{total} samples")
    return np.concatenate(rows).astype(np.float32)


def _on_runtime(params: Mapping[str, Any], inputs: Mapping[str, Artifact], context: Context, arrays: Sequence[np.ndarray]) -> np.ndarray:
    import numpy as np

    session: Any = registry.runtime(params["runtime"]).open(inputs["model"].path, 1)
    columns = [_quantized(array, item) for array, item in zip(arrays, session.inputs, strict=True)]
    rows, total = [], len(arrays[0])
    for row in range(total):
        rows.append(session.run([column[row : row + 1] for column in columns])[0])
        if row % 500 == 0:
            context.progress(row / total, f"{total} samples")
    found = np.concatenate(rows)
    edge = session.outputs[0]
    if edge["scale"] is not None and found.dtype.kind in "iu":
        found = (found.astype(np.float32) - edge["zero_point"]) * np.float32(edge["scale"])
    dequantized: np.ndarray = found.astype(np.float32)
    return dequantized


def _quantized(array: np.ndarray, edge: Mapping[str, Any]) -> np.ndarray:
    """Return inputs as the model file takes them: integers by its scale and zero point where it wants them."""
    import numpy as np

    if edge["dtype"] == array.dtype.name or (array.dtype.kind in "iu" and edge["scale"] is None):
        return np.ascontiguousarray(array.astype(edge["dtype"], copy=False))
    if edge["scale"] is None:
        raise StageError(
            f"the model wants {edge['dtype']} for input '{edge['name']}' without a scale, and the samples are {array.dtype.name}"
        )
    limits = np.iinfo(edge["dtype"])
    quantized_array: np.ndarray = np.clip(np.round(array / edge["scale"]) + edge["zero_point"], limits.min, limits.max).astype(
        edge["dtype"]
    )
    return quantized_array


def _scores(params: Mapping[str, Any], context: Context, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    import numpy as np

    if params["score"] is None:
        right: np.ndarray = (outputs.argmax(1) == labels).astype(np.float64)
        return right
    function, entry = _function(params["score"], context)
    found = np.asarray(usercode.call_user_code(function, entry, outputs, labels), dtype=np.float64)
    if found.shape != labels.shape[:1] or not np.isfinite(found).all() or found.min() < 0 or found.max() > 1:
        raise RecipeError(f"{entry}: returned scores of shape {list(found.shape)}; expected {len(labels)} finite numbers from 0 to 1")
    return found


def _whole_set(
    params: Mapping[str, Any], context: Context, outputs: np.ndarray, labels: np.ndarray, groups: np.ndarray
) -> tuple[np.ndarray, float]:
    import numpy as np

    from edgekd.stats.intervals import bootstrap_groups

    function, entry = _function(params["metric"], context)

    def metric(rows: np.ndarray | slice) -> float:
        found = usercode.call_user_code(function, entry, outputs[rows], labels[rows])
        if not np.isfinite(found):
            raise RecipeError(f"{entry}: returned {found} on a resample of the evaluation set; expected a finite number")
        return float(found)

    order = np.argsort(groups, kind="stable")
    members = np.split(order, np.cumsum(np.unique(groups, return_counts=True)[1])[:-1])
    drawn = bootstrap_groups(groups, params["resamples"], params["seed"])
    values = []
    for number, index in enumerate(drawn):
        values.append(metric(np.concatenate([members[group] for group in index])))
        context.progress(number / len(drawn), f"{len(drawn)} resamples")
    return np.array(values), metric(slice(None))


def _function(text: str, context: Context) -> tuple[Callable[..., Any], EntryPoint]:
    entry = EntryPoint.parse(text)
    return usercode.load_function(context.recipe_dir, entry), entry
