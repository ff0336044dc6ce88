# SPDX-License-Identifier: Apache-2.0
"""Inspect: run the user's code once, check and store its data, and record what it read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekd.ports import Context, StageResult, Step
from edgekd.stages.inspect.params import InspectParams, TeacherParams

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.recipe import Recipe
    from edgekd.domain.target import Target

NAME = "inspect"
CODE: tuple[str, ...] = (
    "stages/inspect",
    "usercode",
    "kd/losses",
    "kd/modules",
    "kd/output_spec",
    "kd/reproducible",
    "kd/teachers",
    "domain/losses",
    "store/arrays",
    "store/digests",
)


def steps(recipe: Recipe, targets: Sequence[Target]) -> list[Step[InspectParams]]:
    """Return the one step."""
    del targets  # all share the data
    student, distill, evaluate, training = recipe.student, recipe.distill, recipe.evaluate, recipe.teacher.train
    params = InspectParams(
        splits=str(recipe.data.splits),
        max_overlap=recipe.data.max_overlap,
        reads=recipe.data.reads,
        inputs=student.inputs,
        student=str(student.model),
        task=student.task,
        heads=student.heads,
        teacher=TeacherParams.from_recipe(recipe.teacher),
        checkpoints=recipe.teacher.checkpoints,
        teachers=tuple(TeacherParams.from_recipe(teacher) for teacher in distill.teachers),
        assistants=tuple(str(assistant.model) for assistant in distill.assistants),
        sizes=tuple(str(entry) for entry in distill.sizes),
        tapped_losses=tuple(loss.to_dict() for loss in distill.losses if loss.taps),
        pseudo_labels=distill.baselines is not None and distill.baselines.pseudo_labels,
        metric=None if isinstance(evaluate.metric, str) else str(evaluate.metric),
        score=None if evaluate.score is None else str(evaluate.score),
        augment=None if training is None or training.augment is None else str(training.augment),
        views=None if distill.augment is None else str(distill.augment),
    )
    runtime = ("onnxruntime",) if any(name.endswith(".onnx") for name in params.model_files) else ()
    return [Step(NAME, NAME, params, {}, ("torch", "numpy", "safetensors", *runtime))]


def run(step: Step[InspectParams], inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Run the user's code. It is watched by a hook that cannot be removed, so it needs a process of its own.

    Raises:
        RecipeError: what is wrong with the user's code or data.
    """
    del inputs  # it is the first step
    from edgekd.stages.inspect.inspection import Inspection

    return Inspection(step.params, context).run()
