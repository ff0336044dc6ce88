# SPDX-License-Identifier: Apache-2.0
"""Export: the student and the teacher as float32 model files, one a runtime, with parity against PyTorch."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from edgekd import registry
from edgekd.domain.recipe import Entry, TensorSpec
from edgekd.errors import StageError
from edgekd.plan import runtimes_of
from edgekd.ports import Context, StageResult, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.recipe import Recipe
    from edgekd.domain.target import Target
    from edgekd.ports import Runtime

NAME = "export"
VERSION = 1
PARITY_SAMPLES = 64
TOLERANCE = 1e-3  # of the outputs' range: float32 kernels that sum in another order differ by about 1e-6


def steps(recipe: Recipe, targets: Sequence[Target]) -> list[Step]:
    """Return a step for student and teacher on each runtime that a target has."""
    found = []
    specs = [asdict(spec) for spec in recipe.student.inputs]
    samples = {f"inputs.{i}": f"inspect:evaluation.inputs.{i}.npy" for i in range(len(specs))}
    for name in runtimes_of(recipe, targets):
        runtime = registry.runtime(name)
        tools = (*runtime.EXPORT_TOOLS, runtime.PACKAGE)
        common: dict[str, Any] = {"runtime": name, "inputs": specs, "parity_samples": PARITY_SAMPLES, "tolerance": TOLERANCE}
        student = {"weights": "distill:student.safetensors", "code": "inspect:student.code.json", **samples}
        found.append(Step(f"export/student/{name}", NAME, {**common, "model": str(recipe.student.model)}, student, tools))
        teacher = {"weights": recipe.teacher.artifact, "code": "inspect:teacher.code.json", **samples}
        entry = recipe.teacher.model
        found.append(Step(f"export/teacher/{name}", NAME, {**common, "model": None if entry is None else str(entry)}, teacher, tools))
    return found


def run(step: Step, inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Write ``model.FORMAT`` and ``parity.json``; ``why_not.txt`` for a teacher that cannot be exported.

    Raises:
        StageError: if the student cannot be exported.
    """
    params: Mapping[str, Any] = step.params
    runtime = registry.runtime(params["runtime"])
    specs = [TensorSpec(item["name"], tuple(item["shape"]), item["dtype"]) for item in params["inputs"]]
    path = context.out / f"model.{runtime.FORMAT}"
    try:
        reference = _write(runtime, params["model"], inputs["weights"].path, specs, path, context)
    except StageError as error:
        if not step.id.startswith("export/teacher/"):
            raise
        path.unlink(missing_ok=True)
        (context.out / "why_not.txt").write_text(f"{error}\n")
        return StageResult(notes=(f"the teacher has no {runtime.NAME} model: {error}",))
    context.progress(0.7, "parity")
    parity = _parity(reference, runtime, path, inputs, params)
    (context.out / "parity.json").write_text(json.dumps(parity, indent=1, sort_keys=True) + "\n")
    return StageResult({"size_bytes": path.stat().st_size, "parity": parity})


def _write(
    runtime: Runtime, entry_text: str | None, weights: Path, specs: Sequence[TensorSpec], path: Path, context: Context
) -> Callable[[list[np.ndarray]], np.ndarray]:
    """Write the model file and return what answers for it in its original form."""
    from edgekd.kd import models

    entry = Entry(*entry_text.rsplit(":", 1)) if entry_text else None
    if weights.suffix == ".onnx":
        if runtime.FORMAT != "onnx":
            raise StageError(f"the teacher is an ONNX file, which cannot become {runtime.FORMAT}")
        shutil.copyfile(weights, path)
        return models.load_teacher(context.recipe_dir, None, weights)
    if weights.suffix == ".safetensors" and entry is not None:
        module = models.load_teacher_module(context.recipe_dir, entry, weights)
    elif weights.suffix == ".pt2":
        module = models.load_exported_module(weights)
    else:
        raise StageError(f"the teacher is a TorchScript file, which the {runtime.FORMAT} exporter does not read")
    runtime.export(module, specs, path)
    return models.load_teacher(context.recipe_dir, entry, weights)


def _parity(
    reference: Callable[..., Any], runtime: Runtime, path: Path, inputs: Mapping[str, Artifact], params: Mapping[str, Any]
) -> dict[str, Any]:
    import numpy as np

    count = params["parity_samples"]
    arrays = [
        np.array(np.load(inputs[f"inputs.{i}"].path, mmap_mode="r", allow_pickle=False)[:count]) for i in range(len(params["inputs"]))
    ]
    wanted = reference(arrays)
    session = runtime.open(path, 1)
    found = np.concatenate([session.run([array[row : row + 1] for array in arrays])[0] for row in range(len(arrays[0]))])
    if found.shape != wanted.shape:
        raise StageError(f"{path.name}: gives outputs of shape {found.shape[1:]}, the model in PyTorch {wanted.shape[1:]}")
    error = float(np.abs(found - wanted).max())
    span = float(wanted.max() - wanted.min()) or 1.0
    noise = float(np.mean((found - wanted) ** 2))
    finite = math.isfinite(error)
    return {
        "samples": len(wanted),
        "max_abs_error": error if finite else None,
        "psnr_db": 10 * math.log10(span**2 / noise) if finite and noise > 0 else None,
        "agreement": float((found.argmax(1) == wanted.argmax(1)).mean()) if wanted.ndim == 2 else None,  # noqa: PLR2004  (logits)
        "tolerance": params["tolerance"] * span,
        "ok": finite and error <= params["tolerance"] * span,
    }
