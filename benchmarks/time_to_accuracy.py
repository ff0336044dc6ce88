# SPDX-License-Identifier: Apache-2.0
"""Seconds until a distilled student is as accurate as one that a plain loop with the teacher in it trains.

Teacher and student of ``examples/fashion-mnist``, 8,000 training images, KL at temperature 2 and CE, AdamW with a one-cycle rate,
batches of 128, as many threads as there are cores. ``pytorch`` is a hand-written loop of 12 epochs that runs the teacher on each batch;
``torchdistill`` does the same in its DistillationBox, if it is installed. ``edgekd`` stores the teacher's logits first, which is part of
its time, and trains for 16 epochs. The target is the mean accuracy of the ``pytorch`` students after their last epoch, on the 10,000 test
images; scoring them is not timed. Loops take turns, seed by seed. Prints the median ratio of each seed's seconds and exits with 1 if a
student does not reach the target, or a ratio is above its bar. ``again`` is edgekd's time where the logits are in the cache, as for any
further student.

The images are read from ``examples/fashion-mnist/data`` (``fetch.py`` there gets them), or from the folder that EDGEKD_DATA names.

    python benchmarks/time_to_accuracy.py [seeds]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgekd import config, usercode
from edgekd.domain.artifact import Artifact
from edgekd.domain.losses import Loss
from edgekd.domain.recipe import EntryPoint
from edgekd.harness import runner
from edgekd.kd.training import jobs, trainer
from edgekd.kd.training.callbacks import Callback
from edgekd.ports import Context
from edgekd.stages import distill, soft_targets

if TYPE_CHECKING:
    from collections.abc import Callable

EXAMPLE = Path(__file__).parents[1] / "examples" / "fashion-mnist"
SEEDS, SAMPLES, EPOCHS, MORE_EPOCHS = 3, 8000, 12, 16
BARS = {"pytorch": 0.35, "torchdistill": 0.3}
LOSSES = (Loss("kl", 0.9, temperature=2.0), Loss("ce", 0.1))


@dataclass(slots=True)
class Course:
    """The course of a training: the seconds at the end of each epoch, scoring left out, and the accuracies then."""

    seconds: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    untimed: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def end_epoch(self, module: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Take the time, then score the module."""
        before = time.perf_counter()
        self.seconds.append(before - self.started - self.untimed)
        self.accuracies.append(accuracy(module, images, labels))
        self.untimed += time.perf_counter() - before

    def seconds_to(self, target: float) -> float:
        """Return the seconds at the end of the first epoch with the target's accuracy; infinity if none has it."""
        return next((seconds for seconds, value in zip(self.seconds, self.accuracies, strict=True) if value >= target), float("inf"))


