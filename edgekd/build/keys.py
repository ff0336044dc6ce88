# SPDX-License-Identifier: Apache-2.0
"""Cache keys: what a step's key is computed from, and why a step is not in the cache."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgekd import registry
from edgekd.build.refusals import why_skipped
from edgekd.errors import StageError, printable
from edgekd.ports import CompletedStep
from edgekd.store.digests import canonical_json, digest, tool_version

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from edgekd.domain.artifact import Artifact
    from edgekd.plan import Plan
    from edgekd.ports import Stage, Step
    from edgekd.store.cache import Cache

KEY_SCHEMA = 2
PACKAGE = Path(__file__).parents[1]
_LONGEST_VALUE = 40


@dataclass(frozen=True, slots=True)
class StepExplanation:
    """What a build would do with a step: ``hit``, ``miss`` with the reason, ``after`` (an input is not known yet), or ``left out``."""

    step: Step[Any]
    outcome: str
    reason: str


def explain(plan: Plan, stages: Mapping[str, Stage], cache: Cache, recipe_dir: Path) -> list[StepExplanation]:
    """Return for each step whether it would run, and why; runs nothing."""
    completed: dict[str, CompletedStep] = {}
    skipped: dict[str, str] = {}
    explanations: list[StepExplanation] = []
    for step in plan.steps:
        if (reason := why_skipped(step, completed, skipped)) is not None:
            skipped[step.id] = reason
            explanations.append(StepExplanation(step, "left out", reason))
            continue
        missing = sorted(step.producers - set(completed))
        if missing:
            explanations.append(StepExplanation(step, "after", ", ".join(missing)))
            continue
        material = key_material(stages[step.stage], step, completed)
        entry = cache.get(find_key(cache, material, recipe_dir))
        if entry is None:
            explanations.append(StepExplanation(step, "miss", why_miss(step, material, cache, recipe_dir)))
        else:
            completed[step.id] = CompletedStep(step, entry, hit=True)
            explanations.append(StepExplanation(step, "hit", entry.key[:12]))
    return explanations


def key_material(stage: Stage, step: Step[Any], completed: Mapping[str, CompletedStep]) -> dict[str, Any]:
    """Return all that may change the bytes that a step writes."""
    material = {
        "schema": KEY_SCHEMA,
        "stage": step.stage,
        "code": code_digest(stage, step),
        "params": asdict(step.params),
        "inputs": {name: artifact.digest for name, artifact in input_artifacts(step, completed).items()},
        "tools": {tool: tool_version(tool) for tool in step.tools},
    }
    return cast("dict[str, Any]", json.loads(canonical_json(material)))  # as it is read back: no tuples


def code_digest(stage: Stage, step: Step[Any]) -> str:
    """Return the SHA-256 of the source files that compute a step's bytes: ``stage.CODE``, and the step's runtime.

    It stands in for a version that somebody would have to raise: no change of the code can be forgotten.
    """
    roots = [PACKAGE / name for name in stage.CODE]
    if (runtime := getattr(step.params, "runtime", None)) is not None:
        roots.append(registry.source_folder("runtimes", runtime))
    return source_digest(roots)


def source_digest(roots: Iterable[Path]) -> str:
    """Return the SHA-256 of the source of modules (paths without suffix) and packages (folders)."""
    return digest([_source_digest(root) for root in roots])


@functools.cache
def _source_digest(root: Path) -> str:
    """Return the SHA-256 of a module, or of all modules of a package, with their names."""
    files = sorted(root.rglob("*.py")) if root.is_dir() else [root.with_suffix(".py")]
    return digest([(str(path.relative_to(root.parent)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files])


def find_key(cache: Cache, material: Mapping[str, Any], recipe_dir: Path) -> str:
    """Return the key of a step; it includes what the user's code read, where that is recorded."""
    base = digest(material)
    return cache.matching_key(base, recipe_dir) or base


def input_artifacts(step: Step[Any], completed: Mapping[str, CompletedStep]) -> dict[str, Artifact]:
    """Return the artifacts that a step reads, by the step's own names."""
    artifacts = {}
    for name, reference in step.inputs.items():
        producer, _, file = reference.partition(":")
        entry = completed[producer].entry
        if file not in entry.artifacts:
            folders = sorted({str(item.path.parent) for item in entry.artifacts.values()})
            raise StageError(
                f"{producer}: its cache entry has no file {file!r}; remove {', '.join(folders) or entry.key}, then build again"
            )
        artifacts[name] = entry.artifacts[file]
    return artifacts


def last_run_name(step: Step[Any], recipe_dir: Path) -> str:
    """Return the name under which the cache remembers the key material of a step's last run."""
    return f"{recipe_dir}:{step.id}"


def why_miss(step: Step[Any], material: Mapping[str, Any], cache: Cache, recipe_dir: Path) -> str:
    """Return why a step is not in the cache: what changed since its last run."""
    last = cache.last_material(last_run_name(step, recipe_dir))
    if last is None:
        return "never run here"
    if last == material:
        return "; ".join(cache.nearest_changes(digest(material), recipe_dir)[:3]) or "no longer in the cache"
    return "; ".join(list(_differences(last, material))[:3])


def _differences(old: object, new: object, path: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(name), new.get(name), f"{path}.{name}" if path else name)
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _differences(before, after, f"{path}[{index}]")
    elif old != new:
        if path == "code":
            yield "the code of this stage changed"
        else:
            name = printable(path)
            yield f"{name} changed" if path.startswith("inputs.") else f"{name} {_short(old)} -> {_short(new)}"


def _short(value: object) -> str:
    text = printable(str(value))
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
