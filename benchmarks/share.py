# SPDX-License-Identifier: Apache-2.0
"""The share of a training run's wall time that is not spent in forward, loss, backward and optimizer, augmentation included.

A ResNet-8 student, 32x32 colour images, batches of 128, KD from stored outputs, a new augmented view in each epoch (moved and
mirrored). One whole ``fit``: trial batch, validation, checkpoints and all. Prints the share; ends with 1 above 5 %.

    python benchmarks/share.py [epochs]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from distill_step import distillation
from throughput import resnet
from torch.nn import functional

from edgekd.domain.recipe import EntryPoint
from edgekd.kd import views
from edgekd.kd.data import Samples
from edgekd.kd.training import loop

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

EPOCHS, COUNT, BATCH, PADDING, BAR = 30, 5120, 128, 4, 0.05


def augment(inputs: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return images moved by up to four pixels and mirrored or not, all at once."""
    (images,) = inputs
    count, _, side, _ = images.shape
    mirrored = torch.rand(count, generator=generator) < 0.5  # noqa: PLR2004  (heads or tails)
    padded = functional.pad(torch.where(mirrored[:, None, None, None], images.flip(3), images), (PADDING,) * 4)
    row, column = torch.randint(0, 2 * PADDING + 1, (2, count, 1), generator=generator) + torch.arange(side)
    moved = padded[
        torch.arange(count)[:, None, None, None], torch.arange(3)[:, None, None], row[:, None, :, None], column[:, None, None, :]
    ]
    return (moved,)


def main() -> int:
    """Run one training and print the share."""
    epochs = int(sys.argv[1]) if len(sys.argv) > 1 else EPOCHS
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(COUNT, 3, 32, 32, generator=generator), torch.randint(0, 10, (COUNT,), generator=generator)
    outputs = torch.randn(epochs, COUNT, 10, generator=generator)
    spent: Counter[str] = Counter()

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                spent[name] += time.perf_counter() - start

        return run

    def view(epoch: int) -> Samples:
        return Samples(views.make_view(augment, "train", (images,), epoch), labels, outputs[epoch])

    validation = Samples((images[:512],), labels[:512], outputs[0][:512])
    settings = loop.TrainingSettings(epochs, BATCH, "adamw", 0.003, 0.01, 0, torch.get_num_threads())
    objective = timed("loss", distillation)
    job = loop.TrainingJob(
        "distill", EntryPoint("bench.py", "student"), lambda: resnet(1), view(0), validation, objective, settings, view=view
    )
    loop.call = timed("forward", loop.call)  # of the student
    loop.usercode = type("Timed", (), {"call": staticmethod(timed("backward", loop.usercode.call))})  # type: ignore[assignment,misc]  # the calls are what is timed
    optimizer = loop._optimizer  # noqa: SLF001  (its steps are what is timed)

    def stepping(*arguments: Any) -> torch.optim.Optimizer:
        made = optimizer(*arguments)
        made.step = timed("optimizer", made.step)  # type: ignore[method-assign]
        return made

    loop._optimizer = stepping  # noqa: SLF001  (the same)
    job = replace(job, view=timed("views", view))
    with tempfile.TemporaryDirectory() as work:
        start = time.perf_counter()
        loop.fit(job, Path(work), lambda *_: None)
        total = time.perf_counter() - start
    share = 1 - sum(spent[name] for name in ("forward", "loss", "backward", "optimizer")) / total
    parts = ", ".join(f"{name} {100 * seconds / total:.1f} %" for name, seconds in spent.most_common())
    print(f"{total:.1f} s for {epochs} epochs of {COUNT} images: {parts}; not compute: {100 * share:.2f} %, bar {100 * BAR:.0f} %")
    return int(share > BAR)


if __name__ == "__main__":
    sys.exit(main())
