# SPDX-License-Identifier: Apache-2.0
"""The processes that torchrun starts for one build, its ranks: the first one builds, and all of them train.

A batch is the recipe's, however many they are: each rank runs its share of the samples through its own copy of the student,
all get everybody's logits, so that every loss is that of the whole batch, and the gradients are summed. With one rank, which
is the usual case, nothing here does anything, and no process group is made.

Source:
    Li et al., arXiv 2006.15704 (data parallelism in torch.distributed); docs/decisions/0008-distributed.md.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from edgekd.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor, nn

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
TIMEOUT = timedelta(days=30)  # the other ranks wait while rank 0 exports and measures


def check_environment() -> None:
    """Check the variables that torchrun sets.

    Raises:
        UsageError: if some of them are missing or have no valid value.
    """
    if not any(name.startswith("TORCHELASTIC_") for name in os.environ):
        return
    names = ("TORCHELASTIC_RUN_ID", *NUMBERS, "MASTER_ADDR", "MASTER_PORT")
    problems = [f"{name} is missing" for name in names if name not in os.environ]
    values = {name: os.environ[name] for name in (*NUMBERS, "MASTER_PORT") if name in os.environ}
    problems += [f"{name} is {value!r}, not a whole number" for name, value in values.items() if not value.isascii() or not value.isdigit()]
    if not problems:
        for number, total in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("LOCAL_WORLD_SIZE", "WORLD_SIZE")):
            if int(values[number]) >= int(values[total]) + (number == "LOCAL_WORLD_SIZE"):
                problems.append(f"{number} is {values[number]} and {total} is {values[total]}")
    if problems:
        raise UsageError(
            f"torchrun: variables that begin with TORCHELASTIC_ are set, but {', '.join(problems)}; "
            "start edgekd with torchrun, which sets all of them, or unset these variables"
        )


def world_size() -> int:
    """Return the number of ranks: 1 unless torchrun started this process."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """Return this process's rank, from 0."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def world(threads: int | None, cores: int) -> dict[str, int]:
    """Return the threads of each rank (its part of the cores, if the recipe gives none) and the number of ranks."""
    local_ranks = int(os.environ["LOCAL_WORLD_SIZE"]) if world_size() > 1 else 1
    return {"threads": threads or max(1, cores // local_ranks), "ranks": world_size()}


def broadcast(work: object) -> None:
    """Send the other ranks their next work (None: no more), and wait until each has received it."""
    _group().broadcast_object_list([work], src=0)
    if work is not None:
        barrier()


def receive() -> Iterator[Any]:
    """Yield the work that rank 0 sends, until there is no more."""
    while True:
        work: list[Any] = [None]
        _group().broadcast_object_list(work, src=0)
        if work[0] is None:
            return
        yield work[0]


def barrier() -> None:
    """Wait for all ranks."""
    _group().barrier()


def broadcast_number(number: int) -> int:
    """Return the number that rank 0 has."""
    if world_size() == 1:
        return number
    numbers = [number]
    _group().broadcast_object_list(numbers, src=0)
    return numbers[0]


def shard(total: int, of_rank: int | None = None) -> slice:
    """Return the range of samples of a rank (this one by default): in order, and as equal as possible."""
    index = rank() if of_rank is None else of_rank
    return slice(index * total // world_size(), (index + 1) * total // world_size())


def shard_sizes(total: int) -> list[int]:
    """Return how many samples each rank has by :func:`shard`."""
    shards = [shard(total, index) for index in range(world_size())]
    return [rows.stop - rows.start for rows in shards]


def all_gather(part: Tensor, rows: Sequence[int]) -> Tensor:
    """Return the rows of all ranks, in order; gradients flow into this rank's rows. ``rows``: how many each rank has."""
    if world_size() == 1:
        return part
    import torch

    padded = part.new_zeros((max(rows), *part.shape[1:]))  # a gather needs equal shapes
    padded[: len(part)] = part.detach()
    gathered = [torch.empty_like(padded) for _ in rows]
    _group().all_gather(gathered, padded)
    parts = [tensor[:size] for tensor, size in zip(gathered, rows, strict=True)]
    parts[rank()] = part
    return torch.cat(parts)


def all_reduce(value: float) -> float:
    """Return the sum of the values of all ranks."""
    if world_size() == 1:
        return value
    import torch

    total = torch.tensor(value, dtype=torch.float64)
    _group().all_reduce(total)
    return float(total)


def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by the sum over all ranks. A parameter without one has none in any rank: all run the same code."""
    if world_size() > 1:
        _reduce([parameter.grad for parameter in parameters if parameter.grad is not None])


def average_buffers(modules: Iterable[nn.Module]) -> None:
    """Replace the buffers of the modules (running statistics) by their mean over all ranks, so that all have one student again."""
    if world_size() == 1:
        return
    buffers = [buffer for module in modules for buffer in module.buffers() if buffer.is_floating_point()]
    _reduce(buffers)
    for buffer in buffers:
        buffer.div_(world_size())


def batch_norm_warning(build: Callable[[], nn.Module], batch_size: int) -> str | None:
    """Return a warning if several ranks train a module with batch norm; ``build`` makes the module."""
    if world_size() == 1:
        return None
    from torch.nn.modules.batchnorm import _BatchNorm

    if not any(isinstance(layer, _BatchNorm) for layer in build().modules()):
        return None
    return (
        f"warning: {world_size()} ranks train a module with batch norm: its statistics are those of about "
        f"{batch_size // world_size()} of the {batch_size} samples of a batch, so the weights differ from those of one process; "
        "benchmarks/distributed.py measures by how much"
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
    """Return torch.distributed with its process group."""
    import torch.distributed

    if not torch.distributed.is_initialized():
        backends = "gloo"
        if torch.cuda.is_available():  # one GPU for each rank
            backends = "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.distributed.init_process_group(backends, timeout=TIMEOUT)
    return torch.distributed
