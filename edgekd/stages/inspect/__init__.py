# SPDX-License-Identifier: Apache-2.0
"""Inspect: run the user's code once in a child process, check and store its data, and record what it read."""

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
from edgekd.stages.inspect.params import InspectParams, TeacherParams

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
    "store/digests",
)
_LAST_LINES = 3
_LINGER_SECONDS = 10.0  # how long the user's threads may run on after the child's work is done


def steps(recipe: Recipe, targets: Sequence[Target]) -> list[Step[InspectParams]]:
    """Return the one step."""
    del targets  # all share the data
    student, distill, evaluate, training = recipe.student, recipe.distill, recipe.evaluate, recipe.teacher.train
    params = InspectParams(
        splits=str(recipe.data.splits),
        max_overlap=recipe.data.max_overlap,
        inputs=student.inputs,
        student=str(student.model),
        task=student.task,
        heads=student.heads,
        teacher=TeacherParams.from_recipe(recipe.teacher),
        checkpoints=recipe.teacher.checkpoints,
        teachers=tuple(TeacherParams.from_recipe(teacher) for teacher in distill.teachers),
        assistants=tuple(str(assistant.model) for assistant in distill.assistants),
        sizes=tuple(str(entry) for entry in distill.sizes),
        tapped_losses=tuple(loss.to_dict() for loss in distill.losses if loss.taps),
        pseudo_labels=distill.baselines is not None and distill.baselines.pseudo_labels,
        metric=None if isinstance(evaluate.metric, str) else str(evaluate.metric),
        score=None if evaluate.score is None else str(evaluate.score),
        augment=None if training is None or training.augment is None else str(training.augment),
        views=None if distill.augment is None else str(distill.augment),
    )
    runtime = ("onnxruntime",) if any(name.endswith(".onnx") for name in params.model_files) else ()
    return [Step(NAME, NAME, params, {}, ("torch", "numpy", "safetensors", *runtime))]


def run(step: Step[InspectParams], inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Run the child process and return its result.

    Raises:
        RecipeError: what is wrong with the user's code or data.
    """
    del inputs  # it is the first step
    job = {
        "params": asdict(step.params),
        "recipe_dir": str(context.recipe_dir.absolute()),
        "out": str(context.out.absolute()),
        "work": str(context.work.absolute()),
        "parent": os.getpid(),
    }
    printed = context.work / "printed.txt"
    running, exit_code = step.params.splits, None
    result: dict[str, Any] = {}
    with closing(_run_child(job, printed)) as messages:
        for message in messages:
            if "share" in message:
                context.progress(message["share"], message["text"])
            running = message.get("running", running)
            exit_code = message.get("exit_code", exit_code)
            if message.keys() & {"record", "error", "os_error", "bug"}:
                result = message
    if "bug" in result:
        raise RuntimeError(f"inspect: the child failed:\n{result['bug']}")
    if "os_error" in result:
        raise OSError(*result["os_error"])
    if "error" in result:
        raise getattr(errors, result["error"])(*result["problems"])
    if not result:
        raise RecipeError(_describe_end(running, exit_code, printed, context.recipe_dir))
    return StageResult(result["metrics"], tuple(result["notes"]), Record(**result["record"]))


def _run_child(job: Mapping[str, Any], printed: Path) -> Generator[dict[str, Any]]:
    """Run the child; yield its messages, and its exit code at the end. What the user's code prints goes to a file."""
    read_end, write_end = os.pipe()
    # -P: no module in the recipe's folder can replace one of edgekd's; a fixed hash seed: sets keep their order
    command = [sys.executable, "-P", "-m", "edgekd.stages.inspect.child", str(write_end)]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    with os.fdopen(read_end, "rb", buffering=0) as channel, printed.open("wb") as output:
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=job["recipe_dir"],
                env=environment,
                pass_fds=(write_end,),
            )
        finally:
            os.close(write_end)
        try:
            assert child.stdin is not None  # noqa: S101  (a pipe was requested)
            with suppress(BrokenPipeError), child.stdin as stdin:
                stdin.write(json.dumps(job).encode())
            yield from _read_messages(child, channel)
            with suppress(subprocess.TimeoutExpired):
                child.wait(_LINGER_SECONDS)
        finally:
            child.kill()
            exit_code = child.wait()
        yield {"exit_code": exit_code}


def _read_messages(child: subprocess.Popen[bytes], channel: Any) -> Iterator[dict[str, Any]]:
    """Yield the child's messages until it ends or closes the pipe; processes that it leaves behind may hold the pipe open."""
    rest = b""
    while True:
        has_ended = child.poll() is not None  # polled first, so that messages sent before the end are still read
        is_ready = bool(select.select([channel], [], [], 0 if has_ended else 0.1)[0])
        chunk = channel.read(65536) if is_ready else b""
        *lines, rest = (rest + chunk).split(b"\n")
        yield from map(json.loads, lines)
        if not chunk and (has_ended or is_ready):
            return


def _describe_end(running: str, exit_code: int | None, printed: Path, recipe_dir: Path) -> str:
    """Return the error message for a child that ended without a result."""
    lines = [line.strip() for line in printed.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        end = f"was ended by signal {name}" + (" (was there enough memory?)" if name == "SIGKILL" else "")
    else:
        end = f"ended with exit code {exit_code}"
    is_fault = any("Fatal Python error" in line for line in lines)
    locations = [location for line in lines if (location := _location(line, recipe_dir))] if is_fault else []
    if locations:
        return f"{running}: the process {end} at {locations[0]} while this ran"
    output = f"; its last output: {' | '.join(lines[-_LAST_LINES:])}" if lines else ""
    return f"{running}: the process {end} while this ran{output}"


def _location(line: str, recipe_dir: Path) -> str | None:
    """Return ``file:line`` of a line of a fault's traceback, ``File "data.py", line 3 in splits``, if the file is the user's."""
    parts = line.split('"')
    expected = 3
    if not line.startswith('File "') or len(parts) != expected or not usercode.is_user_file(parts[1]):
        return None
    return f"{os.path.relpath(parts[1], recipe_dir)}:{parts[2].removeprefix(', line ').partition(' ')[0]}"
