# SPDX-License-Identifier: Apache-2.0
"""Reproducibility: fixed seeds, threads and algorithms, and partial work that survives a kill."""

from __future__ import annotations

import hashlib
import os
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgekd.store.digests import write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_DIGEST_BYTES = 32


def derive_seed(*parts: object) -> int:
    """Return a seed below 2^32 that is a hash of all parts, so that each purpose has its own and they are unrelated."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big")


def seed_all(seed: int) -> None:
    """Seed every generator that the user's code may draw from: torch's, numpy's and Python's."""
    import numpy as np
    import torch

    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (the user's code may use the old global generator)
    random.seed(seed)


@contextmanager
def deterministic(threads: int, device: str = "cpu") -> Iterator[None]:
    """Fix all that changes torch's results on one CPU; afterwards restore everything, the generators too.

    On an accelerator (``device``, as torch names it), operators without a deterministic kernel still run, with torch's warning.
    """
    import numpy as np
    import torch
    from torch.utils import deterministic

    old_threads = torch.get_num_threads()
    was_deterministic, was_warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    was_filling = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]  # set through a module class
    was_tf32 = torch.backends.cudnn.allow_tf32
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002  (user code uses the global generator)
    try:
        torch.set_num_threads(threads)
        if device != "cpu":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
        torch.use_deterministic_algorithms(mode=True, warn_only=device != "cpu")
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32
        deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs 7 % of a step and changes no result
        yield
    finally:
        torch.set_num_threads(old_threads)
        torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warn_only)
        torch.backends.cudnn.allow_tf32 = was_tf32
        deterministic.fill_uninitialized_memory = was_filling  # type: ignore[attr-defined]
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002  (the same)
        random.setstate(states[2])


def save_verified(path: Path, content: bytes) -> None:
    """Write partial work atomically, with a digest by which :func:`load_verified` finds out whether it is undamaged."""
    write_atomically(path, hashlib.sha256(content).digest() + content)


def load_verified(path: Path) -> bytes | None:
    """Return partial work, or None if there is none or it is damaged."""
    try:
        packed = path.read_bytes()
    except FileNotFoundError:
        return None
    digest, content = packed[:_DIGEST_BYTES], packed[_DIGEST_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else None
