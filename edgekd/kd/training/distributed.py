# SPDX-License-Identifier: Apache-2.0
"""The processes that torchrun starts for one build, its ranks: the first one builds, and all of them train.

A batch is the recipe's, however many they are: each rank runs its share of the samples through its own copy of the student,
all get everybody's logits, so that every loss is that of the whole batch, and the gradients are summed. With one rank, which
is the usual case, nothing here does anything, and no process group is made.

Source:
    Li et al., arXiv 2006.15704 (data parallelism in torch.distributed); docs/decisions/0008-ranks.md.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor, nn

TIMEOUT = timedelta(days=30)  # the others wait while the first exports and measures


def world_size() -> int:
    """Return how many ranks there are: 1 unless torchrun started this process."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """Return this process's rank, from 0."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def world(threads: int | None, cores: int) -> dict[str, int]:
    """Return the parameters of a step that say who runs it: threads (each rank's part of the cores, if none are given), and the ranks."""
    here = int(os.environ["LOCAL_WORLD_SIZE"]) if world_size() > 1 else 1
    return {"threads": threads or max(1, cores // here), **({"ranks": world_size()} if world_size() > 1 else {})}


def broadcast(work: object) -> None:
    """Tell the other ranks what to do next (None: nothing more), and wait until each has taken it up."""
    _group().broadcast_object_list([work], src=0)
    if work is not None:
        barrier()


def receive() -> Iterator[Any]:
    """Yield what the first rank orders, until there is nothing more."""
    while True:
        told: list[Any] = [None]
        _group().broadcast_object_list(told, src=0)
        if told[0] is None:
            return
        yield told[0]


def barrier() -> None:
    """Wait for all ranks."""
    _group().barrier()


def broadcast_number(number: int) -> int:
    """Return the first rank's number."""
    if world_size() == 1:
        return number
    told = [number]
    _group().broadcast_object_list(told, src=0)
    return told[0]


def shard(total: int, of_rank: int | None = None) -> slice:
    """Return a rank's part of so many (this one's by default): in order, and as equal as they can be."""
    index = rank() if of_rank is None else of_rank
    return slice(index * total // world_size(), (index + 1) * total // world_size())


def shard_sizes(total: int) -> list[int]:
    """Return how many of a total each rank has by ``share``."""
    cuts = [shard(total, index) for index in range(world_size())]
    return [cut.stop - cut.start for cut in cuts]


def all_gather(part: Tensor, rows: Sequence[int]) -> Tensor:
    """Return the rows of all ranks, in order; gradients flow into this rank's own. ``rows`` are how many each has."""
    if world_size() == 1:
        return part
    import torch

    padded = part.new_zeros((max(rows), *part.shape[1:]))  # a gather wants equal shapes
    padded[: len(part)] = part.detach()
    found = [torch.empty_like(padded) for _ in rows]
    _group().all_gather(found, padded)
    parts = [one[:size] for one, size in zip(found, rows, strict=True)]
    parts[rank()] = part
    return torch.cat(parts)


def all_reduce(value: float) -> float:
    """Return the sum of all ranks' values."""
    if world_size() == 1:
        return value
    import torch

    found = torch.tensor(value, dtype=torch.float64)
    _group().all_reduce(found)
    return float(found)


def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Make each gradient the sum of all ranks'. A parameter that has none has none anywhere: all ranks run the same code."""
    if world_size() > 1:
        _reduce([parameter.grad for parameter in parameters if parameter.grad is not None])


def average_buffers(modules: Iterable[nn.Module]) -> None:
    """Make the modules' buffers (running statistics) the mean of all ranks', so that they are one student again."""
    if world_size() == 1:
        return
    buffers = [buffer for module in modules for buffer in module.buffers() if buffer.is_floating_point()]
    _reduce(buffers)
    for buffer in buffers:
        buffer.div_(world_size())


def batch_norm_warning(build: Callable[[], nn.Module], batch_size: int) -> str | None:
    """Return a warning if several ranks train a module, which ``build`` makes, that has batch norm."""
    if world_size() == 1:
        return None
    from torch.nn.modules.batchnorm import _BatchNorm

    if not any(isinstance(layer, _BatchNorm) for layer in build().modules()):
        return None
    return (
        f"warning: {world_size()} ranks train a module with batch norm: its statistics are those of about {batch_size // world_size()} of the "
        f"{batch_size} samples of a batch, so the weights differ from those of one process; benchmarks/ranks.py shows by how much"
    )


def _reduce(tensors: Sequence[Tensor]) -> None:
    """Sum tensors over all ranks, in one message."""
    import torch

    if not tensors:
        return
    with torch.no_grad():
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        _group().all_reduce(flat)
        for tensor, reduced in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(reduced.view(tensor.shape))


def _group() -> Any:
    """Return torch.distributed, joined."""
    import torch.distributed

    if not torch.distributed.is_initialized():
        backends = "gloo"
        if torch.cuda.is_available():  # one of them for each rank
            backends = "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.distributed.init_process_group(backends, timeout=TIMEOUT)
    return torch.distributed