def accuracy(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that a module classifies correctly; it is left in training mode."""
    module.eval()
    with torch.inference_mode():
        predictions = torch.cat([module(part).argmax(1) for part in images.split(500)])
    module.train()
    return float((predictions == labels).float().mean())


def plain_loop(
    build: Callable[[], nn.Module], teacher: nn.Module, data: dict[str, tuple[Tensor, Tensor]], seed: int, settings: Any
) -> Course:
    """Train a student in a hand-written PyTorch loop with the teacher in it."""
    torch.manual_seed(seed)
    student, (images, labels) = build(), data["train"]
    course = Course()
    optimizer = torch.optim.AdamW(student.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    steps = EPOCHS * -(-len(images) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=steps)
    for _ in range(EPOCHS):
        student.train()
        for rows in torch.randperm(len(images)).split(settings.batch_size):
            with torch.no_grad():
                targets = functional.log_softmax(teacher(images[rows]) / 2, 1)
            logits = student(images[rows])
            divergence = functional.kl_div(functional.log_softmax(logits / 2, 1), targets, reduction="batchmean", log_target=True)
            loss = 0.1 * functional.cross_entropy(logits, labels[rows]) + 0.9 * 4 * divergence
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own
            optimizer.step()
            schedule.step()
        course.end_epoch(student, *data["evaluation"])
    return course


def torchdistill_loop(
    build: Callable[[], nn.Module], teacher: nn.Module, data: dict[str, tuple[Tensor, Tensor]], seed: int, settings: Any
) -> Course:
    """Train a student in torchdistill's loop, as in its examples."""
    from torchdistill.common.constant import def_logger
    from torchdistill.core.distillation import DistillationBox

    def_logger.setLevel("ERROR")
    torch.manual_seed(seed)
    student, (images, labels) = build(), data["train"]
    course = Course()
    outputs = {f"{role}_module_{key}": value for role in ("student", "teacher") for key, value in (("path", "."), ("io", "output"))}
    loss = {"key": "KDLoss", "kwargs": {**outputs, "temperature": 2.0, "alpha": 0.1}}
    rate = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    schedule = {"max_lr": settings.learning_rate, "total_steps": EPOCHS * -(-len(images) // settings.batch_size)}
    setup = {
        "num_epochs": EPOCHS,
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "AdamW", "kwargs": rate},
        "scheduler": {"key": "OneCycleLR", "kwargs": schedule, "scheduling_step": 1},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": loss, "weight": 1.0}}}},
    }
    box = DistillationBox(teacher, student, {}, setup, torch.device("cpu"), [], distributed=False, lr_factor=1)
    for epoch in range(EPOCHS):
        student.train()
        box.pre_epoch_process(epoch=epoch)
        for rows in torch.randperm(len(images)).split(settings.batch_size):
            box.post_forward_process(box.forward_process(images[rows], targets=labels[rows], supp_dict={}))
        course.end_epoch(student, *data["evaluation"])
    return course


class EndOfEpoch(Callback):
    """Scores the student after each epoch."""

    def __init__(self, course: Course, evaluation: tuple[Tensor, Tensor]) -> None:
        """Keep the course and the images to score."""
        self.course, self.evaluation = course, evaluation

    def after_epoch(self, trained: trainer.Trainer) -> None:
        """Score the student."""
        self.course.end_epoch(trained.module, *self.evaluation)


def edgekd_stages(data: dict[str, tuple[Tensor, Tensor]], seed: int, folder: Path) -> tuple[Course, float]:
    """Run the stages ``soft_targets`` and ``distill``; return the course of both, and the seconds of the first."""
    recipe = config.load_recipe(EXAMPLE / "all_labels.toml")
    cores = runner.facts()["cores"]
    recipe = replace(recipe, distill=replace(recipe.distill, threads=cores, seed=seed, epochs=MORE_EPOCHS, losses=LOSSES, baselines=None))
    inputs = {"teacher": Artifact(EXAMPLE / "teacher.safetensors", "", 0)}
    for split, rows in (("train", slice(None)), ("validation", slice(256)), ("unlabelled", slice(0))):
        for name, tensor in zip(("inputs.0", "labels"), data["train" if split == "train" else "evaluation"], strict=True):
            np.save(folder / f"{split}.{name}.npy", tensor[rows].numpy())
            inputs[f"{split}.{name}"] = Artifact(folder / f"{split}.{name}.npy", "", 0)
    context = Context(EXAMPLE, folder, folder, lambda *_: None)
    course = Course()
    [step] = soft_targets.steps(recipe, [])
    soft_targets.run(step, inputs, context)
    stored = time.perf_counter() - course.started
    for split in soft_targets.SPLITS:
        inputs[f"{split}.soft_targets"] = Artifact(folder / f"{split}.soft_targets.safetensors", "", 0)
    student = next(step for step in distill.steps(recipe, []) if step.id == "distill")
    job = jobs.student_job(student.params, inputs, EXAMPLE)
    trainer.fit(job, folder, lambda *_: None, [EndOfEpoch(course, data["evaluation"])])
    return course, stored


def main() -> int:
    """Train, print, and return the exit code."""
    student, teacher_module, read_splits = (
        usercode.load_function(EXAMPLE, EntryPoint(file, name))
        for file, name in (("models.py", "student"), ("models.py", "teacher"), ("data.py", "elsewhere"))
    )
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else SEEDS
    try:
        splits = read_splits()
    except FileNotFoundError as error:
        print(f"nothing was measured: {error}")
        return 0
    data = {name: splits[name].tensors for name in ("train", "evaluation")}
    data["train"] = tuple(tensor[:SAMPLES] for tensor in data["train"])
    torch.set_num_threads(runner.facts()["cores"])
    from safetensors.torch import load_file

    teacher = teacher_module().eval().requires_grad_(requires_grad=False)
    teacher.load_state_dict(load_file(EXAMPLE / "teacher.safetensors"))
    settings = config.load_recipe(EXAMPLE / "all_labels.toml").distill
    loops: dict[str, Callable[..., Course]] = {"pytorch": plain_loop}
    if find_spec("torchdistill") is None:
        print("torchdistill is not installed, so it is not compared")
    else:
        loops["torchdistill"] = torchdistill_loop
    courses: dict[str, list[Course]] = {name: [] for name in (*loops, "edgekd")}
    stored = []
    for seed in range(seeds):
        for name, loop in loops.items():
            courses[name].append(loop(student, teacher, data, seed, settings))
        with tempfile.TemporaryDirectory() as folder:
            course, seconds = edgekd_stages(data, seed, Path(folder))
        torch.set_num_threads(runner.facts()["cores"])
        courses["edgekd"].append(course)
        stored.append(seconds)
        last = ", ".join(f"{name} {items[-1].seconds[-1]:.1f} s {100 * items[-1].accuracies[-1]:.2f} %" for name, items in courses.items())
        print(f"seed {seed}: {last}; storing the logits {seconds:.1f} s", flush=True)
    target = statistics.mean(course.accuracies[-1] for course in courses["pytorch"])
    reached = [course.seconds_to(target) for course in courses["edgekd"]]
    print(f"target {100 * target:.2f} %; edgekd reaches it after {', '.join(f'{seconds:.1f}' for seconds in reached)} s")
    is_missed = False
    for name in loops:
        totals = [course.seconds[-1] for course in courses[name]]
        ratios = [seconds / total for seconds, total in zip(reached, totals, strict=True)]
        again = [(seconds - first) / total for seconds, first, total in zip(reached, stored, totals, strict=True)]
        ratio = statistics.median(ratios)
        listed = ", ".join(f"{item:.2f}" for item in ratios)
        print(f"edgekd / {name}: {ratio:.2f} ({listed}), bar {BARS[name]}; again {statistics.median(again):.2f}")
        is_missed |= max(ratios) == float("inf") or ratio > BARS[name]
    return int(is_missed)


if __name__ == "__main__":
    sys.exit(main())
