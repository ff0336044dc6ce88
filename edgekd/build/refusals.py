# SPDX-License-Identifier: Apache-2.0
"""What becomes of a step of a runtime that is refused, fails or dies: its candidates are left out, and the build goes on.

Reasons: docs/decisions/0014-left-out-candidates.md.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from edgekd.domain.artifact import CacheEntry
from edgekd.errors import printable
from edgekd.plan import dry_run_of, is_dry_run
from edgekd.ports import StageResult
from edgekd.store.digests import digest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgekd.errors import StageError
    from edgekd.ports import CompletedStep, Step

REFUSAL = "why_not.txt"
# So long may converters, quantizers and runtimes report nothing. The largest model that is known to pass needs minutes.
MAX_SILENCE_S = 3600.0
DRY_RUN_MAX_SILENCE_S = 600.0


def is_of_a_runtime(step: Step[Any]) -> bool:
    """Return whether a step writes or runs a file of one runtime: the build can go on without it."""
    return getattr(step.params, "runtime", None) is not None


def max_silence_s(step: Step[Any]) -> float | None:
    """Return how many seconds a step may report nothing; None for no limit."""
    if not is_of_a_runtime(step):
        return None
    return DRY_RUN_MAX_SILENCE_S if is_dry_run(step.id) else MAX_SILENCE_S


def refusal(step: Step[Any], error: StageError, out: Path) -> StageResult:
    """Return the result of a step that failed, with the reason as its metric ``why_not``, and write that as the step's only file."""
    reason = printable(str(error).removeprefix(f"{step.id}: "))
    for path in out.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    (out / REFUSAL).write_text(f"{reason}\n", encoding="utf-8")
    return StageResult({"why_not": reason})


def unstored(base: str, material: Mapping[str, Any], result: StageResult) -> CacheEntry:
    """Return the entry of a step that failed for lack of memory or time: it is not stored, so the next build tries it again."""
    return CacheEntry(digest([base, result.metrics]), material, {}, result.metrics, result.notes, 0.0)


def why_skipped(step: Step[Any], completed: Mapping[str, CompletedStep], skipped: Mapping[str, str]) -> str | None:
    """Return why a step cannot run, or None: its dry run failed, or a step whose files it reads failed or was skipped."""
    for name in (dry_run_of(step.id), *sorted(step.producers)):
        if name in skipped:
            return skipped[name]
        if name in completed and completed[name].why_not is not None:
            return f"{name}: {completed[name].why_not}"
    return None
