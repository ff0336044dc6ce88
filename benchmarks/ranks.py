# SPDX-License-Identifier: Apache-2.0
"""Two processes of torchrun against one: the losses of the same training, same batches, with and without batch norm.

A convolutional student (KL and CE, 28x28 images, batches of 128) is trained for a few epochs by one process, then by two on a
thread each. Prints the largest difference between losses of the same epoch, and samples a second. Ends with 1 if a student without
batch statistics differs by more than 0.001; with batch norm, whose statistics are those of half a batch then, the gap is told.

    python benchmarks/ranks.py [epochs]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from distill_step import distillation, student
from torch import nn

from edgekd.domain.recipe import EntryPoint
from edgekd.kd.data import Samples
from edgekd.kd.training import distributed, loop

EPOCHS, COUNT, BATCH, BAR, PROCESSES = 5, 2560, 128, 1e-3, 2


def without_norm() -> nn.Module:
    """Return the student of ``distill_step.py`` without batch norm."""
    return nn.Sequential(*(layer for layer in student() if not isinstance(layer, nn.BatchNorm2d)))


STUDENTS = {"without batch norm": without_norm, "with batch norm": student}


def trained(epochs: int, threads: int) -> dict[str, list[float]]:
    """Train each student; return its losses, training and validation in turns, and samples a second last."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (COUNT,), generator=generator)
    images = torch.randn(COUNT, 1, 28, 28, generator=generator) + labels[:, None, None, None] / 3  # something can be learnt
    outputs = 3 * nn.functional.one_hot(labels, 10) + torch.randn(COUNT, 10, generator=generator)
    samples = Samples((images,), labels, outputs)
    found = {}
    for name, build in STUDENTS.items():
        settings = loop.TrainingSettings(epochs, BATCH, "adamw", 0.003, 0.01, 0, threads)
        job = loop.TrainingJob("distill", EntryPoint("bench.py", "student"), build, samples, samples, distillation, settings)
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            _, curve = loop.fit(job, Path(folder), lambda *_: None)
        speed = epochs * COUNT / (time.perf_counter() - started)
        found[name] = [loss for line in curve for loss in (line.train_loss, line.validation_loss)] + [speed]
    return found


def main() -> int:
    """Train both ways and print."""
    if distributed.world_size() > 1:
        path, epochs = Path(sys.argv[1]), int(sys.argv[2])
        found = trained(epochs, 1)
        if distributed.rank() == 0:
            path.write_text(json.dumps(found))
        return 0
    epochs = int(sys.argv[1]) if len(sys.argv) > 1 else EPOCHS
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "losses.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
        subprocess.run([*torchrun, __file__, str(path), str(epochs)], check=True)
        several = json.loads(path.read_text())
    gaps = {}
    for name, (*losses, speed) in trained(epochs, PROCESSES).items():
        *others, its = several[name]
        gaps[name] = max(abs(one - other) for one, other in zip(losses, others, strict=True))
        print(
            f"{name}: losses of {epochs} epochs differ by at most {gaps[name]:.2g}; {its:.0f} samples/s against {speed:.0f} in one process"
        )
    print(f"bar {BAR} without batch norm")
    return int(gaps["without batch norm"] > BAR)


if __name__ == "__main__":
    sys.exit(main())
