# SPDX-License-Identifier: Apache-2.0
"""Search: what a recipe leaves to ``auto`` is chosen by short trainings on the validation split.

Trials run in rungs. All trials of a rung train equally long, each a whole schedule down to the lowest learning rate; the best go on to the
next rung, where they start anew and train longer. So only equals are compared.

Source:
    Successive halving: Jamieson and Talwalkar, arXiv 1502.07943; Li et al., arXiv 1810.05934.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from edgekd import usercode
from edgekd.domain.losses import AUTO, LOSSES, Loss
from edgekd.errors import RecipeError
from edgekd.kd import data, modules, output_spec
from edgekd.kd.reproducible import deterministic, load_verified, save_verified
from edgekd.kd.training.jobs import CHOSEN_FILE, student_job, without_unread_teacher
from edgekd.kd.training.trainer import fit
from edgekd.stats import paired

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.verdict import Interval
    from edgekd.kd.training.jobs import SearchParams, TrainingJob
    from edgekd.ports import Context, Progress

    Choices = Mapping[str, float | bool]

# temperatures start below 1: a sharp head on embeddings teaches best there (measured: 0.5 to 1; image-like networks 2 to 4)
CHOICES: Mapping[str, tuple[float | bool, ...]] = {
    "temperature": (0.5, 1.0, 2.0, 4.0, 8.0),
    "weight": (0.3, 0.9, 2.7, 9.0),
    "standardize": (False, True),
    "label_smoothing": (0.0, 0.05, 0.1, 0.2, 0.3),
}
DEFAULT_WEIGHT = 0.9  # the other defaults are those of each loss
# what is tried beyond the choices, where their end wins
WIDER: Mapping[str, tuple[float, ...]] = {"temperature": (0.25, 16.0), "weight": (0.1, 27.0, 81.0), "label_smoothing": (0.4, 0.5, 0.6)}
LABELS_ONLY = "label_smoothing"  # the one choice of a trial without the teacher
LABELS_ONLY_CHOICES = (0.1, 0.0, 0.3)  # the default first
MIN_EPOCHS, MIN_SHARE = 3, 0.1  # of a trial, and as a share of the student's epochs: shorter ones favor what learns fast
RUNGS, REDUCTION = 3, 3  # usual number of rungs; one of so many trials goes on
FINAL_TRIALS = 3  # so few need no further rung
MAX_REPETITIONS = 3  # of the two best, with further seeds


@dataclass(frozen=True, slots=True)
class Trial:
    """A setting to train with, how long, and how many seeds after the student's."""

    choices: Choices
    epochs: int
    repetition: int = 0

    @property
    def is_labels_only(self) -> bool:
        """Return whether the trial has no teacher."""
        return LABELS_ONLY in self.choices


@dataclass(frozen=True, slots=True)
class TrialResult:
    """A trial, and the score of each validation sample, nan for one without a label."""

    trial: Trial
    scores: tuple[float, ...]

    @property
    def accuracy(self) -> float:
        """Return the mean score."""
        scores = [score for score in self.scores if not math.isnan(score)]
        return sum(scores) / len(scores)


@dataclass(frozen=True, slots=True)
class SearchResult:
    """All results, and the two best of the longest trials, each with its repetitions; ``second`` is empty if there was one setting.

    ``is_weak``: there were not enough epochs for all settings.
    """

    results: Sequence[TrialResult]
    best: Sequence[TrialResult]
    second: Sequence[TrialResult]
    is_weak: bool

    @property
    def epochs(self) -> int:
        """Return the epochs of all trials together."""
        return _total_epochs(self.results)

    def margin(self) -> tuple[float, Interval | None]:
        """Return by how much the best is better than the second, with an interval that is paired by sample."""
        import numpy as np

        best, second = (np.array([result.scores for result in results]).mean(axis=0) for results in (self.best, self.second))
        differences = (best - second)[~np.isnan(best)]
        return float(differences.mean()), paired.difference_interval(differences, np.arange(len(differences)))


