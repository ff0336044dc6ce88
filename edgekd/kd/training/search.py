# SPDX-License-Identifier: Apache-2.0
"""Search: what a recipe leaves to ``auto`` is chosen by short trials on the validation split; the worse ones are pruned."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from edgekd.domain.losses import AUTO, Loss
from edgekd.errors import RecipeError
from edgekd.kd.reproducible import load_verified, save_verified
from edgekd.kd.training.callbacks import CHECKPOINT, Callback
from edgekd.kd.training.jobs import CHOSEN_FILE, student_job
from edgekd.kd.training.trainer import fit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import optuna

    from edgekd.domain.artifact import Artifact
    from edgekd.kd.training.callbacks import Trainer
    from edgekd.kd.training.jobs import SearchParams, TrainingJob
    from edgekd.ports import Context, Progress

# temperatures start below 1: a sharp head on embeddings teaches best there (measured: 0.5 to 1; image-like networks 2 to 4)
CHOICES: Mapping[str, tuple[float | bool, ...]] = {
    "temperature": (0.5, 1.0, 2.0, 4.0, 8.0),
    "weight": (0.3, 0.9, 2.7, 9.0),
    "standardize": (False, True),
    "label_smoothing": (0.0, 0.02, 0.05, 0.1, 0.2, 0.3),
}
TRIAL_SHARE = 0.25  # of the student's epochs
MIN_EPOCHS = 2
FIRST_RUNG = 3  # after that part of a trial the worse half is pruned: while the learning rate still rises, accuracies are chance


@dataclass(frozen=True, slots=True)
class TrialResult:
    """One trial: its choices, the accuracy after each of its epochs, and whether it was pruned."""

    choices: dict[str, float | bool]
    accuracies: list[float]
    pruned: bool


class Pruning(Callback):
    """Reports each epoch of a trial to Optuna, and ends the trial when its pruner says so."""

    def __init__(self, trial: optuna.Trial, epochs: int) -> None:
        self.trial, self.epochs = trial, epochs
        self.accuracies: list[float] = []

    def after_epoch(self, trainer: Trainer) -> None:
        import optuna

        accuracy = trainer.curve[-1].validation_accuracy
        if accuracy is None:
            what = "no sample of the validation split has a class, by which settings could be compared"
            raise RecipeError(f"distill.losses: 'auto': {what}; choose the setting yourself")
        if self.report(accuracy):
            raise optuna.TrialPruned

    def report(self, accuracy: float) -> bool:
        """Report an accuracy; return whether to prune. A trial that ran to its end is compared as it is."""
        self.accuracies.append(accuracy)
        self.trial.report(accuracy, len(self.accuracies))
        return len(self.accuracies) < self.epochs and self.trial.should_prune()


def run_search(params: SearchParams, inputs: Mapping[str, Artifact], context: Context) -> tuple[list[Loss], list[TrialResult]]:
    """Search the losses of a student, write ``chosen.json``, and return the losses and all trials."""

    def make_job(losses: Sequence[Loss], epochs: int) -> TrainingJob:
        settings = replace(params.student.settings, epochs=epochs)
        return student_job(replace(params.student, losses=tuple(losses), settings=settings), inputs, context.recipe_dir)

    losses, trials = search(params.student.losses, make_job, params.student.settings.epochs, params.share, context.work, context.progress)
    document = {
        "losses": [loss.to_dict() for loss in losses],
        "trials": [asdict(trial) for trial in trials],
        "epochs": total_epochs(trials),
    }
    (context.out / CHOSEN_FILE).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    return losses, trials


def read_chosen(artifact: Artifact) -> tuple[Loss, ...]:
    """Return the losses that a search chose."""
    return tuple(Loss.from_dict(loss) for loss in json.loads(artifact.path.read_text())["losses"])


def search(
    losses: Sequence[Loss],
    make_job: Callable[[Sequence[Loss], int], TrainingJob],
    epochs: int,
    share: float,
    work: Path,
    progress: Progress,
) -> tuple[list[Loss], list[TrialResult]]:
    """Return losses without ``auto``, and all trials; the first of the best is the one that was chosen.

    All trials start from the same weights and see the same batches. A search that was killed resumes with its finished trials.

    Args:
        losses: Some options of which are ``auto``.
        make_job: Returns the job of training by losses for some epochs.
        epochs: Those of the student's own training.
        share: The epochs of all trials together, as a share of these.
        work: The folder of finished trials.
        progress: Is called with the share done.

    Source:
        Successive halving: Jamieson and Talwalkar, arXiv 1502.07943; Li et al., arXiv 1810.05934, as in Optuna.
    """
    import optuna

    budget = max(MIN_EPOCHS, round(share * epochs))
    trial_epochs = min(budget, max(MIN_EPOCHS, round(TRIAL_SHARE * epochs)))
    space = {name: CHOICES[name.partition(".")[2]] for name in _auto_options(losses)}
    results: list[TrialResult] = []

    def objective(trial: optuna.Trial) -> float:
        choices = {name: trial.suggest_categorical(name, values) for name, values in space.items()}
        pruning = Pruning(trial, trial_epochs)
        folder = work / f"trial.{len(results)}"
        result = _resume_trial(folder, pruning) or _run_trial(
            choices,
            make_job(with_choices(losses, choices), trial_epochs),
            pruning,
            folder,
            lambda _, text: progress(min(1.0, total_epochs(results) / budget), text),
        )
        results.append(result)
        if result.pruned:
            raise optuna.TrialPruned
        return max(result.accuracies)

    def stop_at_budget(study: optuna.Study, _: optuna.trial.FrozenTrial) -> None:
        if total_epochs(results) + trial_epochs > budget:
            study.stop()

    study = _make_study(space, trial_epochs)
    study.optimize(objective, callbacks=[stop_at_budget])
    best = max((result for result in results if not result.pruned), key=lambda result: max(result.accuracies))
    return with_choices(losses, best.choices), results


def _make_study(space: Mapping[str, Sequence[float | bool]], trial_epochs: int) -> optuna.Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    first_rung = max(MIN_EPOCHS, math.ceil(trial_epochs / FIRST_RUNG))
    return optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.GridSampler(space, seed=0),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=first_rung, reduction_factor=2),
    )


def total_epochs(trials: Sequence[TrialResult]) -> int:
    """Return the epochs that all trials together took."""
    return sum(len(trial.accuracies) for trial in trials)


def with_choices(losses: Sequence[Loss], choices: Mapping[str, float | bool]) -> list[Loss]:
    """Return losses with the choices of a trial, which are named ``number of the loss.option``."""
    chosen = []
    for index, loss in enumerate(losses):
        options = {name.partition(".")[2]: value for name, value in choices.items() if name.partition(".")[0] == str(index)}
        chosen.append(replace(loss, **options))  # type: ignore[arg-type]  # each has its field's type
    return chosen


def with_first_choices(losses: Sequence[Loss]) -> list[Loss]:
    """Return losses with the first choice for each ``auto``: as good as any for timing a step."""
    return with_choices(losses, {name: CHOICES[name.partition(".")[2]][0] for name in _auto_options(losses)})


def describe_choice(losses: Sequence[Loss], chosen: Sequence[Loss]) -> str:
    """Return what was chosen, for messages."""
    parts = []
    for name in _auto_options(losses):
        index, _, option = name.partition(".")
        parts.append(f"{option} of {chosen[int(index)].kind} = {json.dumps(getattr(chosen[int(index)], option))}")
    return ", ".join(parts)


def _auto_options(losses: Sequence[Loss]) -> list[str]:
    """Return the options that are ``auto``, as ``number of the loss.option``."""
    return [
        f"{index}.{name}"
        for index, loss in enumerate(losses)
        for name, value in {"weight": loss.weight, **loss.explicit_options}.items()
        if value == AUTO
    ]


def _resume_trial(folder: Path, pruning: Pruning) -> TrialResult | None:
    """Return a trial that an earlier search finished, or None; the pruner learns of its epochs."""
    content = load_verified(folder / "result")
    if content is None:
        return None
    result = TrialResult(**json.loads(content))
    for accuracy in result.accuracies:
        pruning.report(accuracy)
    return result


def _run_trial(choices: dict[str, float | bool], job: TrainingJob, pruning: Pruning, folder: Path, progress: Progress) -> TrialResult:
    import optuna

    folder.mkdir(exist_ok=True)
    (folder / CHECKPOINT).unlink(missing_ok=True)  # half a trial starts again: its reports are lost
    pruned = True
    with suppress(optuna.TrialPruned):
        fit(job, folder, lambda _, text: progress(0.0, text), [pruning])
        pruned = False
    result = TrialResult(choices, pruning.accuracies, pruned)
    save_verified(folder / "result", json.dumps(asdict(result)).encode())
    return result
