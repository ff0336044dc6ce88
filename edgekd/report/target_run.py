# SPDX-License-Identifier: Apache-2.0
"""What one target's verdict is about: its plan, the steps that are done, and what they made."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekd import registry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from edgekd.domain.artifact import Artifact, Candidate
    from edgekd.domain.measurement import Measurement
    from edgekd.domain.target import Target
    from edgekd.plan import Plan
    from edgekd.ports import CompletedStep
    from edgekd.stats.scores import ModelScores


@dataclass(frozen=True, slots=True)
class TargetRun:
    """What a verdict is about. ``read``: the user's files, for the manifest; ``started``: when the build did (monotonic)."""

    plan: Plan
    target: Target
    done: Mapping[str, CompletedStep]
    folder: Path
    read: Mapping[str, str | None]
    inconclusive_ok: bool
    remeasure: bool
    started: float


@dataclass(frozen=True, slots=True)
class TargetScores:
    """All that was scored, by step id, and what the comparisons need."""

    of: Mapping[str, ModelScores]
    labels: np.ndarray
    groups: np.ndarray

    @property
    def teacher(self) -> ModelScores:
        """Return the reference."""
        return self.of["evaluate/teacher"]


def concerns_target(case: TargetRun, step: str) -> bool:
    """Return whether a step is this target's: another target's candidates do not move its verdict."""
    own = {name for candidate in case.plan.candidates[case.target.name] for name in (candidate.model_step, candidate.evaluate_step)}
    return step in own or "quantize/" not in step


def candidates(case: TargetRun) -> tuple[Candidate, ...]:
    """Return the target's candidates."""
    return case.plan.candidates[case.target.name]


def artifacts(case: TargetRun, step: str) -> Mapping[str, Artifact]:
    """Return what a step made, by file name."""
    return case.done[step].entry.artifacts


def model_file(case: TargetRun, candidate: Candidate) -> Artifact:
    """Return the model file of a candidate."""
    return artifacts(case, candidate.model_step)[f"model.{registry.runtime(candidate.runtime).FORMAT}"]


def read_json(artifact: Artifact) -> Any:
    """Return a JSON artifact."""
    return json.loads(artifact.path.read_text())


def read_scores(case: TargetRun) -> TargetScores:
    """Return all scores that concern the target."""
    import numpy as np

    from edgekd.stats import scores

    found = {
        name: scores.read_scores(item.entry.artifacts)
        for name, item in case.done.items()
        if item.step.stage == "evaluate" and concerns_target(case, name)
    }
    inspected = artifacts(case, "inspect")
    return TargetScores(found, np.load(inspected["evaluation.labels.npy"].path), np.load(inspected["evaluation.groups.npy"].path))


def teacher_measurement(measurement: Measurement | None, measurements: Sequence[Measurement]) -> Measurement | None:
    """Return the teacher as it was measured beside a measurement: on its runtime, at its threads."""
    if measurement is None:
        return None
    return next(
        (m for m in measurements if m.subject == "teacher" and (m.runtime, m.threads) == (measurement.runtime, measurement.threads)), None
    )
