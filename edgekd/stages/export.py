# SPDX-License-Identifier: Apache-2.0
"""Export: write student and teacher as float32 model files, one per runtime, and check their parity with PyTorch."""

from __future__ import annotations

import json
import math
import shutil
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import registry, usercode
from edgekd.domain.recipe import EntryPoint
from edgekd.errors import StageError
from edgekd.harness import runner
from edgekd.plan import DRY_RUN, is_dry_run, runtimes_of
from edgekd.ports import Context, StageResult, Step
from edgekd.store.arrays import open_array

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np

    from edgekd.domain.artifact import Artifact, Json
    from edgekd.domain.recipe import Recipe, TensorSpec
    from edgekd.domain.target import Target
    from edgekd.ports import Runtime

NAME = "export"
CODE: tuple[str, ...] = (
    "stages/export",
    "harness/runner",
    "kd/modules",
    "kd/reproducible",
    "kd/teachers",
    "store/arrays",
    "usercode",
)
PARITY_SAMPLES = 64
# Of the outputs' range. Kernels that sum in another order differ by 1e-7 to 5e-7 of it (seven small nets and one of 46
# convolutions); batch norms with another epsilon, the mildest mistake tested, by 5e-4.
TOLERANCE = 1e-4
# A network that is not trained may differ by more (its outputs are small differences of large numbers); a wrong op, by nearly all.
DRY_RUN_TOLERANCE = 1e-2


@dataclass(frozen=True, slots=True)
class ExportParams:
    """What may change an exported file and its parity.

    ``model`` is the entry point of the module, None for a teacher that is a whole-model file.
    ``instruction_set`` is that of the CPU that checks the parity: float kernels differ in the last bits. ``tolerance`` is the
    difference of outputs that the parity allows, as a share of their range.
    """

    runtime: str
    model: str | None
    inputs: tuple[TensorSpec, ...]
    instruction_set: str
    tolerance: float = TOLERANCE


def steps(recipe: Recipe, targets: Sequence[Target]) -> list[Step[ExportParams]]:
    """Return a step for student and teacher on each runtime that a target has, and a dry run for the student with fresh weights."""
    result = []
    specs = recipe.student.inputs
    samples = {f"inputs.{i}": f"inspect:evaluation.inputs.{i}.npy" for i in range(len(specs))}
    instruction_set = runner.facts()["instruction_set"]
    entry = recipe.teacher.model
    student = str(recipe.student.model)
    networks = {
        f"{NAME}/{DRY_RUN}/": (student, "inspect:student.fresh.safetensors", "inspect:student.code.json"),
        "export/student/": (student, "distill:student.safetensors", "inspect:student.code.json"),
        "export/teacher/": (None if entry is None else str(entry), recipe.teacher.artifact, "inspect:teacher.code.json"),
    }
    for name in runtimes_of(recipe, targets):
        runtime = registry.runtime(name)
        tools = (*runtime.EXPORT_TOOLS, runtime.PACKAGE)
        for prefix, (model, weights, code) in networks.items():
            step = f"{prefix}{name}"
            params = ExportParams(name, model, specs, instruction_set, DRY_RUN_TOLERANCE if is_dry_run(step) else TOLERANCE)
            result.append(Step(step, NAME, params, {"weights": weights, "code": code, **samples}, tools))
    return result


