# SPDX-License-Identifier: Apache-2.0
"""What becomes of a step of a runtime that is refused, fails or dies: its candidates are left out, and the build goes on.

Reasons: docs/decisions/0014-left-out-candidates.md.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from edgekd.errors import StageError, StorageError
from edgekd.plan import dry_run_of
from edgekd.ports import StageResult

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgekd.ports import CompletedStep, Step

REFUSAL = "why_not.txt"


def may_be_left_out(step: Step[Any], error: StageError) -> bool:
    """Return whether the build can go on without a step: it writes or runs a file of one runtime, and the disk is not the reason."""
    return getattr(step.params, "runtime", None) is not None and not isinstance(error, StorageError)


def refusal(step: Step[Any], error: StageError, out: Path) -> StageResult:
    """Return the result of a step that failed, with the reason as its metric ``why_not``, and write that as the step's only file."""
    reason = str(error).removeprefix(f"{step.id}: ")
    shutil.rmtree(out)
    out.mkdir()
    (out / REFUSAL).write_text(f"{reason}\n", encoding="utf-8")
    return StageResult({"why_not": reason})


def why_skipped(step: Step[Any], completed: Mapping[str, CompletedStep], skipped: Mapping[str, str]) -> str | None:
    """Return why a step cannot run, or None: its dry run failed, or a step whose files it reads failed or was skipped."""
    for name in (dry_run_of(step.id), *sorted(step.producers)):
        if name in skipped:
            return skipped[name]
        if name in completed and completed[name].why_not is not None:
            return f"{name}: {completed[name].why_not}"
    return None
