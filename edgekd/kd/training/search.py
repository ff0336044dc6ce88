# SPDX-License-Identifier: Apache-2.0
"""What a recipe leaves to ``auto`` is chosen by short runs on the validation split, the worse ones stopped early."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from edgekd.domain.losses import AUTO, Loss
from edgekd.errors import RecipeError
from edgekd.kd.reproducible import load_verified, save_verified
from edgekd.kd.training import loop

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import optuna
    from torch import nn

    from edgekd.ports import Progress

# temperatures start below 1: a sharp head on embeddings teaches best there (measured: 0.5 to 1; image-like networks 2 to 4)
CHOICES: Mapping[str, tuple[float | bool, ...]] = {
    "temperature": (0.5, 1.0, 2.0, 4.0, 8.0),
    "weight": (0.3, 0.9, 2.7, 9.0),
    "standardize": (False, True),
    "label_smoothing": (0.0, 0.02, 0.05, 0.1, 0.2, 0.3),
}
SHORT = 0.25  # of the student's epochs: one run
FEWEST_EPOCHS = 2
FIRST_LOOK = 3  # after that part of a run the worse half is stopped: while the learning rate still rises, accuracies are chance


@dataclass(frozen=True, slots=True)
class SearchTrial:
    """One short run: what was tried, the accuracy after each of its epochs, and whether it was stopped early."""

    chosen: dict[str, float | bool]
    accuracies: list[float]
    stopped: bool


def search(
    terms: Sequence[Loss],
    job_of: Callable[[Sequence[Loss], int], loop.TrainingJob],
    epochs: int,
    share: float,
    work: Path,
    progress: Progress,
) -> tuple[list[Loss], list[SearchTrial]]:
    """Return losses with nothing open, and all trials, the first of the best being the one that was taken.

    All trials start from the same weights and see the same batches. A search that is killed goes on with its finished trials.

    Args:
        terms: Losses, some options of which are ``auto``.
        job_of: Returns the job of training by losses for some epochs.
        epochs: Those of the student's own training.
        share: What all trials together may take, as a share of them.
        work: Where finished trials are kept.
        progress: Is told how far it is.

    Source:
        Successive halving: Jamieson and Talwalkar, arXiv 1502.07943; Li et al., arXiv 1810.05934, as in Optuna.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    most = max(FEWEST_EPOCHS, round(share * epochs))
    short = min(most, max(FEWEST_EPOCHS, round(SHORT * epochs)))
    space = {name: CHOICES[name.partition(".")[2]] for name in _open(terms)}
    done: list[SearchTrial] = []

    def spent() -> int:
        return sum(len(one.accuracies) for one in done)

    def objective(trial: optuna.Trial) -> float:
        chosen = {name: trial.suggest_categorical(name, values) for name, values in space.items()}
        job = partial(job_of, with_choices(terms, chosen), short)
        done.append(_run(trial, chosen, job, short, work / f"trial.{len(done)}", lambda _, text: progress(min(1.0, spent() / most), text)))
        if done[-1].stopped:
            raise optuna.TrialPruned
        return max(done[-1].accuracies)

    def enough(study: optuna.Study, _: optuna.trial.FrozenTrial) -> None:
        if spent() + short > most:
            study.stop()

    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.GridSampler(space, seed=0),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=max(FEWEST_EPOCHS, math.ceil(short / FIRST_LOOK)), reduction_factor=2),
    )
    study.optimize(objective, callbacks=[enough])
    best = max((one for one in done if not one.stopped), key=lambda one: max(one.accuracies))
    return with_choices(terms, best.chosen), done


def with_choices(terms: Sequence[Loss], chosen: Mapping[str, float | bool]) -> list[Loss]:
    """Return losses with what was chosen."""
    found = []
    for index, term in enumerate(terms):
        own = {name.partition(".")[2]: value for name, value in chosen.items() if name.partition(".")[0] == str(index)}
        found.append(replace(term, **own))  # type: ignore[arg-type]  # each has its field's type
    return found


def with_first_choices(terms: Sequence[Loss]) -> list[Loss]:
    """Return losses with the first choice for what is open: as good as any for timing a step."""
    return with_choices(terms, {name: CHOICES[name.partition(".")[2]][0] for name in _open(terms)})


def _open(terms: Sequence[Loss]) -> list[str]:
    """Return what is open, as ``number of the loss.option``."""
    found = []
    for index, term in enumerate(terms):
        found += [f"{index}.{name}" for name, value in {"weight": term.weight, **term.given}.items() if value == AUTO]
    return found


def _run(
    trial: optuna.Trial, chosen: dict[str, float | bool], job: Callable[[], loop.TrainingJob], epochs: int, work: Path, progress: Progress
) -> SearchTrial:
    """Run one trial, or take it as an earlier search left it."""

    def is_enough(epoch: int, accuracy: float) -> bool:
        trial.report(accuracy, epoch)
        return epoch < epochs and trial.should_prune()  # a whole run is compared as it is

    if (packed := load_verified(work / "result")) is not None:
        found = SearchTrial(**json.loads(packed))
        for epoch, accuracy in enumerate(found.accuracies, 1):
            is_enough(epoch, accuracy)  # by which the pruner learns of it
        return found
    import optuna

    work.mkdir(exist_ok=True)
    accuracies: list[float] = []

    def seen(line: loop.EpochResult, _: nn.Module) -> None:
        if line.validation_accuracy is None:
            what = "no sample of the validation split has a class, by which settings could be compared"
            raise RecipeError(f"distill.losses: 'auto': {what}; choose the setting yourself")
        accuracies.append(line.validation_accuracy)
        if is_enough(line.epoch, accuracies[-1]):
            raise optuna.TrialPruned

    given, stopped = job(), True
    with suppress(optuna.TrialPruned):
        (work / loop.CHECKPOINT).unlink(missing_ok=True)  # half a trial starts again: its reports are lost
        loop.fit(given, work, lambda _, text: progress(0.0, text), seen)
        stopped = False
    found = SearchTrial(chosen, accuracies, stopped)
    save_verified(work / "result", json.dumps(asdict(found)).encode())
    return found


def as_json(terms: Sequence[Loss], trials: Sequence[SearchTrial]) -> dict[str, Any]:
    """Return what was chosen and how, for a file."""
    return {
        "losses": [term.to_dict() for term in terms],
        "trials": [asdict(one) for one in trials],
        "epochs": sum(len(one.accuracies) for one in trials),
    }


def describe_choice(terms: Sequence[Loss], chosen: Sequence[Loss]) -> str:
    """Return what was chosen, in words."""
    parts = []
    for name in _open(terms):
        index, _, option = name.partition(".")
        parts.append(f"{option} of {chosen[int(index)].kind} = {json.dumps(getattr(chosen[int(index)], option))}")
    return ", ".join(parts)
