# SPDX-License-Identifier: Apache-2.0
"""Export: the student and the teacher as float32 model files, one a runtime, with parity against PyTorch."""

from __future__ import annotations

import json
import math
import shutil
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import registry, usercode
from edgekd.domain.recipe import EntryPoint, TensorSpec
from edgekd.errors import StageError
from edgekd.harness import runner
from edgekd.plan import runtimes_of
from edgekd.ports import Context, StageResult, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.recipe import Recipe
    from edgekd.domain.target import Target
    from edgekd.ports import Runtime

NAME = "export"
CODE: tuple[str, ...] = ("stages/export", "kd/modules", "kd/reproducible", "kd/teachers", "usercode")
TEACHER = "export/teacher/"
PARITY_SAMPLES = 64
# Of the outputs' range. Kernels that sum in another order differ by 1e-7 to 5e-7 of it (seven small nets and one of 46
# convolutions); batch norms with another epsilon, the mildest mistake that was tried, by 5e-4.
TOLERANCE = 1e-4


def steps(recipe: Recipe, targets: Sequence[Target]) -> list[Step[Any]]:
    """Return a step for student and teacher on each runtime that a target has."""
    found = []
    specs = [asdict(spec) for spec in recipe.student.inputs]
    samples = {f"inputs.{i}": f"inspect:evaluation.inputs.{i}.npy" for i in range(len(specs))}
    instruction_set = runner.facts()["instruction_set"]
    for name in runtimes_of(recipe, targets):
        runtime = registry.runtime(name)
        tools = (*runtime.EXPORT_TOOLS, runtime.PACKAGE)
        common: dict[str, Any] = {
            "runtime": name,
            "inputs": specs,
            "parity_samples": PARITY_SAMPLES,
            "tolerance": TOLERANCE,
            "instruction_set": instruction_set,  # float kernels differ in the last bits
        }
        student = {"weights": "distill:student.safetensors", "code": "inspect:student.code.json", **samples}
        found.append(Step(f"export/student/{name}", NAME, {**common, "model": str(recipe.student.model)}, student, tools))
        teacher = {"weights": recipe.teacher.artifact, "code": "inspect:teacher.code.json", **samples}
        entry = recipe.teacher.model
        found.append(Step(f"{TEACHER}{name}", NAME, {**common, "model": None if entry is None else str(entry)}, teacher, tools))
    return found


def run(step: Step[Any], inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Write ``model.FORMAT`` and ``parity.json``; ``why_not.txt`` for a teacher that cannot be exported.

    Raises:
        StageError: if the student cannot be exported.
    """
    params: Mapping[str, Any] = step.params
    runtime = registry.runtime(params["runtime"])
    path = context.out / f"model.{runtime.FORMAT}"
    try:
        context.progress(0.0, f"to {runtime.FORMAT}")
        reference = _write(runtime, params, inputs["weights"].path, path, context)
        context.progress(0.7, "parity")
        parity = _parity(reference, runtime, path, inputs, params)
    except StageError as error:
        told = f"{error}{_place(error)}"
        if not step.id.startswith(TEACHER):
            raise StageError(f"{step.id}: {told}; change the model, or leave {runtime.NAME} out with quantize.runtimes") from error
        path.unlink(missing_ok=True)
        (context.out / "why_not.txt").write_text(f"{told}\n")
        return StageResult(notes=(f"the teacher has no {runtime.NAME} model, so the speed-up against it is unknown there: {told}",))
    (context.out / "parity.json").write_text(json.dumps(parity, indent=1, sort_keys=True) + "\n")
    return StageResult({"size_bytes": path.stat().st_size, "parity": parity})


def _write(
    runtime: Runtime, params: Mapping[str, Any], weights: Path, path: Path, context: Context
) -> Callable[[list[np.ndarray]], np.ndarray]:
    """Write the model file and return what answers for it in its original form."""
    from edgekd.kd import modules
    from edgekd.kd.teachers.load import load_exported_module, load_teacher

    entry = EntryPoint.parse(params["model"]) if params["model"] else None
    specs = [TensorSpec(item["name"], tuple(item["shape"]), item["dtype"]) for item in params["inputs"]]
    if entry is not None:
        runtime.export(modules.load_frozen_module(context.recipe_dir, entry, weights), specs, path)
    elif weights.suffix == ".safetensors":
        raise StageError("stored answers are no model")
    elif weights.suffix != ".onnx":
        runtime.export(load_exported_module(weights), specs, path)
    elif runtime.FORMAT == "onnx":
        shutil.copyfile(weights, path)
    else:
        raise StageError(f"an ONNX file cannot become {runtime.FORMAT}")
    return load_teacher(context.recipe_dir, entry, weights)


def _place(error: BaseException) -> str:
    """Return where in the user's code an exporter stopped: `` (models.py:12)``, or nothing where that is not known."""
    cause: BaseException | None = error
    found = ""
    while cause is not None:
        frames = [frame for frame in traceback.extract_tb(cause.__traceback__) if usercode.is_user_file(frame.filename)]
        found = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else found
        cause = cause.__cause__
    return found


def _parity(
    reference: Callable[..., Any], runtime: Runtime, path: Path, inputs: Mapping[str, Artifact], params: Mapping[str, Any]
) -> dict[str, Any]:
    import numpy as np

    from edgekd.kd.reproducible import deterministic

    count = params["parity_samples"]
    arrays = [
        np.array(np.load(inputs[f"inputs.{i}"].path, mmap_mode="r", allow_pickle=False)[:count]) for i in range(len(params["inputs"]))
    ]
    with deterministic(1):
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