def run_search(params: SearchParams, inputs: Mapping[str, Artifact], context: Context) -> SearchResult:
    """Search the losses of a student, and write ``chosen.json``."""
    student = params.student

    def run_trial(trial: Trial, number: int, progress: Progress) -> TrialResult:
        settings = replace(student.settings, epochs=trial.epochs, seed=student.settings.seed + trial.repetition)
        trial_params = replace(student, losses=with_choices(student.losses, trial.choices), settings=settings)
        job = student_job(*without_unread_teacher(trial_params, inputs, student.losses), context.recipe_dir)
        return _run_trial(trial, job, context.work / f"trial.{number}", progress)

    has_labels = bool((data.load_split(inputs, "train", output=student.output).labels >= 0).any())
    space = search_space(student.losses, labels_only=params.labels_only and has_labels)
    result = search(space, run_trial, student.settings.epochs, params.share, context.progress)
    losses = with_choices(student.losses, result.best[0].trial.choices)
    trials = [asdict(item.trial) | {"accuracy": item.accuracy} for item in result.results]
    document = {"losses": [loss.to_dict() for loss in losses], "trials": trials, "epochs": result.epochs}
    (context.out / CHOSEN_FILE).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    return result


def read_chosen(artifact: Artifact) -> tuple[Loss, ...]:
    """Return the losses that a search chose."""
    return tuple(Loss.from_dict(loss) for loss in json.loads(artifact.path.read_text())["losses"])


