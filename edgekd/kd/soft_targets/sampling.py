# SPDX-License-Identifier: Apache-2.0
"""Make the records of a sampled file of soft targets from logits; ``edgekd.kd.soft_targets.storage`` explains their content."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgekd.kd.reproducible import derive_seed

if TYPE_CHECKING:
    import numpy as np


FLOOR = -1e4  # the log-probability of a class with probability 0; exact in float16
_BLOCK = 4096  # rows that draw from one generator
_MAX_VALUES = 2**17  # in a temporary array while records are made


def sample_records(logits: np.ndarray, dtype: np.dtype[Any], split: str, view: int, first: int) -> np.ndarray:
    """Return the records of logits (m, C), the first of which is that of row ``first``.

    The draws of a row depend on split, view and row alone, not on the chunk in which its logits come.
    """
    import numpy as np

    blocks = range(first // _BLOCK, (first + len(logits)) // _BLOCK + 1)
    seeds = [derive_seed("soft_targets", split, view, block) for block in blocks]
    random_integers = np.concatenate([np.random.default_rng(seed).integers(2**32, size=_BLOCK) for seed in seeds])
    offsets = (random_integers[first % _BLOCK :] + 0.5) / 2**32  # neither 0 nor 1
    records = np.empty(len(logits), dtype=dtype)
    size = max(1, _MAX_VALUES // logits.shape[1])
    for start in range(0, len(logits), size):
        rows = slice(start, min(start + size, len(logits)))
        _fill(records[rows], logits[rows], offsets[rows])
    return records


def _fill(records: np.ndarray, logits: np.ndarray, offsets: np.ndarray) -> None:
    """Fill records (m,) from logits (m, C) and the position of the first draw on the cumulative sum: offsets (m,), between 0 and 1."""
    import numpy as np

    slots = records["ids"].shape[1]
    top = np.argpartition(logits, logits.shape[1] - slots, axis=1)[:, -slots:]
    top.sort(axis=1)  # of equal logits the lower class first
    order = np.argsort(-np.take_along_axis(logits, top, axis=1), axis=1, kind="stable")
    top = np.take_along_axis(top, order, axis=1)
    scaled = logits.astype(np.float64)
    scaled -= np.take_along_axis(scaled, top[:, :1], axis=1)
    mass = np.exp(scaled)  # unnormalized probabilities; below, only of the classes that may be drawn
    total = mass.sum(axis=1, keepdims=True)
    largest = np.take_along_axis(mass, top, axis=1)
    np.put_along_axis(mass, top, 0.0, axis=1)
    # the mass that the first k entries leave, for each k; summed from the small end, as 1 - (nearly 1) would lose digits
    remaining = mass.sum(axis=1, keepdims=True) + largest[:, ::-1].cumsum(axis=1)[:, ::-1]
    is_small = largest * (slots - np.arange(slots)) < remaining * (1 - 1e-9)  # smaller than the weight of a draw would be
    is_small[:, : slots // 2] = False
    exact = np.where(is_small.any(axis=1), is_small.argmax(axis=1), slots)[:, None]
    is_drawn = np.arange(slots) >= exact
    np.put_along_axis(mass, top, np.where(is_drawn, largest, 0.0), axis=1)
    cumulative = mass.cumsum(axis=1)
    drawn_mass = np.where(exact < slots, cumulative[:, -1:], 1.0)
    steps = np.floor(cumulative / drawn_mass * (slots - exact) + (1 - offsets[:, None]))
    top[is_drawn] = np.nonzero(np.diff(steps, axis=1, prepend=0.0) > 0)[1]  # as many in each row as it has draws
    records["exact"], records["ids"] = exact[:, 0], top
    records["share"] = np.log(drawn_mass / np.maximum(slots - exact, 1) / total)[:, 0]
    records["logs"] = np.maximum(np.take_along_axis(scaled, top, axis=1) - np.log(total), FLOOR)
