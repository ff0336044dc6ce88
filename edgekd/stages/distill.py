# SPDX-License-Identifier: Apache-2.0
"""Distill: the student is trained to match the soft targets, and the labels; so are the baselines, without a teacher."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from edgekd.domain.losses import AUTO, LABEL_LOSSES, TAPPED, Loss
from edgekd.domain.recipe import BASELINES, DISTILLED, PSEUDO_LABELS
from edgekd.harness import runner
from edgekd.kd import data
from edgekd.kd.losses import learns_unlabelled
from edgekd.kd.output_spec import OutputSpec
from edgekd.kd.training import distributed
from edgekd.kd.training.execution import AutotuneParams, plan_execution_mode
from edgekd.kd.training.jobs import CHOSEN_FILE, EPOCHS_FILE, TRAINED_FILE, EpochLimitParams, SearchParams, StudentParams, TrainingSettings
from edgekd.ports import StageResult, Step

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.recipe import Distill, Recipe
    from edgekd.domain.target import Target
    from edgekd.kd.training.search import SearchResult
    from edgekd.ports import Context

NAME = "distill"
CODE: tuple[str, ...] = ("stages/distill", "kd", "store/arrays", "usercode", "domain/losses", "stats/intervals", "stats/paired")
TOOLS = ("torch", "numpy", "safetensors")


def steps(recipe: Recipe, targets: Sequence[Target]) -> list[Step[Any]]:
    """Return the step of the student that ships, after its assistants', and those of students of other sizes and of baselines."""
    del targets  # all share one student
    machine = runner.facts()
    distill = recipe.distill
    world = distributed.world(distill.threads, machine["cores"])
    model, instruction_set = str(recipe.student.model), machine["instruction_set"]
    code = {"code": "inspect:student.code.json"}
    planned = plan_execution_mode(
        NAME, distill, machine["features"], (model, world["threads"], instruction_set), {**_samples(recipe), **code}
    )
    params = StudentParams(
        model=model,
        losses=tuple(Loss.from_dict(loss.to_dict()) for loss in distill.losses),  # with all options explicit
        settings=TrainingSettings.from_recipe(distill, world, planned.mode),
        instruction_set=instruction_set,
        output=OutputSpec(recipe.student.task, recipe.student.heads),
        augment=None if distill.augment is None else str(distill.augment),
        views=distill.views,
        mixup=distill.mixup,
    )
    return [
        *planned.steps,
        *_assistant_steps(recipe, params, planned.inputs),
        *_student_steps(recipe, params, {**code, **planned.inputs}),
    ]


def _assistant_steps(recipe: Recipe, params: StudentParams, mode: Mapping[str, str]) -> list[Step[Any]]:
    """Return the steps of the assistants, each after its search."""
    result: list[Step[Any]] = []
    for link, assistant in enumerate(recipe.distill.assistants):
        epochs = assistant.epochs or params.settings.epochs
        own = replace(_with_teachers(recipe, params, link), model=str(assistant.model), settings=replace(params.settings, epochs=epochs))
        inputs = {**_teacher_inputs(recipe, link), "code": f"inspect:assistant.{link}.code.json", **mode}
        result += _with_search(recipe, Step(f"distill/assistant/{link}", NAME, own, inputs, TOOLS))
    return result


