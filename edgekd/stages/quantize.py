# SPDX-License-Identifier: Apache-2.0
"""Quantize: one candidate a (runtime, scheme), with its scheme file and the list of ops that stay float."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from edgekd import registry
from edgekd.domain.scheme import needs_calibration
from edgekd.errors import StageError
from edgekd.harness import runner
from edgekd.plan import quantized
from edgekd.ports import Context, StageResult, Step

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgekd.domain.artifact import Artifact, Json
    from edgekd.domain.recipe import Recipe
    from edgekd.domain.target import Target

NAME = "quantize"
CODE: tuple[str, ...] = ("stages/quantize", "domain/scheme")
MAX_SAMPLES = 512  # evenly spaced ones of a larger calibration set, so that one that is sorted by class loses none


def steps(recipe: Recipe, targets: Sequence[Target]) -> list[Step[Any]]:
    """Return a step for each candidate that has to be quantized; targets share them."""
    found = []
    for name, candidate in quantized(recipe, targets).items():
        runtime = registry.runtime(candidate.runtime)
        inputs = {"model": f"export/student/{candidate.runtime}:model.{runtime.FORMAT}"}
        params: dict[str, Json] = {**candidate.quantize, "runtime": candidate.runtime}
        if needs_calibration(candidate.scheme):
            inputs |= {f"calibration.{i}": f"inspect:calibration.inputs.{i}.npy" for i in range(len(recipe.student.inputs))}
            params |= {"max_samples": MAX_SAMPLES, "instruction_set": runner.facts()["instruction_set"]}  # float kernels set the ranges
        found.append(Step(name, NAME, params, inputs, runtime.QUANTIZE_TOOLS))
    return found


def run(step: Step[Any], inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Write ``model.FORMAT`` and ``scheme.json``.

    Raises:
        StageError: if the quantizer refuses the model.
    """
    import numpy as np

    params: Mapping[str, Any] = step.params
    runtime = registry.runtime(params["runtime"])
    arrays: list[Any] = []
    while (name := f"calibration.{len(arrays)}") in inputs:
        stored = np.load(inputs[name].path, mmap_mode="r", allow_pickle=False)
        count = min(len(stored), params["max_samples"])
        arrays.append(np.array(stored[np.linspace(0, len(stored) - 1, count).round().astype(int)]))
    samples = [[array[row : row + 1] for array in arrays] for row in range(len(arrays[0]))] if arrays else []
    path = context.out / f"model.{runtime.FORMAT}"
    context.progress(0.0, f"{len(samples)} calibration samples" if samples else str(params["scheme"]))
    try:
        scheme = runtime.quantize(inputs["model"].path, path, params, samples)
    except StageError as error:
        raise StageError(f"{step.id}: {error}") from error
    (context.out / "scheme.json").write_text(json.dumps(scheme, indent=1, sort_keys=True) + "\n")
    return StageResult({"size_bytes": path.stat().st_size, "ops": scheme["ops"], "float_ops": _count(scheme["float_ops"])}, _notes(scheme))


def _notes(scheme: Mapping[str, Any]) -> tuple[str, ...]:
    notes = [f"{item['op']} ({item['count']}) stays float: {item['reason']}" for item in scheme["float_ops"]]
    if not scheme["integer_ops"]:
        notes.insert(0, f"nothing was quantized: no op of the model has an int8 form under {scheme['scheme']}")
    return tuple(notes)


def _count(items: Any) -> int:
    return sum(item["count"] for item in items)
