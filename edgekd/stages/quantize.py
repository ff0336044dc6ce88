# SPDX-License-Identifier: Apache-2.0
"""Quantize: one candidate a (runtime, scheme), with its scheme file and the list of ops that stay float."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from edgekd import registry
from edgekd.domain.scheme import needs_calibration
from edgekd.plan import quantized
from edgekd.ports import Context, StageResult, Step

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.recipe import Recipe
    from edgekd.domain.target import Target

NAME = "quantize"
VERSION = 1
MAX_SAMPLES = 512  # ranges by min and max settle long before; the first of the calibration set are taken


def steps(recipe: Recipe, targets: Sequence[Target]) -> list[Step]:
    """Return a step for each candidate that has to be quantized; targets share them."""
    found = []
    for name, candidate in quantized(recipe, targets).items():
        runtime = registry.runtime(candidate.runtime)
        inputs = {"model": f"export/student/{candidate.runtime}:model.{runtime.FORMAT}"}
        params = {**candidate.quantize, "runtime": candidate.runtime}
        if needs_calibration(candidate.scheme):
            inputs |= {f"calibration.{i}": f"inspect:calibration.inputs.{i}.npy" for i in range(len(recipe.student.inputs))}
            params["max_samples"] = MAX_SAMPLES
        found.append(Step(name, NAME, params, inputs, runtime.QUANTIZE_TOOLS))
    return found


def run(step: Step, inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Write ``model.FORMAT`` and ``scheme.json``."""
    import numpy as np

    params: Mapping[str, Any] = step.params
    runtime = registry.runtime(params["runtime"])
    arrays: list[Any] = []
    while (name := f"calibration.{len(arrays)}") in inputs:
        arrays.append(np.array(np.load(inputs[name].path, mmap_mode="r", allow_pickle=False)[: params["max_samples"]]))
    samples = [[array[row : row + 1] for array in arrays] for row in range(len(arrays[0]))] if arrays else []
    path = context.out / f"model.{runtime.FORMAT}"
    scheme = runtime.quantize(inputs["model"].path, path, params, samples)
    (context.out / "scheme.json").write_text(json.dumps(scheme, indent=1, sort_keys=True) + "\n")
    floating: Any = scheme["float_ops"]
    notes = tuple(f"{item['op']} ({item['count']}) stays float: {item['reason']}" for item in floating)
    return StageResult(
        {"size_bytes": path.stat().st_size, "ops": scheme["ops"], "float_ops": sum(item["count"] for item in floating)}, notes
    )
