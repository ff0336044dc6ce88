# SPDX-License-Identifier: Apache-2.0
"""The report as one mapping (``report.json``, described by ``report.schema.json``): what every other form is made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.domain.verdict import Outcome
from edgekd.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgekd.domain.verdict import Check, Verdict

SCHEMA = 1
DESCRIPTION = Path(__file__).with_name("report.schema.json")


def check_row(check: Check) -> dict[str, Any]:
    """Return one check as a mapping."""
    return {
        "name": check.name,
        "outcome": check.outcome.value,
        "value": check.value,
        "interval": None if check.interval is None else [check.interval.low, check.interval.high],
        "limit": check.limit,
        "unit": check.unit,
        "reason": check.reason,
        "advice": check.advice,
    }


def with_verdict(parts: Mapping[str, Any], verdict: Verdict) -> dict[str, Any]:
    """Return the whole document: the parts that the build gathered, and the verdict."""
    return {"schema": SCHEMA, "outcome": verdict.outcome.value, "checks": [check_row(check) for check in verdict.checks], **parts}


def read(folder: Path) -> dict[str, Any]:
    """Return the document of an earlier build, by its folder or by its file.

    Raises:
        UsageError: if there is none in the folder, or not a whole one, or if the model that it says ships is gone.
    """
    path = folder / "report.json" if folder.is_dir() else folder
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; expected the folder of a target, as in: edgekd report build/host") from None
    except ValueError:
        raise UsageError(f"{path}: is no JSON; build again") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise UsageError(f"{path}: is no report of schema {SCHEMA}; build again")
    missing = sorted(set(json.loads(DESCRIPTION.read_bytes())["required"]) - set(found))
    if missing:
        raise UsageError(f"{path}: is no whole report: {', '.join(missing)} missing; build again")
    if folder.is_dir() and found["shipped"] is not None and not (folder / str(found["shipped"])).is_file():
        raise UsageError(f"{path}: says that {found['shipped']} ships, which is not there; build again")
    return found


def exit_code(document: Mapping[str, Any]) -> int:
    """Return the exit code of a document's verdict."""
    return Outcome(document["outcome"]).exit_code