def run(step: Step[ExportParams], inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Write ``model.FORMAT`` and ``parity.json``.

    Raises:
        StageError: if the network cannot be exported.
    """
    runtime = registry.runtime(step.params.runtime)
    path = context.out / f"model.{runtime.FORMAT}"
    try:
        context.progress(0.0, f"to {runtime.FORMAT}")
        samples = _parity_samples(inputs)
        parity, notes = _export(runtime, step.params, inputs["weights"].path, path, context, samples, rewrite=True)
        if not parity["ok"]:
            plain = path.with_name(f"plain.{runtime.FORMAT}")
            plain_parity, _ = _export(runtime, step.params, inputs["weights"].path, plain, context, samples, rewrite=False)
            if plain_parity["ok"]:
                notes = (f"the {runtime.FORMAT} file is not simplified: that changed its outputs by {_error(parity)}",)
                parity = plain_parity
                plain.replace(path)
            plain.unlink(missing_ok=True)
    except StageError as error:
        raise StageError(f"{step.id}: {error}{_user_location(error)}") from error
    (context.out / "parity.json").write_text(json.dumps(parity, indent=1, sort_keys=True) + "\n")
    metrics: dict[str, Json] = {"size_bytes": path.stat().st_size, "parity": parity}
    return StageResult(metrics if parity["ok"] else {**metrics, "why_not": _describe_difference(parity)}, notes)


def _export(
    runtime: Runtime, params: ExportParams, weights: Path, path: Path, context: Context, samples: list[np.ndarray], *, rewrite: bool
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Write a model file; return its parity and notes."""
    reference, notes = _write_model(runtime, params, weights, path, context, rewrite=rewrite)
    context.progress(0.7, "parity")
    return _check_parity(reference, runtime, path, samples, params.tolerance), notes


def _describe_difference(parity: Mapping[str, Any]) -> str:
    """Return why a model file without parity cannot ship."""
    return (
        f"its outputs differ from PyTorch's by {_error(parity)} on {parity['samples']} samples; "
        f"allowed is {parity['tolerance']:.3g}: an op was converted wrongly"
    )


def _error(parity: Mapping[str, Any]) -> str:
    error = parity["max_abs_error"]
    return "NaN or infinity" if error is None else f"{error:.3g}"


def _write_model(
    runtime: Runtime, params: ExportParams, weights: Path, path: Path, context: Context, *, rewrite: bool
) -> tuple[Callable[[list[np.ndarray]], np.ndarray], tuple[str, ...]]:
    """Write the model file; return the original model as a function from a batch of inputs to logits, and notes."""
    from edgekd.kd import modules
    from edgekd.kd.teachers.load import load_exported_module, load_teacher

    entry = EntryPoint.parse(params.model) if params.model else None
    notes: tuple[str, ...] = ()
    if entry is not None:
        notes = runtime.export(modules.load_frozen_module(context.recipe_dir, entry, weights), params.inputs, path, rewrite=rewrite)
    elif weights.suffix == ".safetensors":
        raise StageError("stored logits are not a model")
    elif weights.suffix != ".onnx":
        notes = runtime.export(load_exported_module(weights), params.inputs, path, rewrite=rewrite)
    elif runtime.FORMAT == "onnx":
        shutil.copyfile(weights, path)
    else:
        raise StageError(f"an ONNX file cannot be converted to {runtime.FORMAT}")
    return load_teacher(context.recipe_dir, entry, weights), notes


def _user_location(error: BaseException) -> str:
    """Return where in the user's code an exporter stopped, `` (models.py:12)``, or nothing where that is unknown."""
    cause: BaseException | None = error
    location = ""
    while cause is not None:
        frames = [frame for frame in traceback.extract_tb(cause.__traceback__) if usercode.is_user_file(frame.filename)]
        location = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else location
        cause = cause.__cause__
    return location


def _parity_samples(inputs: Mapping[str, Artifact]) -> list[np.ndarray]:
    paths = [artifact.path for name, artifact in inputs.items() if name.startswith("inputs.")]
    return [open_array(path)[:PARITY_SAMPLES] for path in paths]


def _check_parity(
    reference: Callable[[list[np.ndarray]], np.ndarray], runtime: Runtime, path: Path, arrays: list[np.ndarray], tolerance: float
) -> dict[str, Any]:
    """Return how far the outputs of a model file are from those of the original model."""
    import numpy as np

    from edgekd.kd.reproducible import deterministic

    with deterministic(1):
        expected = reference(arrays)
    session = runtime.open(path, 1)
    outputs = np.concatenate([session.run([array[row : row + 1] for array in arrays])[0] for row in range(len(arrays[0]))])
    if outputs.shape != expected.shape:
        raise StageError(f"{path.name}: has outputs of shape {outputs.shape[1:]}, the model in PyTorch {expected.shape[1:]}")
    error = float(np.abs(outputs - expected).max())
    span = float(expected.max() - expected.min()) or 1.0
    noise = float(np.mean((outputs - expected) ** 2))
    is_finite = math.isfinite(error)
    are_logits = expected.ndim == 2  # noqa: PLR2004  (samples and classes)
    return {
        "samples": len(expected),
        "max_abs_error": error if is_finite else None,
        "psnr_db": 10 * math.log10(span**2 / noise) if is_finite and noise > 0 else None,
        "agreement": float((outputs.argmax(1) == expected.argmax(1)).mean()) if are_logits else None,
        "tolerance": tolerance * span,
        "ok": is_finite and error <= tolerance * span,
    }
