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
from edgekd.plan import quantized_candidates
from edgekd.ports import Context, StageResult, Step

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from edgekd.domain.artifact import Artifact, Json
    from edgekd.domain.recipe import Recipe
    from edgekd.domain.target import Target

NAME = "quantize"
CODE: tuple[str, ...] = ("stages/quantize", "domain/scheme", "harness/runner")
MAX_SAMPLES = 512  # evenly spaced over a larger calibration set, so that none of its classes is lost if it is sorted by class


@dataclass(frozen=True, slots=True)
class QuantizeParams:
    """What may change a quantized file.

    ``options`` are those of the runtime's ``quantize``: scheme, io and the variant for the target's CPU. ``instruction_set`` is that
    of the CPU that calibrates (float kernels set the ranges), None where the scheme needs no calibration.
    """

    runtime: str
    options: Mapping[str, Json]
    instruction_set: str | None


def steps(recipe: Recipe, targets: Sequence[Target]) -> list[Step[QuantizeParams]]:
    """Return a step for each candidate that has to be quantized; targets share them."""
    result = []
    for name, candidate in quantized_candidates(recipe, targets).items():
        runtime = registry.runtime(candidate.runtime)
        inputs = {"model": f"export/student/{candidate.runtime}:model.{runtime.FORMAT}"}
        instruction_set = None
        if needs_calibration(candidate.scheme):
            inputs |= {f"calibration.{i}": f"inspect:calibration.inputs.{i}.npy" for i in range(len(recipe.student.inputs))}
            instruction_set = runner.facts()["instruction_set"]
        params = QuantizeParams(candidate.runtime, candidate.quantize, instruction_set)
        result.append(Step(name, NAME, params, inputs, runtime.QUANTIZE_TOOLS))
    return result


def run(step: Step[QuantizeParams], inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Write ``model.FORMAT`` and ``scheme.json``.

    Raises:
        StageError: if the quantizer refuses the model.
    """
    options = step.params.options
    runtime = registry.runtime(step.params.runtime)
    samples = _calibration_samples(inputs)
    path = context.out / f"model.{runtime.FORMAT}"
    context.progress(0.0, f"{len(samples)} calibration samples" if samples else str(options["scheme"]))
    try:
        scheme = runtime.quantize(inputs["model"].path, path, options, samples)
    except StageError as error:
        raise StageError(f"{step.id}: {error}") from error
    (context.out / "scheme.json").write_text(json.dumps(scheme, indent=1, sort_keys=True) + "\n")
    return StageResult({"size_bytes": path.stat().st_size, "ops": scheme["ops"], "float_ops": _count(scheme["float_ops"])}, _notes(scheme))


def _calibration_samples(inputs: Mapping[str, Artifact]) -> list[list[np.ndarray]]:
    """Return samples, each a list of its inputs with batch axis 1."""
    import numpy as np

    arrays = []
    for name, artifact in inputs.items():
        if name.startswith("calibration."):
            stored = np.load(artifact.path, mmap_mode="r", allow_pickle=False)
            rows = np.linspace(0, len(stored) - 1, min(len(stored), MAX_SAMPLES)).round().astype(int)
            arrays.append(np.array(stored[rows]))
    return [[array[row : row + 1] for array in arrays] for row in range(len(arrays[0]))] if arrays else []


def _notes(scheme: Mapping[str, Any]) -> tuple[str, ...]:
    notes = [f"{item['op']} ({item['count']}) stays float: {item['reason']}" for item in scheme["float_ops"]]
    if not scheme["integer_ops"]:
        notes.insert(0, f"nothing was quantized: no op of the model has an int8 form under {scheme['scheme']}")
    return tuple(notes)


def _count(ops: Any) -> int:
    return sum(item["count"] for item in ops)
