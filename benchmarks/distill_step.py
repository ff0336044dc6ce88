# SPDX-License-Identifier: Apache-2.0
"""Training speed: distillation with stored teacher logits in edgekd, against training the student without a teacher.

Blocks of four training loops are interleaved in one process, with the same student (19,354 parameters), data in memory (28x28
images) and batches of 128: ``edgekd`` is edgekd's loop with KL and CE, ``nondeterministic`` the same without deterministic
algorithms, ``no_teacher`` edgekd's loop with CE only, ``pytorch`` a hand-written PyTorch loop with CE only. Prints the median
ratio of neighbouring blocks with a distribution-free interval. Exits with 1 if the median of a ratio is below the bar.

    python benchmarks/distill_step.py [rounds]
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from contextlib import nullcontext
from operator import truediv
from typing import TYPE_CHECKING

import torch
from scipy.stats import quantile_test
from torch import nn

from edgekd.domain.losses import Loss
from edgekd.domain.recipe import EntryPoint
from edgekd.kd import losses
from edgekd.kd.data import Samples
from edgekd.kd.reproducible import deterministic
from edgekd.kd.training.execution import DEFAULT_MODE
from edgekd.kd.training.jobs import TrainingJob, TrainingSettings
from edgekd.kd.training.trainer import epoch_runner

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgekd.kd.training.execution import ExecutionMode

BAR = 0.95
ROUNDS, STEPS, BATCH = 41, 4, 128
LOSSES = (Loss("kl", 0.9, temperature=4.0), Loss("ce", 0.1))


def student() -> nn.Module:
    """Return a small convolutional network."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)),
    )


def edgekd_block(
    build: Callable[[], nn.Module],
    samples: Samples,
    objective: Callable[..., torch.Tensor],
    optimizer: str = "adamw",
    *,
    is_deterministic: bool = True,
    mode: ExecutionMode = DEFAULT_MODE,
    threads: int | None = None,
) -> Callable[[], None]:
    """Return one block of edgekd's training loop."""
    settings = TrainingSettings(1000, BATCH, optimizer, 0.001, 0.01, 0, threads or torch.get_num_threads(), mode=mode)
    job = TrainingJob("distill", EntryPoint("bench.py", "student"), build, samples, samples, objective, settings)
    run_epoch = epoch_runner(job)

    def block() -> None:
        with deterministic(settings.threads, mode.accelerator) if is_deterministic else nullcontext():
            run_epoch()

    return block


def pytorch_block(samples: Samples) -> Callable[[], None]:
    """Return one block of a hand-written PyTorch loop that trains the student on labels."""
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
    """Return the median and its distribution-free interval, the whole range if there are too few values."""
    low, high = quantile_test(values, p=0.5).confidence_interval(confidence)
    return statistics.median(values), min(values) if math.isnan(low) else low, max(values) if math.isnan(high) else high


def distillation_loss(
    logits: torch.Tensor, teacher_logits: Mapping[str, torch.Tensor | None], labels: torch.Tensor, _: int
) -> torch.Tensor:
    """Return the distillation loss: KL and CE."""
    return losses.total_loss(LOSSES, logits, teacher_logits, labels)


def compare(blocks: Mapping[str, Callable[[], None]], count: int, rounds: int, bars: Mapping[str, float]) -> int:
    """Time interleaved blocks of ``count`` samples and print; return 1 if the ratio of ``edgekd`` to another is below its bar."""
    speeds: dict[str, list[float]] = {name: [] for name in blocks}
    for block in blocks.values():
        block()
    for number in range(rounds):
        for name in list(blocks) if number % 2 else reversed(list(blocks)):
            started = time.perf_counter()
            blocks[name]()
            speeds[name].append(count / (time.perf_counter() - started))
    for name, samples_per_s in speeds.items():
        print(f"{name:16} {statistics.median(samples_per_s):8.0f} samples/s (median of {rounds} blocks of {count} samples)")
    is_slow = False
    for name, bar in bars.items():
        median, low, high = median_interval(list(map(truediv, speeds["edgekd"], speeds[name])))
        is_slow = is_slow or median < bar
        print(f"edgekd / {name}: {median:.3f} [{low:.3f}, {high:.3f}], bar {bar}")
    return int(is_slow)


def main() -> int:
    """Time the loops and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    torch.manual_seed(0)
    count = STEPS * BATCH
    samples = Samples((torch.randn(count, 1, 28, 28),), torch.randint(0, 10, (count,)), torch.randn(count, 10))
    blocks = {
        "edgekd": edgekd_block(student, samples, distillation_loss),
        "nondeterministic": edgekd_block(student, samples, distillation_loss, is_deterministic=False),
        "no_teacher": edgekd_block(student, samples, lambda logits, _teacher_logits, labels, _epoch: losses.ce(logits, labels)),
        "pytorch": pytorch_block(samples),
    }
    return compare(blocks, count, rounds, dict.fromkeys(("nondeterministic", "no_teacher", "pytorch"), BAR))


if __name__ == "__main__":
    sys.exit(main())
