# SPDX-License-Identifier: Apache-2.0
"""What ``auto`` reaches, against the best of a grid by hand: each setting is trained with equal epochs and seeds.

Builds a recipe whose losses have an "auto" up to the stage ``distill``; ``distill.baselines`` says how many seeds. Then it trains each
setting of the grid with the same seeds: all temperatures, standardized or not, with the weights that are asked for, and labels alone with
each smoothing. All are scored on the evaluation split, which no search sees. Prints the grid, what the search chose and how long it took,
and auto minus the best of the grid, with the interval over seeds and samples; the best of many noisy means is itself too high. Results are
stored line by line in FILE, so a run that was ended goes on. Exits with 1 if auto is more than the bar below the best.

    python benchmarks/auto.py RECIPE FILE [weight ...]
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.build import keys, pipeline, run
from edgekd.domain.losses import Loss
from edgekd.domain.recipe import DISTILLED
from edgekd.kd import data, modules
from edgekd.kd.training import jobs, search, trainer
from edgekd.stats import seeds
from edgekd.store.cache import Cache
from edgekd.store.folder import cache_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgekd.domain.artifact import Artifact
    from edgekd.ports import Step

BAR = 0.3  # points
DEFAULT_WEIGHTS = (0.9, 2.7)
TEMPERATURES = tuple(map(float, search.CHOICES["temperature"]))


class Task:
    """A recipe that was built up to the stage ``distill``, and what the cache holds of it."""

    def __init__(self, path: Path) -> None:
        """Build, and look everything up."""
        self.folder = path.resolve().parent
        command = [sys.executable, "-m", "edgekd", "build", "--recipe", str(path), "--target", "host", "--until", "distill"]
        with tempfile.TemporaryDirectory() as out:
            subprocess.run([*command, "--out", out], check=False)
        plan, cache = run.load_plan(path.resolve(), ["host"]), Cache(cache_folder(None), print)
        cache.prepare()
        self.recipe, self.completed = plan.recipe, {}
        for step in pipeline.steps_until(plan, "distill"):
            if step.producers <= set(self.completed):
                key = keys.find_key(cache, keys.key_material(pipeline.STAGES[step.stage], step, self.completed), self.folder)
                if (entry := cache.get(key)) is not None:
                    self.completed[step.id] = pipeline.CompletedStep(step, entry, hit=True)
        if "distill" not in self.completed:
            sys.exit("the build did not reach a student; see its messages above")
        artifacts = self.completed["inspect"].entry.artifacts
        inputs = {name.removesuffix(".npy"): artifact for name, artifact in artifacts.items() if name.startswith("evaluation.")}
        self.evaluation = data.load_split(inputs, "evaluation")
        groups = artifacts.get("evaluation.groups.npy")
        self.groups = np.arange(len(self.evaluation)) if groups is None else np.load(groups.path)
        self.student: Step[Any] = self.completed["distill"].step
        self.inputs: dict[str, Artifact] = keys.input_artifacts(self.student, self.completed)

    def train(self, losses: Sequence[Loss], seed: int) -> np.ndarray:
        """Return right and wrong on the evaluation split of a student that is trained with losses and a seed."""
        explicit = tuple(Loss.from_dict(loss.to_dict()) for loss in losses)
        params = replace(self.student.params, losses=explicit, settings=replace(self.student.params.settings, seed=seed))
        job = jobs.student_job(*jobs.without_unread_teacher(params, self.inputs, params.losses), self.folder)
        with tempfile.TemporaryDirectory() as work:
            weights, _ = trainer.fit(job, Path(work), lambda *_: None)
        return self.score(job, weights)

    def auto(self) -> list[np.ndarray]:
        """Return right and wrong of the students of the build, seed by seed."""
        names = ["distill", *self.recipe.methods.get(DISTILLED, ())[1:]]
        job = jobs.student_job(replace(self.student.params, losses=(Loss("ce"),)), self.inputs, self.folder)
        return [self.score(job, modules.read_weights(self.completed[name].entry.artifacts["student.safetensors"].path)) for name in names]

    def score(self, job: jobs.TrainingJob, weights: Any) -> np.ndarray:
        """Return right and wrong (n,) on the evaluation split; other splits are not read."""
        return np.array(search.validation_scores(replace(job, validation=self.evaluation), weights))


def grid(weights: Sequence[float]) -> dict[str, tuple[Loss, ...]]:
    """Return the losses of each setting."""
    settings: dict[str, tuple[Loss, ...]] = {
        f"labels, smoothing {smoothing:g}": (Loss("ce", label_smoothing=float(smoothing)),)
        for smoothing in search.CHOICES["label_smoothing"]
    }
    for weight, temperature, standardize in itertools.product(weights, TEMPERATURES, (False, True)):
        name = f"kl, weight {weight:g}, temperature {temperature:g}{', standardized' if standardize else ''}"
        settings[name] = (Loss("kl", weight, temperature=temperature, standardize=standardize), Loss("ce", 0.1))
    return settings


def main() -> int:
    """Build, train, print, and return the exit code."""
    if len(sys.argv) < 3:  # noqa: PLR2004  (program, recipe, file)
        print("nothing was measured: expected RECIPE FILE [weight ...], such as examples/keywords/edgekd.toml build/auto.jsonl 2")
        return 0
    task, file = Task(Path(sys.argv[1])), Path(sys.argv[2])
    rows = {}
    if file.is_file():
        rows = {(row["setting"], row["seed"]): np.array(row["scores"]) for row in map(json.loads, file.read_text().splitlines())}
    auto = task.auto()
    first_seed = task.student.params.settings.seed
    settings = grid([float(weight) for weight in sys.argv[3:]] or DEFAULT_WEIGHTS)
    for name, losses in settings.items():
        for seed in range(first_seed, first_seed + len(auto)):
            if (name, seed) not in rows:
                rows[name, seed] = task.train(losses, seed)
                with file.open("a") as lines:
                    lines.write(json.dumps({"setting": name, "seed": seed, "scores": rows[name, seed].tolist()}) + "\n")
    by_setting = {name: np.stack([rows[name, first_seed + number] for number in range(len(auto))]) for name in settings}
    for name, scores in sorted(by_setting.items(), key=lambda item: -item[1].mean()):
        print(f"{100 * scores.mean():6.2f} %  {name}")
    best = max(by_setting.values(), key=np.mean)
    difference, interval = seeds.difference_over_seeds(np.stack(auto) - best, task.groups)
    searching = task.completed["distill/search"].entry
    print(f"auto: {100 * np.stack(auto).mean():.2f} %, {len(auto)} seeds; the search took {searching.metrics['epochs']} epochs")
    shown = "" if interval is None else f" [{100 * interval.low:.2f}, {100 * interval.high:.2f}]"
    print(f"auto minus the best of the grid: {100 * difference:+.2f}{shown} points, bar -{BAR}")
    return int(100 * difference < -BAR)


if __name__ == "__main__":
    sys.exit(main())
