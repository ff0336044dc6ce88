# SPDX-License-Identifier: Apache-2.0
"""The report as one mapping (``report.json``, described by ``report.schema.json``), from which every other format is rendered."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgekd.domain.units import ns_to_ms
from edgekd.domain.verdict import Outcome
from edgekd.errors import MAX_CHARACTERS, UsageError, printable
from edgekd.report import schema
from edgekd.store import documents
from edgekd.store.digests import file_digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgekd.domain.measurement import Estimate
    from edgekd.domain.verdict import Check, Verdict

SCHEMA = 1
REPORT = "report.json"
MANIFEST = "manifest.json"
SCHEMA_FILE = Path(__file__).with_name("report.schema.json")


def version() -> str:
    """Return edgekd's version; an import of the package itself would be one of a higher layer."""
    return str(import_module("edgekd").__version__)


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
        "tier": check.tier,
    }


def estimate_row(estimate: Estimate) -> dict[str, Any]:
    """Return an estimate as a mapping."""
    return {
        "runtime": estimate.runtime,
        "threads": estimate.threads,
        "ms": ns_to_ms(estimate.value_ns),
        "band": [ns_to_ms(estimate.low_ns), ns_to_ms(estimate.high_ns)],
        "level": estimate.level,
        "tier": estimate.tier,
        "provenance": estimate.provenance,
        "notes": list(estimate.notes),
    }


def with_verdict(parts: Mapping[str, Any], verdict: Verdict) -> dict[str, Any]:
    """Return the whole report, sealed: the parts that the build collected, and the verdict. All text in it is plain."""
    rows = [check_row(check) for check in verdict.checks]
    return documents.seal(plain_document({"schema": SCHEMA, "outcome": verdict.outcome.value, "checks": rows, **parts}))


def recipe_file(recipe: Path, folder: Path) -> dict[str, str]:
    """Return how an output folder identifies its recipe: by its file's name; outside the recipe's folder, also by a digest of that.

    The digest has few bits: enough to tell the recipes of one user apart, too few to prove a guess at the folder's name.
    """
    recipe_dir = os.path.realpath(recipe.parent)
    is_below = Path(os.path.realpath(folder)).is_relative_to(recipe_dir)
    return {"name": printable(recipe.name), "folder": "" if is_below else hashlib.sha256(os.fsencode(recipe_dir)).hexdigest()[:4]}


def read(folder: Path) -> dict[str, Any]:
    """Return the report of an earlier build, by its folder or by its file.

    Raises:
        UsageError: if there is no report, if it was damaged or changed, or if what it says ships is not beside it, byte for byte.
    """
    path = folder / REPORT if os.path.isdir(folder) else folder  # noqa: PTH112  (Path.is_dir raises for a name that is too long)
    try:
        document = documents.parse_mapping(documents.read_file(path))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        shown = printable(str(path), 300)
        raise UsageError(f"{shown}: {reason}; expected the folder of a target, as in: edgekd report build/host") from None
    if document is None:
        raise UsageError(f"{path}: is not a JSON object; build again")
    if type(document.get("schema")) is not int or document["schema"] != SCHEMA:
        raise UsageError(f"{path}: is not a report of schema {SCHEMA}; build again")
    definition = _definition()
    missing = sorted(set(definition["required"]) - set(document))
    if missing:
        raise UsageError(f"{path}: is not a complete report: {', '.join(missing)} missing; build again")
    if not documents.is_sealed(document):
        raise UsageError(f"{path}: was changed after it was written: its content does not match its own digest; build again")
    problem = next(schema.problems(document, definition, definition), None)
    if problem is not None:
        raise UsageError(f"{path}: is not a report of this version of edgekd: {printable(problem, 200)}; build again")
    problem = _why_not_shipped(path.parent, document)
    if problem is not None:
        raise UsageError(f"{path}: says that {document['shipped'] or 'nothing'} ships, but {problem}; build again")
    return document


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest in a folder, or None if there is none, or if it was damaged or changed."""
    manifest = documents.read(folder / MANIFEST)
    if manifest is None or not documents.is_sealed(manifest) or not isinstance(manifest.get("outputs"), dict):
        return None
    return manifest


def is_file_name(name: object) -> bool:
    """Return whether a value names a file in a folder, and no file elsewhere."""
    return isinstance(name, str) and name not in {"", ".", ".."} and not {"/", "\0"} & set(name)


def _why_not_shipped(folder: Path, document: Mapping[str, Any]) -> str | None:
    """Return why a folder does not hold what a report says, or None."""
    name = document["shipped"]
    if name is None:
        return f"the verdict is {Outcome.PASS}" if document["outcome"] == Outcome.PASS else None
    if document["outcome"] == Outcome.FAIL or not is_file_name(name):
        return f"the verdict is {document['outcome']}"
    if not os.path.lexists(folder / name):
        return "that file is missing"
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{MANIFEST} is missing, damaged or changed"
    expected = {"verdict_key": document["verdict_key"], "outcome": document["outcome"]}
    if any(manifest.get(key) != value for key, value in expected.items()):
        return f"{MANIFEST} is that of another build"
    output = manifest["outputs"].get(name)
    sha256 = output.get("sha256") if isinstance(output, dict) else None
    if sha256 != document["choice"]["digest"] or not _has_digest(folder / name, sha256):
        return "its bytes are not those of the model that was judged"
    return None


def _has_digest(path: Path, sha256: str) -> bool:
    try:
        return path.is_file() and file_digest(path) == sha256
    except OSError:
        return False


@functools.cache
def _definition() -> dict[str, Any]:
    return cast("dict[str, Any]", documents.parse(SCHEMA_FILE.read_bytes()))


def exit_code(document: Mapping[str, Any], *, inconclusive_ok: bool = False) -> int:
    """Return the exit code of a report's outcome; 0 for INCONCLUSIVE if that is allowed."""
    outcome = Outcome(document["outcome"])
    return 0 if outcome is Outcome.INCONCLUSIVE and inconclusive_ok else outcome.exit_code


def plain_document(value: Any) -> Any:
    """Return a JSON value with all its texts printable, and the user's home folder as ``~``."""
    if isinstance(value, str):
        return printable(_without_home(value), MAX_CHARACTERS)
    if isinstance(value, dict):
        return {plain_document(key): plain_document(item) for key, item in value.items()}
    return [plain_document(item) for item in value] if isinstance(value, list | tuple) else value


def _without_home(text: str) -> str:
    home = _home()
    return text if home is None or home not in text else re.sub(rf"{re.escape(home)}(?=/|$|\W)", "~", text)


@functools.cache
def _home() -> str | None:
    home = os.path.expanduser("~")  # noqa: PTH111  (Path.home raises where there is none)
    return home if len(home) > 1 and home.startswith("/") else None
