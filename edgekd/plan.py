# SPDX-License-Identifier: Apache-2.0
"""Recipe and targets to plan: the steps and the candidates. Whatever cannot work is refused here, before a long stage runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from edgekd import registry
from edgekd.domain.candidate import Candidate
from edgekd.domain.scheme import FLOAT32, needs_calibration
from edgekd.errors import RecipeError, StageError, expected_one_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from edgekd.domain.artifact import Json
    from edgekd.domain.recipe import Recipe
    from edgekd.domain.scheme import Quantize
    from edgekd.domain.target import RuntimeEntry, Target
    from edgekd.ports import CompletedStep, Stage, Step

DRY_RUN = "dry_run"  # the second part of the names of steps that try exports and quantizers with fresh weights, before training


@dataclass(frozen=True, slots=True)
class Plan:
    """What a build will do: steps in topological order, and each target's candidates."""

    recipe: Recipe
    targets: tuple[Target, ...]
    steps: tuple[Step[Any], ...]
    candidates: Mapping[str, tuple[Candidate, ...]]


def resolve(recipe: Recipe, targets: Sequence[Target], pipeline: Sequence[Stage]) -> Plan:
    """Return the plan.

    Raises:
        RecipeError: if a target leaves no candidate, or the recipe asks for what a target does not allow.
    """
    by_target = {target.name: candidates(recipe, target) for target in targets}
    steps = _sort_steps([step for stage in pipeline for step in stage.steps(recipe, targets)])
    return Plan(recipe, tuple(targets), steps, by_target)


def _sort_steps(steps: Sequence[Step[Any]]) -> tuple[Step[Any], ...]:
    """Return the steps in topological order, otherwise dry runs first, then in the pipeline's order.

    A chain of assistants goes back to earlier stages.
    """
    steps = sorted(steps, key=lambda step: not is_dry_run(step.id))
    by_id = {step.id: step for step in steps}
    ordered: dict[str, Step[Any]] = {}

    def add(step: Step[Any]) -> None:
        if step.id not in ordered:
            for reference in step.inputs.values():
                add(by_id[reference.partition(":")[0]])
            ordered[step.id] = step

    for step in steps:
        add(step)
    return tuple(ordered.values())


def candidates(recipe: Recipe, target: Target) -> tuple[Candidate, ...]:
    """Return what the target allows and the recipe asks for: one candidate per (runtime, scheme).

    Raises:
        RecipeError: if that is nothing, or the recipe names a scheme or runtime that the target does not have.
    """
    quantize, key = recipe.overrides_for(target.name).quantize, f"target {target.name}: quantize"
    schemes = _with_io(quantize, _select(quantize.schemes, target.schemes, f"{key}.schemes"), f"{key}.schemes")
    runtimes = _select(quantize.runtimes, [entry.name for entry in target.runtimes], f"{key}.runtimes")
    result = tuple(
        _candidate(entry, scheme, quantize.io, target)
        for entry in target.runtimes
        if entry.name in runtimes
        for scheme in schemes
        if scheme in registry.runtime(entry.name).SCHEMES
    )
    if not result:
        schemes_text = f'{", ".join(schemes) or "(none)"} with io = "{quantize.io}"'
        raise RecipeError(
            f"target {target.name}: no candidate: none of the runtimes {', '.join(runtimes)} has one of the schemes {schemes_text}"
        )
    return result


def runtimes_of(recipe: Recipe, targets: Iterable[Target]) -> tuple[str, ...]:
    """Return the names of the runtimes for which something is exported, in a stable order."""
    return tuple(sorted({candidate.runtime for target in targets for candidate in candidates(recipe, target)}))


def quantized_candidates(recipe: Recipe, targets: Iterable[Target]) -> dict[str, Candidate]:
    """Return the candidates that have to be quantized, by step; targets share them."""
    return {
        candidate.model_step: candidate for target in targets for candidate in candidates(recipe, target) if candidate.scheme != FLOAT32
    }


def is_dry_run(step: str) -> bool:
    """Return whether a step tries an export or a quantizer with fresh weights."""
    return step.split("/")[1:2] == [DRY_RUN]


