# SPDX-License-Identifier: Apache-2.0
"""Records of a sampled file of answers, made from logits; ``kd.answers`` says what they hold and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgekd.kd.reproducible import derive_seed

if TYPE_CHECKING:
    import numpy as np


FLOOR = -1e4  # a log-probability of nothing; a float16 holds it as it is
_BLOCK = 4096  # rows that draw from one generator
_WORK = 2**17  # numbers a temporary array holds while a chunk is packed


def sample_records(logits: np.ndarray, dtype: np.dtype[Any], split: str, view: int, first: int) -> np.ndarray:
    """Return the records of answers. A row's draws depend on split, view and row, not on the chunk that it comes in."""
    import numpy as np

    blocks = range(first // _BLOCK, (first + len(logits)) // _BLOCK + 1)
    seeds = [derive_seed("answers", split, view, block) for block in blocks]
    whole = np.concatenate([np.random.default_rng(seed).integers(2**32, size=_BLOCK) for seed in seeds])
    starts = (whole[first % _BLOCK :] + 0.5) / 2**32  # neither 0 nor 1
    made = np.empty(len(logits), dtype=dtype)
    size = max(1, _WORK // logits.shape[1])
    for start in range(0, len(logits), size):
        cut = slice(start, min(start + size, len(logits)))
        _fill(made[cut], logits[cut], starts[cut])
    return made


def _fill(sample_records: np.ndarray, logits: np.ndarray, starts: np.ndarray) -> None:
    """Fill records (m,) from logits (m, C) and where the first draw is on the cumulative sum: starts (m,), between 0 and 1."""
    import numpy as np

    slots = sample_records["ids"].shape[1]
    top = np.argpartition(logits, logits.shape[1] - slots, axis=1)[:, -slots:]
    top.sort(axis=1)  # of equal ones the lower class first
    order = np.argsort(-np.take_along_axis(logits, top, axis=1), axis=1, kind="stable")
    top = np.take_along_axis(top, order, axis=1)
    scaled = logits.astype(np.float64)
    scaled -= np.take_along_axis(scaled, top[:, :1], axis=1)
    rest = np.exp(scaled)
    total = rest.sum(axis=1, keepdims=True)
    largest = np.take_along_axis(rest, top, axis=1)
    np.put_along_axis(rest, top, 0.0, axis=1)
    # what the first m entries leave over; summed from the small end, so that a little is not lost in 1 - much
    left = rest.sum(axis=1, keepdims=True) + largest[:, ::-1].cumsum(axis=1)[:, ::-1]
    small = largest * (slots - np.arange(slots)) < left * (1 - 1e-9)  # smaller than the weight of a draw would be
    small[:, : slots // 2] = False
    exact = np.where(small.any(axis=1), small.argmax(axis=1), slots)[:, None]
    drawn = np.arange(slots) >= exact
    np.put_along_axis(rest, top, np.where(drawn, largest, 0.0), axis=1)
    summed = rest.cumsum(axis=1)
    whole = np.where(exact < slots, summed[:, -1:], 1.0)
    steps = np.floor(summed / whole * (slots - exact) + (1 - starts[:, None]))
    top[drawn] = np.nonzero(np.diff(steps, axis=1, prepend=0.0) > 0)[1]  # as many in each row as it has draws
    sample_records["exact"], sample_records["ids"] = exact[:, 0], top
    sample_records["share"] = np.log(whole / np.maximum(slots - exact, 1) / total)[:, 0]
    sample_records["logs"] = np.maximum(np.take_along_axis(scaled, top, axis=1) - np.log(total), FLOOR)
