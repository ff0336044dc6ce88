# SPDX-License-Identifier: Apache-2.0
"""Distill: the student is trained to match the teacher's stored outputs, and the labels."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, cast

from edgekd.domain.losses import AUTO, TAPPED, Loss
from edgekd.domain.recipe import BASELINES, DISTILLED, PSEUDO_LABELS
from edgekd.harness import runner
from edgekd.kd import data
from edgekd.kd.losses import learns_unlabelled
from edgekd.kd.training import distributed, execution
from edgekd.ports import StageResult, Step

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.recipe import Recipe
    from edgekd.domain.target import Target
    from edgekd.kd.training.loop import TrainingJob
    from edgekd.ports import Context

NAME = "distill"
CODE: tuple[str, ...] = ("stages/distill", "kd", "usercode", "domain/losses")
TOOLS = ("torch", "numpy", "safetensors")
TRAINED = ("epochs", "batch_size", "optimizer", "learning_rate", "weight_decay", "seed", "views")  # as the recipe has them


def steps(recipe: Recipe, targets: Sequence[Target]) -> list[Step[Any]]:
    """Return the step of the student that ships, after its assistants', and those of students of other sizes and of twins."""
    del targets  # all share one student
    machine = runner.facts()
    distill, assistants = recipe.distill, recipe.distill.assistants
    params: dict[str, Any] = {
        **{name: getattr(distill, name) for name in TRAINED},
        "augment": None if distill.augment is None else str(distill.augment),
        "losses": [loss.to_dict() for loss in distill.losses],
        **recipe.student.form,
        "model": str(recipe.student.model),
        **distributed.world(distill.threads, machine["cores"]),
        "instruction_set": machine["instruction_set"],
    }
    code = {"code": "inspect:student.code.json"}
    mode = execution.plan_execution_mode(NAME, distill, machine["features"], params, {**_samples(recipe), **code})
    params |= mode["params"]
    found: list[Step[Any]] = list(mode["steps"])
    for link, assistant in enumerate(assistants):
        own = {**params, **_lessons(recipe, link), "model": str(assistant.model), "epochs": assistant.epochs or distill.epochs}
        taught = {**_taught(recipe, link), "code": f"inspect:assistant.{link}.code.json", **mode["inputs"]}
        found += _with_search(recipe, Step(f"distill/assistant/{link}", NAME, own, taught, TOOLS))
    params |= _lessons(recipe, len(assistants))
    taught = {**_taught(recipe, len(assistants)), **code, **mode["inputs"]}
    if any(loss.kind in TAPPED for loss in distill.losses):
        params["teacher"] = str(recipe.teacher.model)
        taught |= {"teacher": recipe.teacher.artifact, "teacher.code": "inspect:teacher.code.json"}
    student = Step(NAME, NAME, params, taught, TOOLS)
    if distill.break_even_inferences is not None:
        found.append(_worth(recipe, student))
        student = replace(student, inputs={**taught, "epochs": f"{found[-1].id}:epochs.json"})
    found += _with_search(recipe, student)
    student = found[-1]
    for number, (name, entry) in enumerate(recipe.sizes.items()):  # what a search chose for the student holds for them
        inputs = {**student.inputs, "code": f"inspect:size.{number}.code.json"}
        found.append(replace(student, id=name, params={**student.params, "model": str(entry)}, inputs=inputs))
    return [*found, *_twins(recipe, student)]


def _worth(recipe: Recipe, step: Step[Any]) -> Step[Any]:
    """Return the step that finds out how many epochs of training are won back."""
    reference = {"reference": recipe.teacher.artifact, "reference.code": "inspect:teacher.code.json"}
    made = None if recipe.teacher.model is None else str(recipe.teacher.model)
    own = {"break_even_inferences": recipe.distill.break_even_inferences, "reference": made}
    tools = (*TOOLS, *(("onnxruntime",) if recipe.teacher.artifact.endswith(".onnx") else ()))
    return replace(step, id=f"{NAME}/epochs", params={**step.params, **own}, inputs={**step.inputs, **reference}, tools=tools)


def _with_search(recipe: Recipe, step: Step[Any]) -> list[Step[Any]]:
    """Return a step, after one that chooses what its losses leave to ``auto``."""
    losses = cast("list[dict[str, Any]]", step.params["losses"])
    if not any(Loss.from_dict(told).is_open for told in losses):
        return [step]
    name = "/".join([NAME, "search", *step.id.split("/")[1:]])
    searching = replace(step, id=name, params={**step.params, "search_share": recipe.distill.search_share}, tools=(*TOOLS, "optuna"))
    return [searching, replace(step, inputs={**step.inputs, "chosen": f"{name}:chosen.json"})]


