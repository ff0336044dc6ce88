# SPDX-License-Identifier: Apache-2.0
"""The share of a training run's wall time that is not spent in forward, loss, backward and optimizer.

A ResNet-8 student, 32x32 colour images, batches of 128, KD from stored teacher logits, a new augmented view in each epoch (shifted
and flipped). It times one complete ``fit``, with dry run, augmentation, validation and checkpoints. Prints the share; exits with 1
above 5 %.

    python benchmarks/non_compute_share.py [epochs]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from distill_step import distillation_loss
from throughput import resnet
from torch.nn import functional

from edgekd.domain.recipe import EntryPoint
from edgekd.kd import views
from edgekd.kd.data import Samples
from edgekd.kd.training import trainer
from edgekd.kd.training.jobs import TrainingJob, TrainingSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

EPOCHS, COUNT, BATCH, PADDING, BAR = 30, 5120, 128, 4, 0.05


def augment(inputs: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return images that are shifted by up to four pixels and flipped at random."""
    (images,) = inputs
    count, _, side, _ = images.shape
    is_flipped = torch.rand(count, generator=generator) < 0.5  # noqa: PLR2004  (heads or tails)
    padded = functional.pad(torch.where(is_flipped[:, None, None, None], images.flip(3), images), (PADDING,) * 4)
    row, column = torch.randint(0, 2 * PADDING + 1, (2, count, 1), generator=generator) + torch.arange(side)
    shifted = padded[
        torch.arange(count)[:, None, None, None], torch.arange(3)[:, None, None], row[:, None, :, None], column[:, None, None, :]
    ]
    return (shifted,)


def main() -> int:
    """Train once and print the share."""
    epochs = int(sys.argv[1]) if len(sys.argv) > 1 else EPOCHS
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(COUNT, 3, 32, 32, generator=generator), torch.randint(0, 10, (COUNT,), generator=generator)
    teacher_logits = torch.randn(epochs, COUNT, 10, generator=generator)
    seconds: Counter[str] = Counter()

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                seconds[name] += time.perf_counter() - start

        return run

    def view(epoch: int) -> Samples:
        return Samples(views.make_view(augment, "train", (images,), epoch), labels, teacher_logits[epoch])

    validation = Samples((images[:512],), labels[:512], teacher_logits[0][:512])
    settings = TrainingSettings(epochs, BATCH, "adamw", 0.003, 0.01, 0, torch.get_num_threads())
    entry, objective, timed_view = EntryPoint("bench.py", "student"), timed("loss", distillation_loss), timed("views", view)
    job = TrainingJob("distill", entry, lambda: resnet(1), view(0), validation, objective, settings, view=timed_view)
    trainer.forward = timed("forward", trainer.forward)
    torch.Tensor.backward = timed("backward", torch.Tensor.backward)  # type: ignore[method-assign]  # to time it
    torch.optim.AdamW.step = timed("optimizer", torch.optim.AdamW.step)  # type: ignore[method-assign]  # the same
    with tempfile.TemporaryDirectory() as work:
        start = time.perf_counter()
        trainer.fit(job, Path(work), lambda *_: None)
        total = time.perf_counter() - start
    share = 1 - sum(seconds[name] for name in ("forward", "loss", "backward", "optimizer")) / total
    parts = ", ".join(f"{name} {100 * value / total:.1f} %" for name, value in seconds.most_common())
    print(f"{total:.1f} s for {epochs} epochs of {COUNT} images: {parts}; non-compute: {100 * share:.2f} %, bar {100 * BAR:.0f} %")
    return int(share > BAR)


if __name__ == "__main__":
    sys.exit(main())
