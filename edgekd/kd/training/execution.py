# SPDX-License-Identifier: Apache-2.0
"""The ways in which a network may be trained: float32 or bfloat16, on the processor or an accelerator, whichever pays.

Weights, losses and validation are float32 in any case; bfloat16 is that of the forward and backward pass of a training step
(torch.autocast). Such a step keeps the default memory layout, in which it was faster (docs/decisions/0009-ways.md). What is planned
is read from files: torch is not imported for it.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import usercode
from edgekd.domain.losses import AUTO
from edgekd.domain.recipe import NO_ACCELERATOR
from edgekd.errors import UnavailableError
from edgekd.ports import Step

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.recipe import Distill, EntryPoint, Training

FLOAT32, BFLOAT16 = "float32", "bfloat16"
CPU, CUDA, MPS = "cpu", "cuda", "mps"
BFLOAT16_FEATURES = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # as /proc/cpuinfo names them, on x86 and ARM
FILE = "execution_mode.json"


@dataclass(frozen=True, slots=True)
class ExecutionMode:
    """A precision and where the network is: ``cpu``, or an accelerator as torch names it, and which one that is."""

    precision: str = FLOAT32
    accelerator: str = CPU
    name: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return what differs from the default, for a step's parameters."""
        return {key: value for key, value in asdict(self).items() if value != getattr(DEFAULT, key)}

    def __str__(self) -> str:
        """Return it in words."""
        return self.precision if self.accelerator == CPU else f"{self.precision} on {self.accelerator} ({self.name})"


DEFAULT = ExecutionMode()


def accelerators(root: str = "/") -> dict[str, str]:
    """Return the accelerators here that the installed torch can use, and their names."""
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return {MPS: "Apple"}
    torch = find_spec("torch")
    if torch is None or torch.origin is None or not Path(torch.origin).with_name("lib").joinpath("libtorch_cuda.so").exists():
        return {}
    if os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}:
        return {}
    told = [file.read_text(errors="replace") for file in sorted(Path(root, "proc/driver/nvidia/gpus").glob("*/information"))]
    names = {line.partition(":")[2].strip() for text in told for line in text.splitlines() if line.startswith("Model:")}
    return {CUDA: ", ".join(sorted(names))} if names else {}


def accelerators_for(section: str, wanted: str) -> dict[str, str]:
    """Return where a network may be trained, the processor first, and what each is called; ``section`` is the recipe's, for messages.

    Raises:
        UnavailableError: if the recipe wants an accelerator that is not here.
    """
    if wanted == NO_ACCELERATOR:
        return {CPU: ""}
    here = accelerators()
    if wanted == AUTO:
        return {CPU: "", **here}
    if wanted not in here:
        have = ", ".join(f"{kind} ({name})" for kind, name in here.items()) or "none that the installed torch can use"
        raise UnavailableError(
            f"{section}.accelerator: '{wanted}', and this machine has {have}; "
            'expected "auto", which takes what is here, or build where there is one'
        )
    return {wanted: here[wanted]}


def plan_execution_mode(
    stage: str, wanted: Distill | Training, features: Iterable[str], params: Mapping[str, Any], inputs: Mapping[str, str]
) -> dict[str, Any]:
    """Return what a stage's training steps get for their way: ``params``, ``inputs``, and ``steps``, the trial that comes before them.

    Where more than one way is open, the trial's answer is an input of the others: it is made once, stored, and part of their
    keys. ``params`` and ``inputs`` are the trained network's.

    Raises:
        UnavailableError: if the recipe wants an accelerator that is not here.
    """
    section = {"teach": "teacher.train"}.get(stage, stage)
    instructions = bool(BFLOAT16_FEATURES & set(features))
    found_at = accelerators_for(section, wanted.accelerator)
    asked = None if wanted.precision == AUTO else [wanted.precision]
    found = [
        ExecutionMode(precision, place, name)
        for place, name in found_at.items()
        for precision in asked or [FLOAT32, *([BFLOAT16] if place != CPU or instructions else [])]
    ]
    if len(found) == 1:
        return {"params": found[0].to_dict(), "inputs": {}, "steps": []}
    own = {name: params[name] for name in ("model", "batch_size", "optimizer", "threads", "instruction_set")}
    shown = {name: reference for name, reference in inputs.items() if name == "code" or name.startswith("train.inputs.")}
    trial = Step(f"{stage}/autotune", stage, {**own, "tried": [mode.to_dict() for mode in found]}, shown, ("torch", "numpy"))
    return {"params": {}, "inputs": {"execution_mode": f"{trial.id}:{FILE}"}, "steps": [trial]}


def execution_mode_of(params: Mapping[str, Any], inputs: Mapping[str, Artifact]) -> ExecutionMode:
    """Return the way of a step that trains."""
    if "execution_mode" in inputs:
        return ExecutionMode(**json.loads(inputs["execution_mode"].path.read_text()))
    return ExecutionMode(**{name: params[name] for name in ExecutionMode.__slots__ if name in params})


def forward(module: nn.Module, entry: EntryPoint, inputs: Sequence[Tensor], mode: ExecutionMode) -> Any:
    """Return what a module of the user's answers, as float32 if its precision is bfloat16.

    Raises:
        RecipeError: if it fails.
    """
    import torch

    if mode.precision == FLOAT32:
        return usercode.call_user_code(module, entry, *inputs)
    with torch.autocast(torch.device(mode.accelerator).type, dtype=torch.bfloat16):
        found = usercode.call_user_code(module, entry, *inputs)
    return found.float() if isinstance(found, torch.Tensor) and found.dtype == torch.bfloat16 else found
