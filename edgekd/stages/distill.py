# SPDX-License-Identifier: Apache-2.0
"""Distill: the student is trained to match the teacher's stored outputs, and the labels."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, cast

from edgekd.domain.losses import AUTO, TAPPED, Loss, untold
from edgekd.domain.recipe import DISTILLED, PSEUDO, TWINS
from edgekd.harness import runner
from edgekd.kd import data, ranks, ways
from edgekd.kd.losses import learns_unlabelled
from edgekd.ports import StageResult, Step

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.recipe import Recipe
    from edgekd.domain.target import Target
    from edgekd.kd.train import Job
    from edgekd.ports import Context

NAME = "distill"
VERSION = 8
TOOLS = ("torch", "numpy", "safetensors")
TRAINED = ("epochs", "batch_size", "optimizer", "learning_rate", "weight_decay", "seed", "views")  # as the recipe has them


def steps(recipe: Recipe, targets: Sequence[Target]) -> list[Step]:
    """Return the step of the student that ships, after its assistants', and those of students of other sizes and of twins."""
    del targets  # all share one student
    machine = runner.facts()
    distill, assistants = recipe.distill, recipe.distill.assistants
    params: dict[str, Any] = {
        **{name: getattr(distill, name) for name in TRAINED},
        "augment": None if distill.augment is None else str(distill.augment),
        "losses": [loss.told for loss in distill.losses],
        **recipe.student.form,
        "model": str(recipe.student.model),
        **ranks.crew(distill.threads, machine["cores"]),
        "instruction_set": machine["instruction_set"],
    }
    code = {"code": "inspect:student.code.json"}
    way = ways.planned(NAME, distill, machine["features"], params, {**_samples(recipe), **code})
    params |= way["params"]
    found: list[Step] = list(way["steps"])
    for link, assistant in enumerate(assistants):
        own = {**params, **_lessons(recipe, link), "model": str(assistant.model), "epochs": assistant.epochs or distill.epochs}
        taught = {**_taught(recipe, link), "code": f"inspect:assistant.{link}.code.json", **way["inputs"]}
        found += _with_search(recipe, Step(f"distill/assistant/{link}", NAME, own, taught, TOOLS))
    params |= _lessons(recipe, len(assistants))
    taught = {**_taught(recipe, len(assistants)), **code, **way["inputs"]}
    if any(loss.kind in TAPPED for loss in distill.losses):
        params["teacher"] = str(recipe.teacher.model)
        taught |= {"teacher": recipe.teacher.artifact, "teacher.code": "inspect:teacher.code.json"}
    student = Step(NAME, NAME, params, taught, TOOLS)
    if distill.paid_back_within is not None:
        found.append(_worth(recipe, student))
        student = replace(student, inputs={**taught, "epochs": f"{found[-1].id}:epochs.json"})
    found += _with_search(recipe, student)
    student = found[-1]
    for number, (name, entry) in enumerate(recipe.sizes.items()):  # what a search chose for the student holds for them
        inputs = {**student.inputs, "code": f"inspect:size.{number}.code.json"}
        found.append(replace(student, id=name, params={**student.params, "model": str(entry)}, inputs=inputs))
    return [*found, *_twins(recipe, student)]


def _worth(recipe: Recipe, step: Step) -> Step:
    """Return the step that finds out how many epochs of training are won back."""
    reference = {"reference": recipe.teacher.artifact, "reference.code": "inspect:teacher.code.json"}
    made = None if recipe.teacher.model is None else str(recipe.teacher.model)
    own = {"paid_back_within": recipe.distill.paid_back_within, "reference": made}
    tools = (*TOOLS, *(("onnxruntime",) if recipe.teacher.artifact.endswith(".onnx") else ()))
    return replace(step, id=f"{NAME}/epochs", params={**step.params, **own}, inputs={**step.inputs, **reference}, tools=tools)


def _with_search(recipe: Recipe, step: Step) -> list[Step]:
    """Return a step, after one that chooses what its losses leave to ``auto``."""
    losses = cast("list[dict[str, Any]]", step.params["losses"])
    if not any(untold(told).is_open for told in losses):
        return [step]
    name = "/".join([NAME, "search", *step.id.split("/")[1:]])
    searching = replace(step, id=name, params={**step.params, "search_share": recipe.distill.search_share}, tools=(*TOOLS, "optuna"))
    return [searching, replace(step, inputs={**step.inputs, "chosen": f"{name}:chosen.json"})]


