# SPDX-License-Identifier: Apache-2.0
"""Output folders as a build writes them, from a report."""

from __future__ import annotations

import hashlib

from edgekd.report import markdown
from edgekd.stages import package
from edgekd.store.documents import seal

MODEL = b"model"
DIGEST = hashlib.sha256(MODEL).hexdigest()


def with_changes(report, **changes):
    """Return a report with other content, sealed as a build would."""
    return seal({**report, **changes})


def manifest_of(report, model=MODEL):
    """Return a manifest of the model that a report ships."""
    names = ("schema", "recipe", "recipe_file", "outcome", "verdict_key")
    output = {"sha256": hashlib.sha256(model).hexdigest(), "bytes": len(model)}
    return {**{name: report[name] for name in names}, "outputs": {report["shipped"]: output}}


def write_output(folder, report, model=MODEL):
    """Write an output folder: the report, and the model with its manifest if it ships."""
    folder.mkdir(parents=True, exist_ok=True)
    if report["shipped"] is None:
        package.withhold(folder, report, markdown.render(report))
        return
    source = folder.parent / f"{folder.name}.source"
    source.write_bytes(model)
    package.ship(folder, source, report["shipped"], manifest_of(report, model), report, markdown.render(report))
    source.unlink()


def ship(folder, report, model=MODEL, name="toy.tflite"):
    """Write the output of a build that ships a model, with the report that it has for it."""
    choice = {**report["choice"], "digest": hashlib.sha256(model).hexdigest()}
    write_output(folder, with_changes(report, outcome="PASS", shipped=name, choice=choice), model)


def withhold(folder, report, outcome="FAIL"):
    """Write the output of a build that ships nothing."""
    write_output(folder, with_changes(report, outcome=outcome, shipped=None))