def _student_steps(recipe: Recipe, params: StudentParams, inputs: Mapping[str, str]) -> list[Step[Any]]:
    """Return the steps of the student, of students of other sizes, and of the baselines."""
    link = len(recipe.distill.assistants)
    params = _with_teachers(recipe, params, link)
    inputs = {**_teacher_inputs(recipe, link), **inputs}
    if any(loss.kind in TAPPED for loss in params.losses):
        params = replace(params, teacher=str(recipe.teacher.model))
        inputs |= {"teacher": recipe.teacher.artifact, "teacher.code": "inspect:teacher.code.json"}
    student = Step(NAME, NAME, params, inputs, TOOLS)
    before: list[Step[Any]] = []
    if recipe.distill.break_even_inferences is not None or recipe.distill.max_minutes is not None:
        before = [_epoch_limit_step(recipe, student)]
        student = replace(student, inputs={**inputs, "epochs": f"{before[0].id}:{EPOCHS_FILE}"})
    may_ship_labels_only = _may_ship_labels_only(recipe.distill)
    *searches, student = _with_search(recipe, student, labels_only=may_ship_labels_only)
    sizes = [  # with what a search chose for the student
        replace(
            student,
            id=name,
            params=replace(student.params, model=str(entry)),
            inputs={**student.inputs, "code": f"inspect:size.{number}.code.json"},
        )
        for number, (name, entry) in enumerate(recipe.sizes.items())
    ]
    others = [*sizes, *_baseline_steps(recipe, student)]
    if may_ship_labels_only:  # the search may have trained it
        student = replace(student, inputs={**student.inputs, "trained": f"{searches[-1].id}:{TRAINED_FILE}"})
    return [*before, *searches, student, *others]


def _epoch_limit_step(recipe: Recipe, step: Step[StudentParams]) -> Step[EpochLimitParams]:
    """Return the step that finds out how many epochs fit in the minutes allowed, and still break even."""
    reference, distill = None if recipe.teacher.model is None else str(recipe.teacher.model), recipe.distill
    search_share = distill.search_share if _is_searched(step.params, labels_only=_may_ship_labels_only(distill)) else 0.0
    params = EpochLimitParams(step.params, distill.max_minutes, search_share, distill.break_even_inferences, reference)
    inputs = {**step.inputs, "reference": recipe.teacher.artifact, "reference.code": "inspect:teacher.code.json"}
    tools = (*TOOLS, *(("onnxruntime",) if recipe.teacher.artifact.endswith(".onnx") else ()))
    return Step(f"{NAME}/epochs", NAME, params, inputs, tools)


def _with_search(recipe: Recipe, step: Step[StudentParams], *, labels_only: bool = False) -> list[Step[Any]]:
    """Return a step, after the search that chooses what its losses leave to ``auto``, or also ``labels_only``."""
    if not _is_searched(step.params, labels_only=labels_only):
        return [step]
    name = "/".join([NAME, "search", *step.id.split("/")[1:]])
    params = SearchParams(step.params, recipe.distill.search_share, labels_only)
    searching = Step(name, NAME, params, step.inputs, (*TOOLS, "scipy"))
    return [searching, replace(step, inputs={**step.inputs, "chosen": f"{name}:{CHOSEN_FILE}"})]


def _is_searched(params: StudentParams, *, labels_only: bool) -> bool:
    return labels_only or any(loss.has_auto for loss in params.losses)


def _may_ship_labels_only(distill: Distill) -> bool:
    """Return whether a student that learned without the teacher may ship: by default if a search compares settings anyway."""
    is_asked = any(loss.has_auto for loss in distill.losses) if distill.ships is None else distill.ships == "best"
    return is_asked and any(loss.kind not in LABEL_LOSSES for loss in distill.losses)


def _baseline_steps(recipe: Recipe, student: Step[StudentParams]) -> list[Step[Any]]:
    """Return the steps of all methods: the distilled student's further seeds, and the baselines without the teacher.

    Where the student's losses are searched, so are the label smoothing and the weight of the pseudo-labels, each for as many epochs.
    """
    result: list[Step[Any]] = []
    for method, names in recipe.methods.items():
        for number, name in enumerate(names):
            settings = replace(student.params.settings, seed=recipe.distill.seed + number)
            if method == DISTILLED:
                if number:  # the first is the student that ships
                    result.append(replace(student, id=name, params=replace(student.params, settings=settings)))
                continue
            *searches, baseline = _with_search(recipe, _baseline_step(recipe, student, method, name, settings))
            if searches:  # that of the first seed serves all, as the student's does
                chosen = f"{NAME}/search/{method}/0:{CHOSEN_FILE}"
                baseline = replace(baseline, inputs={**baseline.inputs, "chosen": chosen})
            result += [*(searches if number == 0 else []), baseline]
    return result


