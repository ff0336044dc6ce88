# SPDX-License-Identifier: Apache-2.0
"""Trials of a search: they are trained, scored on the validation split, and stored, so that a search that was killed resumes."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from edgekd import usercode
from edgekd.domain.losses import Loss
from edgekd.errors import RecipeError
from edgekd.kd import data, modules, output_spec
from edgekd.kd.reproducible import deterministic, load_verified, save_verified
from edgekd.kd.training.jobs import CHOSEN_FILE, TRAINED_FILE, EpochResult, student_job, without_unread_teacher
from edgekd.kd.training.search import TrialResult, search, search_space, with_choices
from edgekd.kd.training.trainer import fit

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from edgekd.domain.artifact import Artifact
    from edgekd.kd.training.jobs import SearchParams, TrainingJob
    from edgekd.kd.training.search import SearchResult, Trial
    from edgekd.ports import Context, Progress

_RESULT, _WEIGHTS, _CURVE = "result", "weights", "curve"  # files of a trial; the last two if it is the student's own training


def run_search(params: SearchParams, inputs: Mapping[str, Artifact], context: Context) -> tuple[SearchResult, int]:
    """Search the losses of a student; return the result, and the epochs that it took.

    Writes ``chosen.json`` and the weights of the student, if the search has trained it to the end. Those epochs do not count. Otherwise the
    file holds no weights.
    """
    student = params.student

    def run_trial(trial: Trial, number: int, progress: Progress) -> TrialResult:
        settings = replace(student.settings, epochs=trial.epochs, seed=student.settings.seed + trial.repetition)
        trial_params = replace(student, losses=with_choices(student.losses, trial.choices), settings=settings)
        job = student_job(*without_unread_teacher(trial_params, inputs, student.losses), context.recipe_dir)
        return _run_trial(trial, job, context.work / f"trial.{number}", progress, stores_weights=is_students_own(trial))

    def is_students_own(trial: Trial) -> bool:
        return (trial.epochs, trial.repetition) == (student.settings.epochs, 0)

    has_labels = bool((data.load_split(inputs, "train", output=student.output).labels >= 0).any())
    space = search_space(student.losses, labels_only=params.labels_only and has_labels)
    result = search(space, run_trial, student.settings.epochs, params.share, context.progress)
    losses = with_choices(student.losses, result.best[0].trial.choices)
    trials = [asdict(item.trial) | {"accuracy": item.accuracy} for item in result.results]
    best = result.best[0]
    is_trained = params.labels_only and is_students_own(best.trial)
    folder = context.work / f"trial.{result.results.index(best)}"
    weights, curve = (load_verified(folder / name) if is_trained else None for name in (_WEIGHTS, _CURVE))
    (context.out / TRAINED_FILE).write_bytes(weights or modules.serialize_weights({}))
    epochs = result.epochs - (student.settings.epochs if is_trained else 0)
    document = {"losses": [loss.to_dict() for loss in losses], "trials": trials, "epochs": epochs, "curve": json.loads(curve or b"[]")}
    (context.out / CHOSEN_FILE).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    return result, epochs


def read_chosen(artifact: Artifact) -> tuple[Loss, ...]:
    """Return the losses that a search chose."""
    return tuple(Loss.from_dict(loss) for loss in json.loads(artifact.path.read_text())["losses"])


def read_trained(inputs: Mapping[str, Artifact]) -> tuple[dict[str, Tensor], list[EpochResult]] | None:
    """Return the weights and the curve of the student, if a search has trained it already."""
    if "trained" not in inputs:
        return None
    curve = [EpochResult(**row) for row in json.loads(inputs["chosen"].path.read_text())["curve"]]
    return (modules.read_weights(inputs["trained"].path), curve) if curve else None


def _run_trial(trial: Trial, job: TrainingJob, folder: Path, progress: Progress, *, stores_weights: bool) -> TrialResult:
    """Train and score a trial, unless an earlier run of the search has."""
    content = load_verified(folder / _RESULT)
    if content is not None and not (stores_weights and None in (load_verified(folder / _WEIGHTS), load_verified(folder / _CURVE))):
        stored = json.loads(content)
        if stored["trial"] == asdict(trial):
            return TrialResult(trial, tuple(stored["scores"]))
    folder.mkdir(exist_ok=True)
    weights, curve = fit(job, folder, progress)
    scores = validation_scores(job, weights)
    if all(map(math.isnan, scores)):
        what = "no sample of the validation split has a class, by which settings could be compared"
        raise RecipeError(f"distill.losses: 'auto': {what}; choose the setting yourself")
    result = TrialResult(trial, scores)
    if stores_weights:
        save_verified(folder / _WEIGHTS, modules.serialize_weights(weights))
        save_verified(folder / _CURVE, json.dumps([asdict(item) for item in curve]).encode())
    save_verified(folder / _RESULT, json.dumps({"trial": asdict(trial), "scores": scores}).encode())
    return result


def validation_scores(job: TrainingJob, weights: Mapping[str, Tensor]) -> tuple[float, ...]:
    """Return the score of each validation sample: the share of its labels that are predicted, nan if it has none."""
    import torch

    module = job.build()
    modules.load_weights(module, dict(weights), str(job.entry))
    module.eval()
    scores = []
    with deterministic(job.settings.threads), torch.inference_mode():
        for rows in torch.split(torch.arange(len(job.validation)), job.settings.batch_size):
            batch = job.validation.pick(rows)
            scores.append(output_spec.sample_scores(job.output, usercode.call_user_code(module, job.entry, *batch.inputs), batch.labels))
    return tuple(torch.cat(scores).tolist())