def _twins(recipe: Recipe, step: Step) -> list[Step]:
    """Return the steps of the control: the distilled student's from other seeds, and those without the teacher.

    Where the student's losses are searched, so are the smoothed twin's label smoothing and the weight of the pseudo-labels, each for
    as many epochs.
    """
    distill, found = recipe.distill, []
    code = {name: step.inputs[name] for name in ("code", "views.code", "way", "epochs") if name in step.inputs}
    alone = {name: reference for name, reference in _samples(recipe).items() if not name.startswith("unlabelled")} | code
    if learns_unlabelled(distill.losses):
        alone |= data.references(recipe, "unlabelled")
    without = {key: value for key, value in step.params.items() if key not in {"mixing", "checkpoints", "teacher"}}
    smoothing, weight = (cast("Any", AUTO if "chosen" in step.inputs else usual) for usual in (TWINS["smoothed"], 1.0))
    losses = {"alone": (Loss("ce"),), "smoothed": (Loss("ce", label_smoothing=smoothing),), PSEUDO: (Loss("ce"), Loss("hard", weight))}
    for arm, names in recipe.arms.items():
        for number, name in enumerate(names):
            seed = {"seed": distill.seed + number}
            if arm == DISTILLED:
                found += [replace(step, id=name, params={**step.params, **seed})] if number else []
                continue
            own = {**without, **seed, "losses": [loss.told for loss in losses[arm]]}
            answers = {**_samples(recipe), **code, **_answers(f"supervise/{name.removeprefix('distill/')}")}
            twin = Step(name, NAME, own, answers if arm == PSEUDO else alone, TOOLS)
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
    mixing = {"mixing": {"weights": weights, "by": recipe.distill.mixing}} if teachers else {}
    return mixing | ({"checkpoints": recipe.checkpoints} if recipe.checkpoints else {})


def _taught(recipe: Recipe, link: int) -> dict[str, str]:
    """Return the inputs of a link of the chain: the data, and the answers of what teaches it."""
    found = {**_samples(recipe), "views.code": "inspect:views.code.json"}
    if link:
        return found | _answers(f"supervise/assistant/{link - 1}")
    for name in recipe.supervisors:
        own = name.removeprefix("supervise").replace("/", ".")
        if not own.startswith((".assistant", f".{PSEUDO}")):
            found |= _answers(name, own)
    return found


def _samples(recipe: Recipe) -> dict[str, str]:
    return {
        **data.references(recipe, "train", labels=True),
        **data.references(recipe, "validation", labels=True),
        **data.references(recipe, "unlabelled"),
    }


def _answers(step: str, suffix: str = "") -> dict[str, str]:
    """Return the inputs that are the answers of a step of ``supervise``."""
    return {f"{split}.outputs{suffix}": f"{step}:{split}.outputs.safetensors" for split in ("train", "validation", "unlabelled")}


def run(step: Step, inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Train the student; write ``student.safetensors`` and ``curve.json``. A search writes ``chosen.json``."""
    from edgekd.kd import calibrate, lessons, models, probe, train

    params = cast("dict[str, Any]", step.params)
    if "tried" in params:
        return probe.run("distill", params, inputs, context)
    terms = [untold(term) for term in params["losses"]]
    if "paid_back_within" in params:
        return probe.worth(params, inputs, context, terms)
    if "epochs" in inputs:
        params = {**params, "epochs": json.loads(inputs["epochs"].path.read_text())["epochs"]}
    if "search_share" in params:
        return _search(step.id, params, inputs, context, terms)
    if "chosen" in inputs:
        terms = [untold(term) for term in json.loads(inputs["chosen"].path.read_text())["losses"]]
    job = lessons.lesson(params, inputs, context.recipe_dir, terms)
    weights, curve = train.fit(job, context.work, context.progress)
    notes: tuple[str, ...] = ()
    if job.form.is_plain:
        weights, note = calibrate.calibrated(job.build(), weights, job.validation, job.entry, params["threads"])
        notes = (f"{step.id}: {note}",)
    if (warning := ranks.remark(job.build, params["batch_size"])) is not None:
        notes += (warning,)
    (context.out / "student.safetensors").write_bytes(models.pack(weights))
    lines = {"best_epoch": train.best_of(curve).epoch, "epochs": [asdict(line) for line in curve]}
    (context.out / "curve.json").write_text(json.dumps(lines, indent=1, sort_keys=True) + "\n")
    return StageResult(metrics={**asdict(train.best_of(curve)), "samples": len(curve) * len(job.train)}, notes=notes)


def _search(name: str, params: Mapping[str, Any], inputs: Mapping[str, Artifact], context: Context, terms: Sequence[Loss]) -> StageResult:
    from edgekd.kd import lessons, search

    def job_of(closed: Sequence[Loss], epochs: int) -> Job:
        return lessons.lesson({**params, "epochs": epochs}, inputs, context.recipe_dir, closed)

    chosen, trials = search.search(terms, job_of, params["epochs"], params["search_share"], context.work, context.progress)
    told = search.as_json(chosen, trials)
    (context.out / "chosen.json").write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")
    note = f"{name}: {len(trials)} settings were tried for {told['epochs']} epochs; taken: {search.told(terms, chosen)}"
    samples = told["epochs"] * len(lessons.training_set(inputs, chosen, "distill.losses"))
    return StageResult({"trials": len(trials), "epochs": told["epochs"], "samples": samples}, (note,))