def _baseline_step(recipe: Recipe, student: Step[StudentParams], method: str, name: str, settings: TrainingSettings) -> Step[StudentParams]:
    """Return the step of one baseline: the student's own training, but without the teacher."""
    is_searched = "chosen" in student.inputs
    losses = {
        "no_teacher": (Loss("ce"),),
        "label_smoothing": (Loss("ce", label_smoothing=AUTO if is_searched else BASELINES["label_smoothing"]),),
        PSEUDO_LABELS: (Loss("ce"), Loss("hard", AUTO if is_searched else 1.0)),
    }[method]
    inputs = {name: student.inputs[name] for name in ("code", "views.code", "execution_mode", "epochs") if name in student.inputs}
    samples = _samples(recipe)
    if method == PSEUDO_LABELS:
        inputs |= samples | _soft_targets(f"soft_targets/{name.removeprefix('distill/')}")
    else:
        inputs |= {name: reference for name, reference in samples.items() if not name.startswith("unlabelled")}
        if learns_unlabelled(recipe.distill.losses):  # as many steps as the distilled student takes
            inputs |= data.split_references(recipe, "unlabelled")
    explicit = tuple(Loss.from_dict(loss.to_dict()) for loss in losses)
    params = replace(student.params, losses=explicit, settings=settings, ensemble=None, checkpoints=0, teacher=None)
    return Step(name, NAME, params, inputs, TOOLS)


def _with_teachers(recipe: Recipe, params: StudentParams, link: int) -> StudentParams:
    """Return how a link of the chain of assistants uses its teachers: only the first has several."""
    if link:
        return params
    teachers = recipe.distill.teachers
    weights = (recipe.teacher.weight, *(teacher.weight for teacher in teachers))
    ensemble = data.Ensemble(weights, recipe.distill.teacher_weighting) if teachers else None
    return replace(params, ensemble=ensemble, checkpoints=recipe.checkpoint_count)


def _teacher_inputs(recipe: Recipe, link: int) -> dict[str, str]:
    """Return the inputs of a link of the chain: the data, and the soft targets of its teachers."""
    inputs = {**_samples(recipe), "views.code": "inspect:views.code.json"}
    if link:
        return inputs | _soft_targets(f"soft_targets/assistant/{link - 1}")
    for name in recipe.soft_target_sources:
        suffix = name.removeprefix("soft_targets").replace("/", ".")
        if not suffix.startswith((".assistant", f".{PSEUDO_LABELS}")):
            inputs |= _soft_targets(name, suffix)
    return inputs


def _samples(recipe: Recipe) -> dict[str, str]:
    return {
        **data.split_references(recipe, "train", labels=True),
        **data.split_references(recipe, "validation", labels=True),
        **data.split_references(recipe, "unlabelled"),
    }


def _soft_targets(step: str, suffix: str = "") -> dict[str, str]:
    """Return the inputs that are the soft targets of a step."""
    return {f"{split}.soft_targets{suffix}": f"{step}:{split}.soft_targets.safetensors" for split in ("train", "validation", "unlabelled")}


def run(
    step: Step[StudentParams | SearchParams | EpochLimitParams | AutotuneParams], inputs: Mapping[str, Artifact], context: Context
) -> StageResult:
    """Train a student; or do what comes before: choose the execution mode, the epochs, or what the losses leave to ``auto``."""
    from edgekd.kd.training import autotune, epoch_limits, jobs, trials

    params = step.params
    if isinstance(params, AutotuneParams):
        return autotune.choose_execution_mode(NAME, params, inputs, context)
    if isinstance(params, EpochLimitParams):
        return epoch_limits.choose_epochs(params, inputs, context)
    if isinstance(params, SearchParams):
        return _search(step.id, replace(params, student=_with_epochs(params.student, inputs)), inputs, context)
    params = _with_epochs(params, inputs)
    if "chosen" in inputs:
        chosen = replace(params, losses=trials.read_chosen(inputs["chosen"]))
        params, inputs = jobs.without_unread_teacher(chosen, inputs, params.losses)
    return _train(step.id, params, inputs, context)


