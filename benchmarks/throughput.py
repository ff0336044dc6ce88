# SPDX-License-Identifier: Apache-2.0
"""Samples a second of distillation with stored teacher outputs, against the ways in which it is usually done.

A ResNet-8 student (He et al.'s layout, 77,850 parameters), 32x32 colour images, batches of 128. Blocks take turns in one process:
``distil`` is edgekd's loop with KL and CE; ``alone`` the loop that one writes in PyTorch by hand for the student alone, data in memory;
``loader`` the same behind the usual DataLoader with PIL crops and flips; ``online`` distillation by hand with a ResNet-56 teacher in the
loop; ``torchdistill`` the same in its DistillationBox, where it is installed. Where the processor has bfloat16 instructions, edgekd's
loop is first tried in both precisions, as a build does, and the faster one counts. Prints the median ratio of neighbouring blocks with
its interval. Ends with 1 if one is below its bar.

Under torchrun, edgekd's loop is that of as many processes, a thread each, and the others are one process's with as many threads.

    python benchmarks/throughput.py [rounds]
    torchrun --nproc-per-node 2 benchmarks/throughput.py [rounds]
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import torch
from distill_step import compared, distillation, ours
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from edgekd.harness import runner
from edgekd.kd.data import Samples
from edgekd.kd.training import autotune, distributed, execution

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Batches = Iterator[tuple[Tensor, Tensor]]

ROUNDS, STEPS, BATCH, PADDING = 21, 4, 128, 4
BARS = {"alone": 1.2, "loader": 2.0, "online": 5.0, "torchdistill": 5.0}
BAR_BFLOAT16 = 1.5  # against alone, where the processor has instructions for it


class Block(nn.Module):
    """Two convolutions around a short cut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.short = nn.Sequential() if stride == 1 and inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Shapes: images (n, inputs, h, w); result (n, outputs, h / stride, w / stride)."""
        found = torch.relu(self.norm1(self.first(images)))
        return torch.relu(self.norm2(self.second(found)) + self.short(images))


def resnet(blocks: int) -> nn.Module:
    """Return a ResNet of ``6 * blocks + 2`` layers for images of 32x32 pixels (arXiv 1512.03385, section 4.2)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    width = 16
    for outputs in (16, 32, 64):
        for number in range(blocks):
            layers.append(Block(width, outputs, 2 if number == 0 and outputs != width else 1))
            width = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Pictures(Dataset[tuple[Tensor, int]]):
    """Pictures that are cropped and flipped by PIL, one by one."""

    def __init__(self, count: int) -> None:
        generator = np.random.default_rng(0)
        self.pictures = [Image.fromarray(item) for item in generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)]
        self.labels = generator.integers(0, 10, count).tolist()
        self.generator = generator

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.pictures)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        """Return one picture, (3, 32, 32), and its label."""
        picture = Image.new("RGB", (32 + 2 * PADDING,) * 2)
        picture.paste(self.pictures[row], (PADDING, PADDING))
        left, top = self.generator.integers(0, 2 * PADDING + 1, 2)
        picture = picture.crop((left, top, left + 32, top + 32))
        if self.generator.random() < 0.5:  # noqa: PLR2004  (heads or tails)
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
        return (pixels - 0.5) / 0.25, self.labels[row]


def by_hand(batches: Callable[[], Batches], teacher: nn.Module | None = None) -> Callable[[], None]:
    """Return one block of the loop that one writes by hand."""
    module = resnet(1).train()
    optimizer = torch.optim.SGD(module.parameters(), 0.001, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def block() -> None:
        for images, labels in batches():
            logits = module(images)
            loss = functional.cross_entropy(logits, labels)
            if teacher is not None:
                with torch.no_grad():
                    wanted = teacher(images)
                soft = functional.kl_div(functional.log_softmax(logits / 4, 1), functional.softmax(wanted / 4, 1), reduction="batchmean")
                loss = 0.1 * loss + 0.9 * 16 * soft
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own
            optimizer.step()
            loss.item()

    return block


def in_torchdistill(batches: Callable[[], Batches], teacher: nn.Module) -> Callable[[], None]:
    """Return one block of torchdistill's loop, as its examples have it."""
    from torchdistill.common.constant import def_logger
    from torchdistill.core.distillation import DistillationBox

    def_logger.setLevel("ERROR")
    answer = {"module_path": ".", "io": "output"}
    of_both = {f"{role}_module_{name.removeprefix('module_')}": value for role in ("student", "teacher") for name, value in answer.items()}
    loss = {"key": "KDLoss", "kwargs": {**of_both, "temperature": 4.0, "alpha": 0.1}}
    config = {
        "num_epochs": 1,
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.001, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": loss, "weight": 1.0}}}},
    }
    box = DistillationBox(teacher, resnet(1), {}, config, torch.device("cpu"), [], distributed=False, lr_factor=1)

    def block() -> None:
        box.pre_epoch_process(epoch=0)
        for images, labels in batches():
            loss = box.forward_process(images, targets=labels, supp_dict={})
            box.post_forward_process(loss)
            loss.item()

    return block


def together(block: Callable[[], None]) -> Callable[[], None]:
    """Return a block that all ranks run; those that are not the first run it as often as the first asks, and end the program."""
    if distributed.rank():
        for _ in distributed.receive():
            distributed.barrier()
            block()
        sys.exit(0)

    def asked() -> None:
        distributed.broadcast("a block")
        block()

    return asked if distributed.world_size() > 1 else block


def main() -> int:
    """Run the rounds and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    torch.set_num_threads(cores := runner.facts()["cores"])  # torchrun leaves one
    torch.manual_seed(0)
    count = STEPS * BATCH
    images, labels = torch.randn(count, 3, 32, 32), torch.randint(0, 10, (count,))
    loader = DataLoader(Pictures(count), BATCH, shuffle=True)

    def in_memory() -> Batches:
        return ((images[rows], labels[rows]) for rows in torch.split(torch.randperm(count), BATCH))

    samples = Samples((images,), labels, torch.randn(count, 10))
    has_bfloat16 = bool(execution.BFLOAT16_FEATURES & set(runner.facts()["features"]))
    open_ways = [execution.DEFAULT, *([execution.ExecutionMode(execution.BFLOAT16)] if has_bfloat16 else [])]
    threads = max(1, cores // distributed.world_size())
    loops = {mode: ours(lambda: resnet(1), samples, distillation, "sgd", mode=mode, threads=threads) for mode in open_ways}
    mode = open_ways[distributed.broadcast_number(open_ways.index(autotune.fastest(autotune.time_interleaved(loops))))]
    blocks = {
        "distil": together(loops[mode]),
        "alone": by_hand(in_memory),
        "loader": by_hand(lambda: iter(loader)),
        "online": by_hand(in_memory, resnet(9).eval()),
    }
    if find_spec("torchdistill") is None:
        print("torchdistill is not installed, and not compared")
    else:
        blocks["torchdistill"] = in_torchdistill(in_memory, resnet(9).eval())
    print(
        f"distil in {mode} (the processor has {'' if has_bfloat16 else 'no '}instructions for bfloat16), in {distributed.world_size()} process(es)"
    )
    bars = {name: bar for name, bar in BARS.items() if name in blocks} | ({"alone": BAR_BFLOAT16} if has_bfloat16 else {})
    missed = compared(blocks, count, rounds, bars)
    if distributed.world_size() > 1:
        distributed.broadcast(None)
    return missed


if __name__ == "__main__":
    sys.exit(main())
