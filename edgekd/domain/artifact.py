# SPDX-License-Identifier: Apache-2.0
"""Artifacts: immutable files with a digest, and the cache entries that hold them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003  (a field's type)
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"


@dataclass(frozen=True, slots=True)
class Artifact:
    """One file that a step wrote; ``digest`` is the SHA-256 of its bytes in hex."""

    path: Path
    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """A stored step. ``material`` is what its key is the digest of; ``seconds`` is how long the stage ran."""

    key: str
    material: Mapping[str, Any]
    artifacts: Mapping[str, Artifact]
    metrics: Mapping[str, Json]
    notes: tuple[str, ...]
    seconds: float
