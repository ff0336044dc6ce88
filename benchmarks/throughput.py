# SPDX-License-Identifier: Apache-2.0
"""Training speed: distillation with stored teacher logits in edgekd, against the usual training loops.

A ResNet-8 student (layout of He et al., 77,850 parameters), 32x32 colour images, batches of 128. Blocks are interleaved in one process:
``edgekd`` is edgekd's loop with KL and CE; ``pytorch`` a hand-written PyTorch loop without a teacher, data in memory; ``dataloader`` the
same with a DataLoader that crops and flips with PIL; ``online_teacher`` a hand-written distillation loop that runs a ResNet-56 teacher on
each batch; ``torchdistill`` the same in its DistillationBox, if it is installed. If the CPU has bfloat16 instructions, edgekd's loop runs
in the precision that autotune chooses, as in a build. Prints the median ratio of neighbouring blocks with its interval. Exits with 1 if
one is below its bar.

Under torchrun, edgekd's loop runs in all processes with one thread each, and the other loops in one process with as many threads.

    python benchmarks/throughput.py [rounds]
    torchrun --nproc-per-node 2 benchmarks/throughput.py [rounds]
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import torch
from distill_step import compare, distillation_loss, edgekd_block
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
BARS = {"pytorch": 1.2, "dataloader": 2.0, "online_teacher": 5.0, "torchdistill": 5.0}
BAR_BFLOAT16 = 1.5  # of pytorch, if the CPU has bfloat16 instructions


class Block(nn.Module):
    """A residual block: two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential() if stride == 1 and inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Shapes: images (n, inputs, h, w); result (n, outputs, h / stride, w / stride)."""
        hidden = torch.relu(self.norm1(self.first(images)))
        return torch.relu(self.norm2(self.second(hidden)) + self.shortcut(images))


def resnet(blocks: int) -> nn.Module:
    """Return a ResNet of ``6 * blocks + 2`` layers for images of 32x32 pixels (arXiv 1512.03385, section 4.2)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    width = 16
    for outputs in (16, 32, 64):
        for number in range(blocks):
            layers.append(Block(width, outputs, 2 if number == 0 and outputs != width else 1))
            width = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class AugmentedImages(Dataset[tuple[Tensor, int]]):
    """Random images that PIL crops and flips, one by one."""

    def __init__(self, count: int) -> None:
        generator = np.random.default_rng(0)
        self.images = [Image.fromarray(item) for item in generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)]
        self.labels = generator.integers(0, 10, count).tolist()
        self.generator = generator

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        """Return one image, (3, 32, 32), and its label."""
        image = Image.new("RGB", (32 + 2 * PADDING,) * 2)
        image.paste(self.images[row], (PADDING, PADDING))
        left, top = self.generator.integers(0, 2 * PADDING + 1, 2)
        image = image.crop((left, top, left + 32, top + 32))
        if self.generator.random() < 0.5:  # noqa: PLR2004  (heads or tails)
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return (pixels - 0.5) / 0.25, self.labels[row]


def pytorch_block(batches: Callable[[], Batches], teacher: nn.Module | None = None) -> Callable[[], None]:
    """Return one block of a hand-written PyTorch loop, with distillation if there is a teacher."""
    module = resnet(1).train()
    optimizer = torch.optim.SGD(module.parameters(), 0.001, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def block() -> None:
        for images, labels in batches():
            logits = module(images)
            loss = functional.cross_entropy(logits, labels)
            if teacher is not None:
                with torch.no_grad():
                    targets = functional.softmax(teacher(images) / 4, 1)
                divergence = functional.kl_div(functional.log_softmax(logits / 4, 1), targets, reduction="batchmean")
                loss = 0.1 * loss + 0.9 * 16 * divergence
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own
            optimizer.step()
            loss.item()

    return block


def torchdistill_block(batches: Callable[[], Batches], teacher: nn.Module) -> Callable[[], None]:
    """Return one block of torchdistill's loop, as in its examples."""
    from torchdistill.common.constant import def_logger
    from torchdistill.core.distillation import DistillationBox

    def_logger.setLevel("ERROR")
    outputs = {f"{role}_module_{key}": value for role in ("student", "teacher") for key, value in (("path", "."), ("io", "output"))}
    loss = {"key": "KDLoss", "kwargs": {**outputs, "temperature": 4.0, "alpha": 0.1}}
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


def on_all_ranks(block: Callable[[], None]) -> Callable[[], None]:
    """Return a block that all ranks run. Other ranks than the first run it whenever the first does, and then exit."""
    if distributed.rank():
        for _ in distributed.receive():
            distributed.barrier()
            block()
        sys.exit(0)

    def broadcast_and_run() -> None:
        distributed.broadcast("a block")
        block()

    return broadcast_and_run if distributed.world_size() > 1 else block


def main() -> int:
    """Time the loops and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    torch.set_num_threads(cores := runner.facts()["cores"])  # torchrun sets it to one
    torch.manual_seed(0)
    count = STEPS * BATCH
    images, labels = torch.randn(count, 3, 32, 32), torch.randint(0, 10, (count,))
    loader = DataLoader(AugmentedImages(count), BATCH, shuffle=True)

    def in_memory() -> Batches:
        return ((images[rows], labels[rows]) for rows in torch.split(torch.randperm(count), BATCH))

    samples = Samples((images,), labels, torch.randn(count, 10))
    has_bfloat16 = bool(execution.BFLOAT16_FEATURES & set(runner.facts()["features"]))
    modes = [execution.DEFAULT_MODE, *([execution.ExecutionMode(execution.BFLOAT16)] if has_bfloat16 else [])]
    threads = max(1, cores // distributed.world_size())
    loops = {mode: edgekd_block(lambda: resnet(1), samples, distillation_loss, "sgd", mode=mode, threads=threads) for mode in modes}
    mode = modes[distributed.broadcast_number(modes.index(autotune.fastest(autotune.time_interleaved(loops))))]
    blocks = {
        "edgekd": on_all_ranks(loops[mode]),
        "pytorch": pytorch_block(in_memory),
        "dataloader": pytorch_block(lambda: iter(loader)),
        "online_teacher": pytorch_block(in_memory, resnet(9).eval()),
    }
    if find_spec("torchdistill") is None:
        print("torchdistill is not installed, so it is not compared")
    else:
        blocks["torchdistill"] = torchdistill_block(in_memory, resnet(9).eval())
    bfloat16 = f"the CPU has {'' if has_bfloat16 else 'no '}bfloat16 instructions"
    print(f"edgekd in {mode} ({bfloat16}), in {distributed.world_size()} process(es)")
    bars = {name: bar for name, bar in BARS.items() if name in blocks} | ({"pytorch": BAR_BFLOAT16} if has_bfloat16 else {})
    is_slow = compare(blocks, count, rounds, bars)
    if distributed.world_size() > 1:
        distributed.broadcast(None)
    return is_slow


if __name__ == "__main__":
    sys.exit(main())
