# SPDX-License-Identifier: Apache-2.0
"""Inspect: the user's code runs once, in a child process; its data are checked and kept, and what it read is recorded."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from edgekd.digests import file_digest
from edgekd.errors import RecipeError
from edgekd.ports import Context, Record, StageResult, Step

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.recipe import Recipe
    from edgekd.domain.target import Target

NAME = "inspect"
VERSION = 1


def steps(recipe: Recipe, targets: Sequence[Target]) -> list[Step]:  # noqa: ARG001  (the protocol's signature)
    """Return the one step."""
    teacher, evaluate = recipe.teacher, recipe.evaluate
    training = teacher.train
    params: dict[str, Any] = {
        "splits": str(recipe.data.splits),
        "max_overlap": recipe.data.max_overlap,
        "inputs": [asdict(spec) for spec in recipe.student.inputs],
        "teacher": None if teacher.model is None else str(teacher.model),
        "weights": teacher.weights,
        "file": teacher.file,
        "taught": training is not None,
        "student": str(recipe.student.model),
        "metric": None if isinstance(evaluate.metric, str) else str(evaluate.metric),
        "score": None if evaluate.score is None else str(evaluate.score),
        "augment": None if training is None or training.augment is None else str(training.augment),
    }
    return [Step(NAME, NAME, params, {}, ("torch", "numpy", "safetensors"))]


def run(step: Step, inputs: Mapping[str, Artifact], context: Context) -> StageResult:  # noqa: ARG001  (nothing comes before it)
    """Run the child and take over what it found.

    Raises:
        RecipeError: what is wrong with the user's code or data.
    """
    job = context.work / "job.json"
    answer = context.work / "answer.json"
    answer.unlink(missing_ok=True)
    job.write_text(
        json.dumps({"params": step.params, "recipe_dir": str(context.recipe_dir), "out": str(context.out), "answer": str(answer)})
    )
    command = [sys.executable, "-m", "edgekd.stages.inspect.child", str(job)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        lines = _follow(child, context)
    found = _read(answer)
    if found is None:
        where, said = _where(context.work), [line for line in lines if line.strip()][-3:]
        how = f"by signal {signal.Signals(-child.returncode).name}" if child.returncode < 0 else f"with exit code {child.returncode}"
        raise RecipeError(f"{where}: the process ended {how} while this ran" + (f"; it said last: {' | '.join(said)}" if said else ""))
    if found.get("os_error"):
        raise OSError(found["os_error"], found["problems"][0])
    if found["problems"]:
        raise RecipeError(*found["problems"])
    record = Record(**found["record"])
    _check_unchanged(record, context.recipe_dir)
    return StageResult(found["metrics"], tuple(found["notes"]), record)


def _follow(child: subprocess.Popen[str], context: Context) -> list[str]:
    """Collect what the user's code prints; progress comes as marked lines. Our end of its stdin closes if we die."""
    lines: list[str] = []
    for line in child.stdout or ():
        if line.startswith("\x1eprogress "):
            share, _, text = line.split(" ", 1)[1].partition(" ")
            context.progress(float(share), text.strip())
        else:
            lines = [*lines[-50:], line.rstrip()]
    child.wait()
    return lines


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _where(work: Path) -> str:
    try:
        return (work / "running.txt").read_text()
    except OSError:
        return "the user's code"


def _check_unchanged(record: Record, recipe_dir: Path) -> None:
    for name, known in record.files.items():
        path = recipe_dir / name
        if (file_digest(path) if path.is_file() else None) != known:
            raise RecipeError(f"{name}: changed while it was read; build again")