def _train(name: str, params: StudentParams, inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Train and calibrate a student; write ``student.safetensors`` and ``curve.json``."""
    from edgekd.kd import modules
    from edgekd.kd.training.calibrate import calibrate
    from edgekd.kd.training.jobs import student_job
    from edgekd.kd.training.trainer import fit
    from edgekd.kd.training.trials import read_trained

    job = student_job(params, inputs, context.recipe_dir)
    weights, curve = read_trained(inputs) or fit(job, context.work, context.progress)
    notes: list[str] = []
    if job.output.is_single_softmax:
        weights, calibration_notes = calibrate(job.build, weights, job.validation, job.entry, job.settings.threads)
        notes += [f"{name}: {note}" for note in calibration_notes]
    if (warning := distributed.batch_norm_warning(job.build, job.settings.batch_size)) is not None:
        notes.append(warning)
    (context.out / "student.safetensors").write_bytes(modules.serialize_weights(weights))
    document = {"epochs": [asdict(result) for result in curve]}
    (context.out / "curve.json").write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    losses = " + ".join(loss.describe() for loss in params.losses)
    return StageResult({**asdict(curve[-1]), "samples": len(curve) * len(job.train), "losses": losses}, tuple(notes))


def _search(name: str, params: SearchParams, inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Choose what the losses leave to ``auto``; write ``chosen.json``."""
    from edgekd.kd.training import jobs, search, trials

    result, epochs = trials.run_search(params, inputs, context)
    notes = _search_notes(name, params, result, epochs)
    losses = search.with_choices(params.student.losses, result.best[0].trial.choices)
    samples = epochs * len(jobs.training_set(inputs, losses, "distill.losses"))
    return StageResult({"trials": len(result.results), "epochs": epochs, "samples": samples}, tuple(notes))


def _search_notes(name: str, params: SearchParams, result: SearchResult, epochs: int) -> list[str]:
    """Return what a search chose, by how much, and how sure that is."""
    from edgekd.kd.training.search import describe_choices

    best, lengths = result.best[0], sorted({item.trial.epochs for item in result.results})
    settings = len({tuple(item.trial.choices.items()) for item in result.results})
    tried = f"{settings} settings were tried in trials of {' and '.join(map(str, lengths))} epochs ({epochs} in all)"
    notes = [f"{name}: {tried}; chosen: {describe_choices(params.student.losses, best.trial.choices)}"]
    if result.second:
        margin, interval = result.margin()
        second = describe_choices(params.student.losses, result.second[0].trial.choices)
        shown = "" if interval is None else f" [{100 * interval.low:.2f}, {100 * interval.high:.2f}]"
        notes.append(f"{name}: second best: {second}, by {100 * margin:.2f} points{shown} on validation")
    if best.trial.is_labels_only and params.labels_only:
        notes.append(f'{name}: labels alone are as good as the teacher: nothing is distilled (distill.ships = "distilled" distills)')
    if result.is_weak:
        notes.append(f"warning: {name}: the choice is weak: not all settings were tried; raise distill.search_share or distill.epochs")
    return notes


def _with_epochs(params: StudentParams, inputs: Mapping[str, Artifact]) -> StudentParams:
    """Return the parameters with the epochs that fit and break even, if the step has them as an input."""
    from edgekd.kd.training.epoch_limits import read_epochs

    if "epochs" not in inputs:
        return params
    return replace(params, settings=replace(params.settings, epochs=read_epochs(inputs["epochs"])))