def dry_run_of(step: str) -> str:
    """Return the id of the dry run of a step ``export/NETWORK/RUNTIME`` or ``quantize/RUNTIME/...``."""
    stage, *parts = step.split("/")
    return "/".join([stage, DRY_RUN, *(parts[1:] if stage == "export" else parts)])


def left_out(candidates: Iterable[Candidate], completed: Mapping[str, CompletedStep]) -> dict[str, str]:
    """Return why candidates cannot ship, by their ids: the export of their runtime, their own file or an evaluation failed."""
    reasons = {}
    for candidate in candidates:
        export = f"export/student/{candidate.runtime}"
        steps = (export, candidate.model_step, f"evaluate/{export}", candidate.evaluate_step)
        for step in (*map(dry_run_of, steps[:2]), *steps):
            reason = completed[step].why_not if step in completed else None
            if reason is not None:
                reasons[candidate.id] = f"with fresh weights, {reason}" if is_dry_run(step) else reason
                break
    return reasons


def check_left_out(plan: Plan, completed: Mapping[str, CompletedStep]) -> None:
    """Check that each target has a candidate left, and one for each runtime and scheme that the recipe names for it.

    Raises:
        RecipeError: if a runtime or scheme that the recipe names cannot be had.
        StageError: if no candidate is left.
    """
    for target in plan.targets:
        check_reasons(plan, target, left_out(plan.candidates[target.name], completed))


def check_reasons(plan: Plan, target: Target, reasons: Mapping[str, str]) -> None:
    """Check that a target has a candidate left, and one for each runtime and scheme that the recipe names for it.

    Raises:
        RecipeError: if a runtime or scheme that the recipe names cannot be had.
        StageError: if no candidate is left.
    """
    targeted = plan.candidates[target.name]
    quantize = plan.recipe.overrides_for(target.name).quantize
    for key, names, kind in (("runtimes", quantize.runtimes, "runtime"), ("schemes", quantize.schemes, "scheme")):
        for name in () if names == "auto" else names:
            of_name = [candidate.id for candidate in targeted if getattr(candidate, kind) == name]
            if of_name and reasons.keys() >= set(of_name):
                listing = "; ".join(f"{candidate}: {reasons[candidate]}" for candidate in of_name)
                advice = f"change the model, leave '{name}' out, or use quantize.{key} = \"auto\""
                raise RecipeError(f"target {target.name}: quantize.{key}: '{name}' cannot be had: {listing}; {advice}")
    if len(reasons) == len(targeted):
        listing = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise StageError(f"target {target.name}: no candidate is left: {listing}; change the model")


def _candidate(entry: RuntimeEntry, scheme: str, io: str, target: Target) -> Candidate:
    runtime = registry.runtime(entry.name)
    if scheme == FLOAT32:
        params: dict[str, Json] = {"scheme": scheme}
        step = f"export/student/{entry.name}"
    else:
        variant = runtime.variant(scheme, target.cpu.features, target.device.arch)
        params = {"scheme": scheme, "io": io, **variant}
        options = [f"{key}={value}" for key, value in sorted(variant.items())] + ([f"io={io}"] if io != "float32" else [])
        step = "/".join(["quantize", entry.name, scheme, "ptq", *options])
    return Candidate(step, entry.name, scheme, "ptq", step, f"evaluate/{step}", entry.threads, params)


def _with_io(quantize: Quantize, schemes: Sequence[str], key: str) -> Sequence[str]:
    """Return the schemes that can have the inputs and outputs that the recipe asks for: int8 ones need ranges from calibration."""
    if quantize.io == "float32":
        return schemes
    static = [scheme for scheme in schemes if needs_calibration(scheme)]
    if quantize.schemes != "auto" and len(static) < len(schemes):
        other = next(scheme for scheme in schemes if scheme not in static)
        raise RecipeError(f"{key}: '{other}' has float inputs and outputs; quantize.io = \"int8\" needs a static scheme")
    return static


def _select(names: Literal["auto"] | tuple[str, ...], allowed: Sequence[str], key: str) -> tuple[str, ...]:
    if names == "auto":
        return tuple(allowed)
    problems = [f"{key}: the target does not allow '{name}'; {expected_one_of(name, allowed)}" for name in names if name not in allowed]
    if problems:
        raise RecipeError(*problems)
    return names
