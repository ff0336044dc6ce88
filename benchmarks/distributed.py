# SPDX-License-Identifier: Apache-2.0
"""Distributed training: two processes of torchrun against one, on the same batches, with and without batch norm.

A convolutional student (KL and CE, 28x28 images, batches of 128) is trained for a few epochs in one process, then in two processes
with one thread each. Prints the largest difference between losses of the same epoch, and the training speed. Exits with 1 if the
losses of a student without batch norm differ by more than 0.001. With batch norm, its statistics are of half a batch in each
process, so there is no bar.

    python benchmarks/distributed.py [epochs]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from distill_step import distillation_loss, student
from torch import nn

from edgekd.domain.recipe import EntryPoint
from edgekd.kd.data import Samples
from edgekd.kd.training import distributed, trainer
from edgekd.kd.training.jobs import TrainingJob, TrainingSettings

EPOCHS, COUNT, BATCH, BAR, PROCESSES = 5, 2560, 128, 1e-3, 2


def student_without_batch_norm() -> nn.Module:
    """Return the student of ``distill_step.py`` without batch norm."""
    return nn.Sequential(*(layer for layer in student() if not isinstance(layer, nn.BatchNorm2d)))


STUDENTS = {"without batch norm": student_without_batch_norm, "with batch norm": student}


def train(epochs: int, threads: int) -> dict[str, tuple[list[float], float]]:
    """Train each student; return its losses (training and validation of each epoch) and its samples per second."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (COUNT,), generator=generator)
    images = torch.randn(COUNT, 1, 28, 28, generator=generator) + labels[:, None, None, None] / 3  # a learnable signal
    teacher_logits = 3 * nn.functional.one_hot(labels, 10) + torch.randn(COUNT, 10, generator=generator)
    samples = Samples((images,), labels, teacher_logits)
    results = {}
    for name, build in STUDENTS.items():
        settings = TrainingSettings(epochs, BATCH, "adamw", 0.003, 0.01, 0, threads)
        job = TrainingJob("distill", EntryPoint("bench.py", "student"), build, samples, samples, distillation_loss, settings)
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            _, curve = trainer.fit(job, Path(folder), lambda *_: None)
        samples_per_s = epochs * COUNT / (time.perf_counter() - started)
        results[name] = [loss for result in curve for loss in (result.train_loss, result.validation_loss)], samples_per_s
    return results


def main() -> int:
    """Train in one process and in several, and print."""
    if distributed.world_size() > 1:
        path, epochs = Path(sys.argv[1]), int(sys.argv[2])
        results = train(epochs, 1)
        if distributed.rank() == 0:
            path.write_text(json.dumps(results))
        return 0
    epochs = int(sys.argv[1]) if len(sys.argv) > 1 else EPOCHS
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "losses.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
        subprocess.run([*torchrun, __file__, str(path), str(epochs)], check=True)
        distributed_results = json.loads(path.read_text())
    differences = {}
    for name, (losses, speed) in train(epochs, PROCESSES).items():
        distributed_losses, distributed_speed = distributed_results[name]
        differences[name] = max(abs(first - second) for first, second in zip(losses, distributed_losses, strict=True))
        print(
            f"{name}: losses of {epochs} epochs differ by at most {differences[name]:.2g}; "
            f"{distributed_speed:.0f} samples/s in {PROCESSES} processes, {speed:.0f} in one"
        )
    print(f"bar {BAR} without batch norm")
    return int(differences["without batch norm"] > BAR)


if __name__ == "__main__":
    sys.exit(main())
