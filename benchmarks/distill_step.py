# SPDX-License-Identifier: Apache-2.0
"""Samples a second of edgekd's distillation with stored teacher outputs, against training the student alone.

Blocks of four loops take turns in one process on the same student (19,354 parameters), data in memory (28x28 images)
and batches of 128: ``distil`` is edgekd's loop with KL and CE, ``free`` the same without what makes it repeatable, ``alone``
the same with CE only, ``plain`` the loop that one writes in PyTorch by hand. The ratio of neighbouring blocks is what
counts; its median has an interval that assumes no distribution. Ends with 1 if the median of a ratio is below the bar.

    python benchmarks/distill_step.py [rounds]
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from edgekd.domain.losses import Loss
from edgekd.domain.recipe import EntryPoint
from edgekd.kd import losses
from edgekd.kd.data import Samples
from edgekd.kd.reproducible import deterministic
from edgekd.kd.training import loop
from edgekd.kd.training.execution import DEFAULT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgekd.kd.training.execution import ExecutionMode

BAR = 0.95
ROUNDS, STEPS, BATCH = 41, 4, 128
TERMS = (Loss("kl", 0.9, temperature=4.0), Loss("ce", 0.1))


def student() -> nn.Module:
    """Return a small convolutional network."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)),
    )


def ours(
    build: Callable[[], nn.Module],
    samples: Samples,
    objective: Callable[..., torch.Tensor],
    optimizer: str = "adamw",
    *,
    free: bool = False,
    mode: ExecutionMode = DEFAULT,
    threads: int | None = None,
) -> Callable[[], None]:
    """Return one block of edgekd's loop; ``free``: of any algorithm, not only of those that give the same bytes again."""
    settings = loop.TrainingSettings(1000, BATCH, optimizer, 0.001, 0.01, 0, threads or torch.get_num_threads(), mode)
    job = loop.TrainingJob("distill", EntryPoint("bench.py", "student"), build, samples, samples, objective, settings)
    epoch = loop.epoch_runner(job)

    def block() -> None:
        with nullcontext() if free else deterministic(settings.threads, mode.accelerator):
            epoch()

    return block


def plain(samples: Samples) -> Callable[[], None]:
    """Return one block of the loop that one writes by hand: the student alone, from labels."""
    module, (images,), labels = student().train(), samples.inputs, samples.labels
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.001, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.001, total_steps=1_000_000)

    def block() -> None:
        for rows in torch.randperm(len(labels)).split(BATCH):  # type: ignore[no-untyped-call]  # torch's own
            loss = nn.functional.cross_entropy(module(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own
            optimizer.step()
            schedule.step()
            loss.item()

    return block


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Return the median and an interval between order statistics.

    Source: Conover, Practical Nonparametric Statistics, 3rd ed., section 3.2 (binomial ranks).
    """
    ordered, n = sorted(values), len(values)
    below, tail = 0, 0.5**n
    while tail + math.comb(n, below + 1) * 0.5**n <= (1 - confidence) / 2:
        below += 1
        tail += math.comb(n, below) * 0.5**n
    return statistics.median(ordered), ordered[below], ordered[n - 1 - below]


def distillation(logits: torch.Tensor, answers: Mapping[str, torch.Tensor | None], labels: torch.Tensor, _: int) -> torch.Tensor:
    """Return the loss of distillation: KL and CE."""
    return losses.total_loss(TERMS, logits, answers, labels)


def compared(blocks: Mapping[str, Callable[[], None]], count: int, rounds: int, bars: Mapping[str, float]) -> int:
    """Time blocks of ``count`` samples in turns and print; return 1 if the ratio of ``distil`` to another is below its bar."""
    speeds: dict[str, list[float]] = {name: [] for name in blocks}
    for block in blocks.values():
        block()
    for turn in range(rounds):
        for name in list(blocks) if turn % 2 else reversed(list(blocks)):
            started = time.perf_counter()
            blocks[name]()
            speeds[name].append(count / (time.perf_counter() - started))
    for name, found in speeds.items():
        print(f"{name:6} {statistics.median(found):8.0f} samples/s (median of {rounds} blocks of {count} samples)")
    slow = False
    for other, bar in bars.items():
        median, low, high = median_interval([mine / its for mine, its in zip(speeds["distil"], speeds[other], strict=True)])
        slow = slow or median < bar
        print(f"distil / {other}: {median:.3f} [{low:.3f}, {high:.3f}], bar {bar}")
    return int(slow)


def main() -> int:
    """Run the rounds and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    torch.manual_seed(0)
    count = STEPS * BATCH
    samples = Samples((torch.randn(count, 1, 28, 28),), torch.randint(0, 10, (count,)), torch.randn(count, 10))
    blocks = {
        "distil": ours(student, samples, distillation),
        "free": ours(student, samples, distillation, free=True),
        "alone": ours(student, samples, lambda logits, _answers, labels, _epoch: losses.ce(logits, labels)),
        "plain": plain(samples),
    }
    return compared(blocks, count, rounds, dict.fromkeys(("free", "alone", "plain"), BAR))


if __name__ == "__main__":
    sys.exit(main())
