# SPDX-License-Identifier: Apache-2.0
"""The files in a cache, for tests that compare builds byte by byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgekd.store.cache import Cache


def cached_files(cache: Cache) -> dict[tuple[str, str], dict[str, str]]:
    """Return the digest of every file that a stage wrote, by stage, key and name."""
    return {
        (entry.material["stage"], key): {name: item.digest for name, item in entry.artifacts.items()}
        for key, entry, *_ in cache.entries()
        if entry is not None
    }
