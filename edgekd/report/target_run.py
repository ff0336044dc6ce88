# SPDX-License-Identifier: Apache-2.0
"""One target of a build: its plan, the completed steps, and what they wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgekd import registry
from edgekd.domain.measurement import TEACHER
from edgekd.plan import left_out
from edgekd.report import document

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.candidate import Candidate
    from edgekd.domain.device import ChosenDevice
    from edgekd.domain.measurement import Measurement
    from edgekd.domain.recipe import TargetOverrides
    from edgekd.domain.target import Target
    from edgekd.plan import Plan
    from edgekd.ports import CompletedStep
    from edgekd.stats.scores import ModelScores


@dataclass(frozen=True, slots=True)
class TargetRun:
    """What a verdict is about. ``input_files``: digests of the user's files, for the manifest; ``started``: of the build (monotonic).

    ``unmeasured``: why the device cannot run a candidate's or the teacher's file, by the subject's name and runtime.
    ``device``: the device that the user named for this target.
    """

    plan: Plan
    target: Target
    completed: Mapping[str, CompletedStep]
    folder: Path
    recipe: Path
    input_files: Mapping[str, str | None]
    inconclusive_ok: bool
    remeasure: bool
    started: float
    unmeasured: Mapping[tuple[str, str], str] = field(default_factory=dict)
    device: ChosenDevice | None = None

    @property
    def recipe_file(self) -> dict[str, str]:
        """Return what identifies the recipe in the output folder."""
        return document.recipe_file(self.recipe, self.folder)

    @property
    def settings(self) -> TargetOverrides:
        """Return the recipe's budget and quantization settings for this target."""
        return self.plan.recipe.overrides_for(self.target.name)

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Return the target's candidates, without those that are left out."""
        return tuple(candidate for candidate in self.plan.candidates[self.target.name] if candidate.id not in self.left_out)

    @property
    def left_out(self) -> Mapping[str, str]:
        """Return why candidates of the target cannot ship, whatever their accuracy, by their ids."""
        candidates = self.plan.candidates[self.target.name]
        failed = {item.id: self.unmeasured[item.id, item.runtime] for item in candidates if (item.id, item.runtime) in self.unmeasured}
        return {**failed, **left_out(candidates, self.completed)}

    def concerns(self, step: str) -> bool:
        """Return whether a step belongs to this target: the candidates of other targets do not affect its verdict."""
        steps = {name for candidate in self.plan.candidates[self.target.name] for name in (candidate.model_step, candidate.evaluate_step)}
        return step in steps or "quantize/" not in step

    def artifacts(self, step: str) -> Mapping[str, Artifact]:
        """Return the files that a step wrote, by name."""
        return self.completed[step].entry.artifacts

    def model_file(self, candidate: Candidate) -> Artifact:
        """Return the model file of a candidate."""
        return self.artifacts(candidate.model_step)[f"model.{registry.runtime(candidate.runtime).FORMAT}"]

    def teacher_file(self, runtime: str) -> Artifact | None:
        """Return the teacher's model file for a runtime, or None if it could not be exported, or computes something else."""
        step = self.completed[f"export/teacher/{runtime}"]
        return None if step.why_not else step.entry.artifacts[f"model.{registry.runtime(runtime).FORMAT}"]

    def evaluation_inputs(self) -> list[Path]:
        """Return the arrays of the evaluation inputs."""
        artifacts = self.artifacts("inspect")
        return [artifacts[f"evaluation.inputs.{index}.npy"].path for index in range(len(self.plan.recipe.student.inputs))]


@dataclass(frozen=True, slots=True)
class TargetScores:
    """The scores of all models, by the id of the step that evaluated them, with the evaluation labels and groups."""

    by_step: Mapping[str, ModelScores]
    labels: np.ndarray
    groups: np.ndarray

    @property
    def teacher(self) -> ModelScores:
        """Return the teacher's scores, the reference."""
        return self.by_step["evaluate/teacher"]


def read_json(artifact: Artifact) -> Any:
    """Return the content of a JSON artifact."""
    return json.loads(artifact.path.read_text())


def read_scores(target_run: TargetRun) -> TargetScores:
    """Return the scores of the teacher, the students and the target's candidates."""
    import numpy as np

    from edgekd.stats import scores

    by_step = {
        name: scores.read_scores(completed.entry.artifacts)
        for name, completed in target_run.completed.items()
        if completed.step.stage == "evaluate" and target_run.concerns(name) and completed.why_not is None
    }
    artifacts = target_run.artifacts("inspect")
    return TargetScores(by_step, np.load(artifacts["evaluation.labels.npy"].path), np.load(artifacts["evaluation.groups.npy"].path))


def teacher_measurement(measurement: Measurement | None, measurements: Sequence[Measurement]) -> Measurement | None:
    """Return the teacher's measurement with the same runtime and thread count as a student's, or None."""
    if measurement is None:
        return None
    setting = (measurement.runtime, measurement.threads)
    return next((item for item in measurements if item.subject == TEACHER and (item.runtime, item.threads) == setting), None)
