# SPDX-License-Identifier: Apache-2.0
"""Search: what a recipe leaves to ``auto`` is chosen by short trainings on the validation split.

Trials run in rungs. All trials of a rung train equally long, each a whole schedule down to the lowest learning rate; the best go on to the
next rung, where they start anew and train longer. So only equals are compared. Few settings are trained from several seeds, because
seeds differ more than neighboring settings.

Source:
    Successive halving: Jamieson and Talwalkar, arXiv 1502.07943; Li et al., arXiv 1810.05934.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgekd.domain.losses import AUTO, LOSSES, Loss
from edgekd.stats import paired

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgekd.domain.verdict import Interval
    from edgekd.ports import Progress

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
DUEL_SHARE = 2.0  # of the student's epochs; with fewer, students with and without a teacher are compared by the longest trials
FIRST_SHARE = 2 / 3  # at most, of all epochs, for the first rung
RUNGS, REDUCTION, GROWTH = 3, 3, 2  # usual number of rungs; one of so many settings goes on, to trials at least so much longer
MAX_SEEDS = 3  # of a setting in the first rung, and further ones of the two best
FINAL_TRIALS, FINAL_SEEDS = 3, 2  # so few settings need no further rung, and are trained from so many seeds


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


def search(
    space: Sequence[Choices],
    run_trial: Callable[[Trial, int, Progress], TrialResult],
    epochs: int,
    share: float,
    progress: Progress,
) -> SearchResult:
    """Return the best setting, by trials in rungs.

    All trials start from the same weights and see the same batches. On a tie, the student without a teacher is the better one,
    then the setting that is nearer to the defaults. Short trials favor the teacher, from which a student learns faster. So if there are
    epochs enough (:data:`DUEL_SHARE`), the best setting with and without it are both trained as long as the student, at the end. One of the
    two is the student's own training, which does not count.

    Args:
        space: The settings, from :func:`search_space`.
        run_trial: Runs a trial, which it gets with its number.
        epochs: Those of the student's own training.
        share: The epochs of all trials together, as a share of these.
        progress: Is called with the share done.
    """
    shortest = min(epochs, max(MIN_EPOCHS, math.ceil(MIN_SHARE * epochs)))
    kinds = {LABELS_ONLY in choices for choices in space}
    is_duel = len(kinds) > 1 and share >= DUEL_SHARE
    budget = max(shortest, round((share - is_duel) * epochs))
    most = budget // shortest
    count = min(len(space), max(2, int(FIRST_SHARE * most)) if (1 - FIRST_SHARE) * most >= 2 * GROWTH else most)
    results: list[TrialResult] = []

    def run_one(trial: Trial) -> TrialResult:
        done, total = _total_epochs(results), budget + 2 * epochs * is_duel
        results.append(run_trial(trial, len(results), lambda part, text: progress((done + part * trial.epochs) / total, text)))
        return results[-1]

    def run(choices: Choices, length: int, seeds: range) -> list[TrialResult]:
        return [run_one(Trial(choices, length, repetition)) for repetition in seeds]

    seeds = min(MAX_SEEDS, max(1, budget // (RUNGS * count * shortest)))
    length = min(epochs, max(shortest, budget // (RUNGS * count * seeds)))
    rung: list[list[TrialResult]] = []
    while len(rung) < count:
        further = _wider(rung) if count < len(space) else []  # all of the space comes first, where it fits
        rung.append(run(_next([*space, *further], rung), length, range(seeds)))
    while _total_epochs(results) + FINAL_TRIALS * seeds * length < budget and (wider := _wider(rung)):
        rung.append(run(wider[0], length, range(seeds)))
    without_teacher = [repeated for repeated in rung if is_duel and repeated[0].trial.is_labels_only]
    rung = [repeated for repeated in rung if repeated not in without_teacher]
    finalists = _finalists(rung, run, lambda: budget - _total_epochs(results), epochs)
    if without_teacher:
        leaders = finalists[0], max(without_teacher, key=_rank)
        finalists = sorted((run(repeated[0].trial.choices, epochs, range(1)) for repeated in leaders), key=_rank, reverse=True)
    return SearchResult(results, finalists[0], finalists[1] if len(finalists) > 1 else (), is_weak=count < len(space))


def _finalists(
    rung: list[list[TrialResult]], run: Callable[[Choices, int, range], list[TrialResult]], remaining: Callable[[], int], epochs: int
) -> list[list[TrialResult]]:
    """Run further rungs after the first; return the two best settings of the last one, the best first, or one if there is no other."""
    seeds, length = len(rung[0]), rung[0][0].trial.epochs
    while (survivors := _survivors(rung, remaining() // (GROWTH * length))) and length < epochs:
        is_final = len(survivors) <= FINAL_TRIALS
        seeds = FINAL_SEEDS if is_final and remaining() // (FINAL_SEEDS * len(survivors)) >= GROWTH * length else 1
        parts = [remaining()] if is_final else [remaining() // 2, remaining()]
        length = next(min(epochs, part // (seeds * len(survivors))) for part in parts if part >= GROWTH * length * seeds * len(survivors))
        rung = [run(repeated[0].trial.choices, length, range(seeds)) for repeated in survivors]
    finalists = sorted(rung, key=_rank, reverse=True)[:2]
    for repetition in range(seeds, MAX_SEEDS + 1):
        if len(finalists) == 1 or len(finalists) * length > remaining():
            break
        finalists = [[*repeated, *run(repeated[0].trial.choices, length, range(repetition, repetition + 1))] for repeated in finalists]
    return sorted(finalists, key=_rank, reverse=True)


def search_space(losses: Sequence[Loss], *, labels_only: bool) -> list[Choices]:
    """Return all settings of losses, the defaults first; ``labels_only`` adds those of a student without a teacher."""
    names = _auto_options(losses)
    grid = (dict(zip(names, values, strict=True)) for values in itertools.product(*(CHOICES[_option(name)] for name in names)))
    space: list[tuple[Choices, int]] = [(choices, _distance(losses, choices)) for choices in grid]
    space += [({LABELS_ONLY: value}, index) for index, value in enumerate(LABELS_ONLY_CHOICES if labels_only else ())]
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


def _rank(repeated: Sequence[TrialResult]) -> tuple[float, bool]:
    """Return what settings of a rung are compared by, from the results of all seeds; of equals, the first is the best."""
    return (sum(result.accuracy for result in repeated) / len(repeated), repeated[0].trial.is_labels_only)


def _survivors(rung: Sequence[list[TrialResult]], most: int) -> list[list[TrialResult]]:
    """Return the settings that go on, at most so many: the best, with the best that has a teacher and the best that has none."""
    ranked = sorted(rung, key=_rank, reverse=True)
    count = min(max(2, math.ceil(len(ranked) / REDUCTION)), most)
    if count < min(2, len(ranked)) or len(ranked) == 1:
        return []
    leaders = [next((item for item in ranked if item[0].trial.is_labels_only is kind), ranked[0]) for kind in (False, True)]
    others = [item for item in ranked if item not in leaders]
    chosen = [*dict.fromkeys(map(ranked.index, leaders)), *map(ranked.index, others)][:count]
    return [ranked[index] for index in sorted(chosen)]


def _next(space: Sequence[Choices], rung: Sequence[list[TrialResult]]) -> Choices:
    """Return the setting to try next: the default with and without a teacher first, then what is nearest to the best of its kind."""
    best = {LABELS_ONLY in repeated[0].trial.choices: repeated[0].trial.choices for repeated in sorted(rung, key=_rank)}

    def distance(choices: Choices) -> int:
        leader = best.get(LABELS_ONLY in choices)
        return 0 if leader is None else sum(abs(_position(name, value) - _position(name, leader[name])) for name, value in choices.items())

    tried = [repeated[0].trial.choices for repeated in rung]
    return min((choices for choices in space if choices not in tried), key=distance)


def _wider(rung: Sequence[list[TrialResult]]) -> list[Choices]:
    """Return the settings beyond an end that wins, with and without a teacher, that were not tried."""
    tried = [repeated[0].trial.choices for repeated in rung]
    wider = []
    for kind in (False, True):
        leader = max((item for item in rung if item[0].trial.is_labels_only is kind), key=_rank, default=None)
        choices = {} if leader is None else leader[0].trial.choices
        for name, value in choices.items():
            values = _values(name)
            position, listed = values.index(value), CHOICES[_option(name)]
            beyond = [values[position + 1 : position + 2]] if value >= max(listed) else []
            beyond += [values[position - 1 : position]] if value <= min(listed) else []
            wider += [{**choices, name: item} for items in beyond for item in items]
    return [choices for choices in wider if choices not in tried]


def _distance(losses: Sequence[Loss], choices: Choices) -> int:
    """Return how far a setting is from the defaults, in steps along the lists of choices."""
    steps = 0
    for name, value in choices.items():
        index, _, option = name.partition(".")
        default = {"weight": DEFAULT_WEIGHT, **LOSSES[losses[int(index)].kind]}[option]
        steps += abs(_position(option, value) - _position(option, default))
    return steps


def _position(name: str, value: Any) -> int:
    """Return where a value is among all values of its option."""
    return _values(name).index(value)


def _values(name: str) -> list[float | bool]:
    """Return all values of an option, in order."""
    return sorted((*CHOICES[_option(name)], *WIDER.get(_option(name), ())))


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