def _twins(recipe: Recipe, step: Step[Any]) -> list[Step[Any]]:
    """Return the steps of the control: the distilled student's from other seeds, and those without the teacher.

    Where the student's losses are searched, so are the smoothed twin's label smoothing and the weight of the pseudo-labels, each for
    as many epochs.
    """
    distill, found = recipe.distill, []
    code = {name: step.inputs[name] for name in ("code", "views.code", "execution_mode", "epochs") if name in step.inputs}
    alone = {name: reference for name, reference in _samples(recipe).items() if not name.startswith("unlabelled")} | code
    if learns_unlabelled(distill.losses):
        alone |= data.split_references(recipe, "unlabelled")
    without = {key: value for key, value in step.params.items() if key not in {"ensemble", "checkpoints", "teacher"}}
    smoothing, weight = (cast("Any", AUTO if "chosen" in step.inputs else usual) for usual in (BASELINES["label_smoothing"], 1.0))
    losses = {
        "no_teacher": (Loss("ce"),),
        "label_smoothing": (Loss("ce", label_smoothing=smoothing),),
        PSEUDO_LABELS: (Loss("ce"), Loss("hard", weight)),
    }
    for arm, names in recipe.arms.items():
        for number, name in enumerate(names):
            seed = {"seed": distill.seed + number}
            if arm == DISTILLED:
                found += [replace(step, id=name, params={**step.params, **seed})] if number else []
                continue
            own = {**without, **seed, "losses": [loss.to_dict() for loss in losses[arm]]}
            answers = {**_samples(recipe), **code, **_answers(f"soft_targets/{name.removeprefix('distill/')}")}
            twin = Step(name, NAME, own, answers if arm == PSEUDO_LABELS else alone, TOOLS)
            first, *searched = _with_search(recipe, twin)
            chosen = {"chosen": f"{NAME}/search/{arm}/0:chosen.json"}  # the first seed's search serves all, as the student's does
            found += [first] if not searched or number == 0 else []
            found += [replace(twin, inputs={**twin.inputs, **chosen}) for twin in searched]
    return found


def _lessons(recipe: Recipe, link: int) -> dict[str, Any]:
    """Return what says how a link of the chain uses its teachers' answers: only the first has several."""
    teachers = recipe.distill.teachers
    if link:
        return {}
    weights = [recipe.teacher.weight, *(teacher.weight for teacher in teachers)]
    ensemble = {"ensemble": {"weights": weights, "weighting": recipe.distill.teacher_weighting}} if teachers else {}
    return ensemble | ({"checkpoints": recipe.checkpoints} if recipe.checkpoints else {})


def _taught(recipe: Recipe, link: int) -> dict[str, str]:
    """Return the inputs of a link of the chain: the data, and the answers of what teaches it."""
    found = {**_samples(recipe), "views.code": "inspect:views.code.json"}
    if link:
        return found | _answers(f"soft_targets/assistant/{link - 1}")
    for name in recipe.soft_target_sources:
        own = name.removeprefix("soft_targets").replace("/", ".")
        if not own.startswith((".assistant", f".{PSEUDO_LABELS}")):
            found |= _answers(name, own)
    return found


def _samples(recipe: Recipe) -> dict[str, str]:
    return {
        **data.split_references(recipe, "train", labels=True),
        **data.split_references(recipe, "validation", labels=True),
        **data.split_references(recipe, "unlabelled"),
    }


def _answers(step: str, suffix: str = "") -> dict[str, str]:
    """Return the inputs that are the answers of a step of ``soft_targets``."""
    return {f"{split}.outputs{suffix}": f"{step}:{split}.outputs.safetensors" for split in ("train", "validation", "unlabelled")}


def run(step: Step[Any], inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Train the student; write ``student.safetensors`` and ``curve.json``. A search writes ``chosen.json``."""
    from edgekd.kd import modules
    from edgekd.kd.training import autotune, calibrate, jobs, loop

    params = cast("dict[str, Any]", step.params)
    if "tried" in params:
        return autotune.choose_execution_mode("distill", params, inputs, context)
    terms = [Loss.from_dict(term) for term in params["losses"]]
    if "break_even_inferences" in params:
        return autotune.choose_epochs(params, inputs, context, terms)
    if "epochs" in inputs:
        params = {**params, "epochs": json.loads(inputs["epochs"].path.read_text())["epochs"]}
    if "search_share" in params:
        return _search(step.id, params, inputs, context, terms)
    if "chosen" in inputs:
        terms = [Loss.from_dict(term) for term in json.loads(inputs["chosen"].path.read_text())["losses"]]
    job = jobs.training_job(params, inputs, context.recipe_dir, terms)
    weights, curve = loop.fit(job, context.work, context.progress)
    notes: tuple[str, ...] = ()
    if job.form.is_single_softmax:
        weights, note = calibrate.calibrate(job.build(), weights, job.validation, job.entry, params["threads"])
        notes = (f"{step.id}: {note}",)
    if (warning := distributed.batch_norm_warning(job.build, params["batch_size"])) is not None:
        notes += (warning,)
    (context.out / "student.safetensors").write_bytes(modules.serialize_weights(weights))
    lines = {"best_epoch": loop.best_epoch(curve).epoch, "epochs": [asdict(line) for line in curve]}
    (context.out / "curve.json").write_text(json.dumps(lines, indent=1, sort_keys=True) + "\n")
    return StageResult(metrics={**asdict(loop.best_epoch(curve)), "samples": len(curve) * len(job.train)}, notes=notes)


def _search(name: str, params: Mapping[str, Any], inputs: Mapping[str, Artifact], context: Context, terms: Sequence[Loss]) -> StageResult:
    from edgekd.kd.training import jobs, search

    def job_of(closed: Sequence[Loss], epochs: int) -> TrainingJob:
        return jobs.training_job({**params, "epochs": epochs}, inputs, context.recipe_dir, closed)

    chosen, trials = search.search(terms, job_of, params["epochs"], params["search_share"], context.work, context.progress)
    told = search.as_json(chosen, trials)
    (context.out / "chosen.json").write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")
    note = f"{name}: {len(trials)} settings were tried for {told['epochs']} epochs; taken: {search.describe_choice(terms, chosen)}"
    samples = told["epochs"] * len(jobs.training_set(inputs, chosen, "distill.losses"))
    return StageResult({"trials": len(trials), "epochs": told["epochs"], "samples": samples}, (note,))
