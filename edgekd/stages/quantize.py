# SPDX-License-Identifier: Apache-2.0
"""Quantize: write one candidate per (runtime, scheme), with its scheme file and the list of ops that stay float."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekd import registry
from edgekd.domain.scheme import needs_calibration
from edgekd.errors import StageError
from edgekd.harness import runner
from edgekd.plan import DRY_RUN, dry_run_of, is_dry_run, quantized_candidates
from edgekd.ports import Context, StageResult, Step
from edgekd.store.arrays import open_array

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from edgekd.domain.artifact import Artifact, Json
    from edgekd.domain.recipe import Recipe
    from edgekd.domain.target import Target
    from edgekd.ports import Runtime

NAME = "quantize"
CODE: tuple[str, ...] = ("stages/quantize", "domain/scheme", "harness/runner", "store/arrays")
DRY_RUN_SAMPLES = 8
MAX_SAMPLES = 512  # evenly spaced over a larger calibration set, so that none of its classes is lost if it is sorted by class


@dataclass(frozen=True, slots=True)
class QuantizeParams:
    """What may change a quantized file.

    ``options`` are those of the runtime's ``quantize``: scheme, io and the variant for the target's CPU. ``instruction_set`` is that
    of the CPU that calibrates (float kernels set the ranges), None where the scheme needs no calibration. ``samples`` is the most
    calibration samples to use. A dry run also runs the file on them.
    """

    runtime: str
    options: Mapping[str, Json]
    instruction_set: str | None
    samples: int = MAX_SAMPLES


def steps(recipe: Recipe, targets: Sequence[Target]) -> list[Step[QuantizeParams]]:
    """Return a step for each candidate that has to be quantized, and its dry run with fresh weights; targets share them."""
    result = []
    for name, candidate in quantized_candidates(recipe, targets).items():
        runtime = registry.runtime(candidate.runtime)
        samples = {f"calibration.{i}": f"inspect:calibration.inputs.{i}.npy" for i in range(len(recipe.student.inputs))}
        is_calibrated = needs_calibration(candidate.scheme)
        instruction_set = runner.facts()["instruction_set"] if is_calibrated else None
        inputs = {"model": f"export/{DRY_RUN}/{candidate.runtime}:model.{runtime.FORMAT}", **samples}
        params = QuantizeParams(candidate.runtime, candidate.quantize, instruction_set, DRY_RUN_SAMPLES)
        result.append(Step(dry_run_of(name), NAME, params, inputs, runtime.QUANTIZE_TOOLS))
        inputs = {"model": f"export/student/{candidate.runtime}:model.{runtime.FORMAT}", **(samples if is_calibrated else {})}
        params = QuantizeParams(candidate.runtime, candidate.quantize, instruction_set)
        result.append(Step(name, NAME, params, inputs, runtime.QUANTIZE_TOOLS))
    return result


def run(step: Step[QuantizeParams], inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Write ``model.FORMAT`` and ``scheme.json``.

    Raises:
        StageError: if the quantizer refuses the model, or a dry run cannot run the file.
    """
    options = step.params.options
    runtime = registry.runtime(step.params.runtime)
    samples = _calibration_samples(inputs, step.params.samples)
    calibration = samples if needs_calibration(str(options["scheme"])) else []
    path = context.out / f"model.{runtime.FORMAT}"
    context.progress(0.0, f"{len(calibration)} calibration samples" if calibration else str(options["scheme"]))
    try:
        scheme = runtime.quantize(inputs["model"].path, path, options, calibration)
        if is_dry_run(step.id):
            _run_file(runtime, path, samples)
    except StageError as error:
        raise StageError(f"{step.id}: {error}") from error
    (context.out / "scheme.json").write_text(json.dumps(scheme, indent=1, sort_keys=True) + "\n")
    return StageResult({"size_bytes": path.stat().st_size, "ops": scheme["ops"], "float_ops": _count(scheme["float_ops"])}, _notes(scheme))


def _calibration_samples(inputs: Mapping[str, Artifact], count: int) -> list[list[np.ndarray]]:
    """Return at most ``count`` samples, each a list of its inputs with batch axis 1."""
    import numpy as np

    arrays = []
    for name, artifact in inputs.items():
        if name.startswith("calibration."):
            stored = open_array(artifact.path)
            arrays.append(stored[np.linspace(0, len(stored) - 1, min(len(stored), count)).round().astype(int)])
    return [[array[row : row + 1] for array in arrays] for row in range(len(arrays[0]))] if arrays else []


def _run_file(runtime: Runtime, path: Path, samples: Sequence[Sequence[np.ndarray]]) -> None:
    """Open a model file and run it on samples.

    Raises:
        StageError: if that fails, or an output is not finite.
    """
    import numpy as np

    session: Any = runtime.open(path, 1)
    for sample in samples:
        outputs = session.run([runner.to_input_type(np, array, tensor) for array, tensor in zip(sample, session.inputs, strict=True)])
        if not np.isfinite(outputs[0]).all():
            raise StageError(f"{path.name}: returns outputs that are not finite")


def _notes(scheme: Mapping[str, Any]) -> tuple[str, ...]:
    notes = [f"{item['op']} ({item['count']}) stays float: {item['reason']}" for item in scheme["float_ops"]]
    if not scheme["integer_ops"]:
        notes.insert(0, f"nothing was quantized: no op of the model has an int8 form under {scheme['scheme']}")
    return (*scheme.get("notes", ()), *notes)


def _count(ops: Any) -> int:
    return sum(item["count"] for item in ops)
