# SPDX-License-Identifier: Apache-2.0
"""Inspect: the user's code runs once, in a child process; its data are checked and kept, and what it read is recorded."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from contextlib import closing, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from edgekd import errors, usercode
from edgekd.errors import RecipeError
from edgekd.ports import Context, Record, StageResult, Step

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence
    from pathlib import Path

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.recipe import Recipe
    from edgekd.domain.target import Target

NAME = "inspect"
CODE: tuple[str, ...] = (
    "stages/inspect",
    "usercode",
    "kd/losses",
    "kd/modules",
    "kd/output_spec",
    "kd/reproducible",
    "kd/teachers",
    "domain/losses",
)
_LAST_LINES = 3
_LINGER_SECONDS = 10.0  # how long the user's threads may go on when all is done


def steps(recipe: Recipe, targets: Sequence[Target]) -> list[Step[Any]]:
    """Return the one step."""
    del targets  # all share the data
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
        "checkpoints": list(teacher.checkpoints),
        "teachers": [
            {"teacher": None if other.model is None else str(other.model), "weights": other.weights, "file": other.file}
            for other in recipe.distill.teachers
        ],
        "assistants": [str(assistant.model) for assistant in recipe.distill.assistants],
        "sizes": [str(entry) for entry in recipe.distill.sizes],
        "pseudo_labels": recipe.distill.baselines is not None and recipe.distill.baselines.pseudo_labels,
        **recipe.student.form,
        "taps": [loss.to_dict() for loss in recipe.distill.losses if loss.taps],
        "student": str(recipe.student.model),
        "metric": None if isinstance(evaluate.metric, str) else str(evaluate.metric),
        "score": None if evaluate.score is None else str(evaluate.score),
        "augment": None if training is None or training.augment is None else str(training.augment),
        "views": None if recipe.distill.augment is None else str(recipe.distill.augment),
    }
    files = [given.file for given in (teacher, *recipe.distill.teachers) if given.file is not None]
    runtime = ("onnxruntime",) if any(file.endswith(".onnx") for file in files) else ()
    return [Step(NAME, NAME, params, {}, ("torch", "numpy", "safetensors", *runtime))]


def run(step: Step[Any], inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Run the child and take over what it found.

    Raises:
        RecipeError: what is wrong with the user's code or data.
    """
    del inputs  # nothing comes before it
    job = {
        "params": step.params,
        "recipe_dir": str(context.recipe_dir.absolute()),
        "out": str(context.out.absolute()),
        "work": str(context.work.absolute()),
        "parent": os.getpid(),
    }
    printed = context.work / "printed.txt"
    running, code = str(step.params["splits"]), None
    found: dict[str, Any] = {}
    with closing(_child(job, printed)) as messages:
        for message in messages:
            if "share" in message:
                context.progress(message["share"], message["text"])
            running = message.get("running", running)
            code = message.get("exit_code", code)
            if message.keys() & {"record", "error", "os_error", "bug"}:
                found = message
    if "bug" in found:
        raise RuntimeError(f"inspect: the child failed:\n{found['bug']}")
    if "os_error" in found:
        raise OSError(*found["os_error"])
    if "error" in found:
        raise getattr(errors, found["error"])(*found["problems"])
    if not found:
        raise RecipeError(_ended(running, code, printed, context.recipe_dir))
    return StageResult(found["metrics"], tuple(found["notes"]), Record(**found["record"]))


def _child(job: Mapping[str, Any], printed: Path) -> Generator[dict[str, Any]]:
    """Run the child; yield what it tells, and its exit code at the end. What the user's code prints goes to a file."""
    told, tell = os.pipe()
    # -P: nothing that lies in the recipe's folder may stand for a module of ours; a fixed hash seed: sets keep their order
    command = [sys.executable, "-P", "-m", "edgekd.stages.inspect.child", str(tell)]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    with os.fdopen(told, "rb", buffering=0) as channel, printed.open("wb") as output:
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=job["recipe_dir"],
                env=environment,
                pass_fds=(tell,),
            )
        finally:
            os.close(tell)
        try:
            assert child.stdin is not None  # noqa: S101  (it was asked for)
            with suppress(BrokenPipeError), child.stdin as stdin:
                stdin.write(json.dumps(job).encode())
            yield from _messages(child, channel)
            with suppress(subprocess.TimeoutExpired):
                child.wait(_LINGER_SECONDS)
        finally:
            child.kill()
            code = child.wait()
        yield {"exit_code": code}


def _messages(child: subprocess.Popen[bytes], channel: Any) -> Iterator[dict[str, Any]]:
    """Yield the child's messages until it ends or closes the pipe; processes that it leaves behind may hold the pipe open."""
    rest = b""
    while True:
        ended = child.poll() is not None  # asked first: what was told before the end is read after it
        ready = select.select([channel], [], [], 0 if ended else 0.1)[0]
        chunk = channel.read(65536) if ready else b""
        *lines, rest = (rest + chunk).split(b"\n")
        yield from map(json.loads, lines)
        if not chunk and (ended or ready):
            return


def _ended(running: str, code: int | None, printed: Path, recipe_dir: Path) -> str:
    """Return the message for a child that ended without an answer."""
    lines = [line.strip() for line in printed.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        how = f"was ended by signal {name}" + (" (was there enough memory?)" if name == "SIGKILL" else "")
    else:
        how = f"ended with exit code {code}"
    place = (
        next((place for line in lines if (place := _frame(line, recipe_dir))), None) if "Fatal Python error" in "\n".join(lines) else None
    )
    said = [] if place else lines[-_LAST_LINES:]
    where = f" at {place}" if place else ""
    return f"{running}: the process {how}{where} while this ran" + (f"; it said last: {' | '.join(said)}" if said else "")


def _frame(line: str, recipe_dir: Path) -> str | None:
    """Return ``file:line`` of a line of a fault's traceback, ``File "data.py", line 3 in splits``, if the file is the user's."""
    parts = line.split('"')
    expected = 3
    if not line.startswith('File "') or len(parts) != expected or not usercode.is_user_file(parts[1]):
        return None
    return f"{os.path.relpath(parts[1], recipe_dir)}:{parts[2].removeprefix(', line ').partition(' ')[0]}"
