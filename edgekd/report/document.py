# SPDX-License-Identifier: Apache-2.0
"""The report as one mapping (``report.json``, described by ``report.schema.json``), from which every other format is rendered."""

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
SCHEMA_FILE = Path(__file__).with_name("report.schema.json")


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
    """Return the whole report: the parts that the build collected, and the verdict."""
    return {"schema": SCHEMA, "outcome": verdict.outcome.value, "checks": [check_row(check) for check in verdict.checks], **parts}


def read(folder: Path) -> dict[str, Any]:
    """Return the report of an earlier build, by its folder or by its file.

    Raises:
        UsageError: if there is no report, if it is incomplete, or if the model that it says ships is missing.
    """
    path = folder / "report.json" if folder.is_dir() else folder
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; expected the folder of a target, as in: edgekd report build/host") from None
    except ValueError:
        raise UsageError(f"{path}: is not valid JSON; build again") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise UsageError(f"{path}: is not a report of schema {SCHEMA}; build again")
    missing = sorted(set(json.loads(SCHEMA_FILE.read_bytes())["required"]) - set(document))
    if missing:
        raise UsageError(f"{path}: is not a complete report: {', '.join(missing)} missing; build again")
    if folder.is_dir() and document["shipped"] is not None and not (folder / str(document["shipped"])).is_file():
        raise UsageError(f"{path}: says that {document['shipped']} ships, but that file is missing; build again")
    return document


def exit_code(document: Mapping[str, Any], *, inconclusive_ok: bool = False) -> int:
    """Return the exit code of a report's outcome; 0 for INCONCLUSIVE if that is allowed."""
    outcome = Outcome(document["outcome"])
    return 0 if outcome is Outcome.INCONCLUSIVE and inconclusive_ok else outcome.exit_code