def search(
    space: Sequence[Choices],
    run_trial: Callable[[Trial, int, Progress], TrialResult],
    epochs: int,
    share: float,
    progress: Progress,
) -> SearchResult:
    """Return the best setting, by trials in rungs.

    All trials start from the same weights and see the same batches. On a tie, the student without a teacher is the better one,
    then the setting that is nearer to the defaults.

    Args:
        space: The settings, from :func:`search_space`.
        run_trial: Runs a trial, which it gets with its number.
        epochs: Those of the student's own training.
        share: The epochs of all trials together, as a share of these.
        progress: Is called with the share done.
    """
    shortest = min(epochs, max(MIN_EPOCHS, math.ceil(MIN_SHARE * epochs)))
    budget = max(shortest, round(share * epochs))
    settings = list(space[: budget // shortest])
    results: list[TrialResult] = []

    def run(choices: Choices, length: int, repetition: int = 0) -> TrialResult:
        done = _total_epochs(results)
        trial = Trial(choices, length, repetition)
        results.append(run_trial(trial, len(results), lambda part, text: progress((done + part * length) / budget, text)))
        return results[-1]

    length = min(epochs, max(shortest, budget // (RUNGS * len(settings))))
    rung = [run(choices, length) for choices in settings]
    while _total_epochs(results) + FINAL_TRIALS * length < budget and (choices := _wider(rung)) is not None:
        rung.append(run(choices, length))
    while (survivors := _survivors(rung, (budget - _total_epochs(results)) // (2 * length))) and length < epochs:
        remaining = budget - _total_epochs(results)
        halves = [remaining // 2, remaining] if len(survivors) > FINAL_TRIALS else [remaining]
        length = next(min(epochs, part // len(survivors)) for part in halves if part >= 2 * length * len(survivors))
        rung = [run(result.trial.choices, length) for result in survivors]
    rung.sort(key=_rank, reverse=True)
    finalists = [[result] for result in rung[:2]]
    for repetition in range(1, MAX_REPETITIONS + 1):
        if len(finalists) == 1 or _total_epochs(results) + len(finalists) * length > budget:
            break
        for repeated in finalists:
            repeated.append(run(repeated[0].trial.choices, length, repetition))
    finalists.sort(key=lambda repeated: (sum(item.accuracy for item in repeated), *_rank(repeated[0])[1:]), reverse=True)
    return SearchResult(results, finalists[0], finalists[1] if len(finalists) > 1 else (), is_weak=len(settings) < len(space))


def search_space(losses: Sequence[Loss], *, labels_only: bool) -> list[Choices]:
    """Return all settings of losses, the defaults first; ``labels_only`` adds those of a student without a teacher."""
    names = _auto_options(losses)
    grid = (dict(zip(names, values, strict=True)) for values in itertools.product(*(CHOICES[_option(name)] for name in names)))
    space = [({LABELS_ONLY: value}, index) for index, value in enumerate(LABELS_ONLY_CHOICES if labels_only else ())]
    space += [(choices, _distance(losses, choices)) for choices in grid]
    return [choices for choices, _ in sorted(space, key=lambda item: item[1])]


def with_choices(losses: Sequence[Loss], choices: Choices) -> tuple[Loss, ...]:
    """Return losses with the choices of a trial, which are named ``number of the loss.option``."""
    if LABELS_ONLY in choices:
        return (Loss.from_dict(Loss("ce", label_smoothing=choices[LABELS_ONLY]).to_dict()),)
    chosen = []
    for index, loss in enumerate(losses):
        options = {_option(name): value for name, value in choices.items() if name.partition(".")[0] == str(index)}
        chosen.append(replace(loss, **options))  # type: ignore[arg-type]  # each has its field's type
    return tuple(chosen)


def with_first_choices(losses: Sequence[Loss]) -> tuple[Loss, ...]:
    """Return losses with the first choice for each ``auto``: as good as any for timing a step."""
    return with_choices(losses, search_space(losses, labels_only=False)[0])


def describe_choices(losses: Sequence[Loss], choices: Choices) -> str:
    """Return a setting, for messages."""
    if LABELS_ONLY in choices:
        return f"labels only, label smoothing {choices[LABELS_ONLY]:g}"
    parts = []
    for name, value in choices.items():
        index, _, option = name.partition(".")
        parts.append(f"{option} of {losses[int(index)].kind} = {json.dumps(value)}")
    return ", ".join(parts) or "the losses of the recipe"


def _total_epochs(results: Sequence[TrialResult]) -> int:
    return sum(result.trial.epochs for result in results)


def _rank(result: TrialResult) -> tuple[float, bool]:
    """Return what results of equally long trials are compared by; of equals, the first is the best."""
    return (result.accuracy, result.trial.is_labels_only)


def _survivors(rung: Sequence[TrialResult], most: int) -> list[TrialResult]:
    """Return the results that go on, at most so many: the best, with the best that has a teacher and the best that has none."""
    ranked = sorted(rung, key=_rank, reverse=True)
    count = min(max(2, math.ceil(len(ranked) / REDUCTION)), most)
    if count < min(2, len(ranked)) or len(ranked) == 1:
        return []
    leaders = [next((item for item in ranked if item.trial.is_labels_only is kind), ranked[0]) for kind in (False, True)]
    others = [item for item in ranked if item not in leaders]
    chosen = [*dict.fromkeys(map(ranked.index, leaders)), *map(ranked.index, others)][:count]
    return [ranked[index] for index in sorted(chosen)]


def _wider(rung: Sequence[TrialResult]) -> Choices | None:
    """Return a setting that is not in the rung, beyond an end that wins; None if no end does."""
    tried = [result.trial.choices for result in rung]
    for is_labels_only in (False, True):
        leader = max((item for item in rung if item.trial.is_labels_only is is_labels_only), key=_rank, default=None)
        for name, value in () if leader is None else leader.trial.choices.items():
            values = [choices[name] for choices in tried if name in choices]
            wider = WIDER.get(_option(name), ())
            further = [*sorted(item for item in wider if item > max(values))[:1]] if value == max(values) else []
            further += [*sorted(item for item in wider if item < min(values))[-1:]] if value == min(values) else []
            for item in further:
                return {**leader.trial.choices, name: item}  # type: ignore[union-attr]
    return None


def _distance(losses: Sequence[Loss], choices: Choices) -> int:
    """Return how far a setting is from the defaults, in steps along the lists of choices."""
    steps = 0
    for name, value in choices.items():
        index, _, option = name.partition(".")
        default = {"weight": DEFAULT_WEIGHT, **LOSSES[losses[int(index)].kind]}[option]
        steps += abs(CHOICES[option].index(value) - CHOICES[option].index(default))
    return steps


def _option(name: str) -> str:
    """Return the option of a choice, which is named ``number of the loss.option``."""
    return name.rpartition(".")[2]


def _auto_options(losses: Sequence[Loss]) -> list[str]:
    """Return the options that are ``auto``, as ``number of the loss.option``."""
    return [
        f"{index}.{name}"
        for index, loss in enumerate(losses)
        for name, value in {"weight": loss.weight, **loss.explicit_options}.items()
        if value == AUTO
    ]


def _run_trial(trial: Trial, job: TrainingJob, folder: Path, progress: Progress) -> TrialResult:
    """Train and score a trial, unless an earlier run of the search has."""
    content = load_verified(folder / "result")
    if content is not None:
        stored = json.loads(content)
        if stored["trial"] == asdict(trial):
            return TrialResult(trial, tuple(stored["scores"]))
    folder.mkdir(exist_ok=True)
    weights, _ = fit(job, folder, progress)
    scores = validation_scores(job, weights)
    if all(map(math.isnan, scores)):
        what = "no sample of the validation split has a class, by which settings could be compared"
        raise RecipeError(f"distill.losses: 'auto': {what}; choose the setting yourself")
    result = TrialResult(trial, scores)
    save_verified(folder / "result", json.dumps({"trial": asdict(trial), "scores": scores}).encode())
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
