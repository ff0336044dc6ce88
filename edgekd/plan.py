# SPDX-License-Identifier: Apache-2.0
"""Recipe x targets -> plan: the steps and the candidates. Every impossibility that can be known is refused here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekd import registry
from edgekd.domain.candidate import Candidate
from edgekd.domain.scheme import FLOAT32, needs_calibration
from edgekd.errors import RecipeError, expected_one_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from edgekd.domain.artifact import Json
    from edgekd.domain.recipe import Quantize, Recipe
    from edgekd.domain.target import RuntimeEntry, Target
    from edgekd.ports import Stage, Step


@dataclass(frozen=True, slots=True)
class Plan:
    """What a build will do: steps in an order in which inputs come first, and each target's candidates."""

    recipe: Recipe
    targets: tuple[Target, ...]
    steps: tuple[Step[Any], ...]
    candidates: Mapping[str, tuple[Candidate, ...]]


def resolve(recipe: Recipe, targets: Sequence[Target], pipeline: Sequence[Stage]) -> Plan:
    """Return the plan.

    Raises:
        RecipeError: if a target leaves no candidate, or the recipe asks for what a target does not allow.
    """
    found = {target.name: candidates(recipe, target) for target in targets}
    steps = _ordered([step for stage in pipeline for step in stage.steps(recipe, targets)])
    return Plan(recipe, tuple(targets), steps, found)


def _ordered(steps: Sequence[Step[Any]]) -> tuple[Step[Any], ...]:
    """Return steps so that inputs come first; else in the order of the pipeline, which a chain of assistants leaves."""
    by_id = {step.id: step for step in steps}
    found: dict[str, Step[Any]] = {}

    def add(step: Step[Any]) -> None:
        for needed in dict.fromkeys(reference.partition(":")[0] for reference in step.inputs.values()):
            if needed not in found:
                add(by_id[needed])
        found[step.id] = step

    for step in steps:
        if step.id not in found:
            add(step)
    return tuple(found.values())


def candidates(recipe: Recipe, target: Target) -> tuple[Candidate, ...]:
    """Return what the target allows and the recipe asks for: one candidate a (runtime, scheme).

    Raises:
        RecipeError: if that is nothing, or the recipe names a scheme or runtime that the target does not have.
    """
    wanted = recipe.overrides_for(target.name).quantize
    where = f"target {target.name}: quantize.schemes"
    schemes = _with_edges(wanted, _chosen(wanted.schemes, target.schemes, where), where)
    runtimes = _chosen(wanted.runtimes, [entry.name for entry in target.runtimes], f"target {target.name}: quantize.runtimes")
    made = tuple(
        _candidate(entry, scheme, wanted.io, target)
        for entry in target.runtimes
        if entry.name in runtimes
        for scheme in schemes
        if scheme in registry.runtime(entry.name).SCHEMES
    )
    if not made:
        names = (
            f'none of the runtimes {", ".join(runtimes)} has one of the schemes {", ".join(schemes) or "(none)"} with io = "{wanted.io}"'
        )
        raise RecipeError(f"target {target.name}: no candidate: {names}")
    return made


def runtimes_of(recipe: Recipe, targets: Iterable[Target]) -> tuple[str, ...]:
    """Return the names of the runtimes for which something is exported, in a stable order."""
    return tuple(sorted({candidate.runtime for target in targets for candidate in candidates(recipe, target)}))


def quantized(recipe: Recipe, targets: Iterable[Target]) -> dict[str, Candidate]:
    """Return the candidates that have to be quantized, by the id of their step; targets share them."""
    return {
        candidate.model_step: candidate for target in targets for candidate in candidates(recipe, target) if candidate.scheme != FLOAT32
    }


def _candidate(entry: RuntimeEntry, scheme: str, io: str, target: Target) -> Candidate:
    runtime = registry.runtime(entry.name)
    if scheme == FLOAT32:
        params: dict[str, Json] = {"scheme": scheme}
        step = f"export/student/{entry.name}"
    else:
        variant = runtime.variant(scheme, target.cpu.features, target.device.arch)
        params = {"scheme": scheme, "io": io, **variant}
        marks = [f"{key}={value}" for key, value in sorted(variant.items())] + ([f"io={io}"] if io != "float32" else [])
        step = "/".join(["quantize", entry.name, scheme, "ptq", *marks])
    return Candidate(step, entry.name, scheme, "ptq", step, f"evaluate/{step}", entry.threads, params)


def _with_edges(wanted: Quantize, schemes: Sequence[str], where: str) -> Sequence[str]:
    """Return the schemes that can have the inputs and outputs that the recipe wants: integer ones need fixed ranges."""
    if wanted.io == "float32":
        return schemes
    fit = [scheme for scheme in schemes if needs_calibration(scheme)]
    if wanted.schemes != "auto" and len(fit) < len(schemes):
        unfit = next(scheme for scheme in schemes if scheme not in fit)
        raise RecipeError(f"{where}: '{unfit}' has float inputs and outputs; quantize.io = \"int8\" needs a static scheme")
    return fit


def _chosen(wanted: str | tuple[str, ...], allowed: Sequence[str], where: str) -> tuple[str, ...]:
    if wanted == "auto":
        return tuple(allowed)
    names = (wanted,) if isinstance(wanted, str) else wanted
    problems = [f"{where}: '{name}' is not allowed there; {expected_one_of(name, allowed)}" for name in names if name not in allowed]
    if problems:
        raise RecipeError(*problems)
    return names
