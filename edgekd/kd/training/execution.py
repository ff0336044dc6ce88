# SPDX-License-Identifier: Apache-2.0
"""Execution modes: the precision and the device that a network is trained with, and tensors on that device.

Weights, losses and validation are float32 in every mode; bfloat16 is the precision of the forward and backward pass of a training
step (torch.autocast). Such a step keeps the default memory format, in which it was faster (docs/decisions/0009-execution-modes.md).
Modes are planned from files: torch is not imported for it.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgekd import usercode
from edgekd.domain.losses import AUTO
from edgekd.domain.recipe import NO_ACCELERATOR
from edgekd.errors import RecipeError, UnavailableError
from edgekd.ports import Step

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch
    from torch import Tensor, nn

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.recipe import Distill, EntryPoint, Training
    from edgekd.kd.data import Samples

FLOAT32, BFLOAT16 = "float32", "bfloat16"
CPU, CUDA, MPS = "cpu", "cuda", "mps"
BFLOAT16_FEATURES = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # as /proc/cpuinfo names them, on x86 and ARM
MODE_FILE = "execution_mode.json"


@dataclass(frozen=True, slots=True)
class ExecutionMode:
    """A precision and a device: ``cpu``, or an accelerator as torch names it, with its product name."""

    precision: str = FLOAT32
    accelerator: str = CPU
    accelerator_name: str = ""

    def __str__(self) -> str:
        """Return it for messages."""
        return self.precision if self.accelerator == CPU else f"{self.precision} on {self.accelerator} ({self.accelerator_name})"


DEFAULT_MODE = ExecutionMode()


@dataclass(frozen=True, slots=True)
class AutotuneParams:
    """The parameters of a step that times execution modes on the steps of a training, the first of which has to work."""

    modes: tuple[ExecutionMode, ...]
    model: str
    batch_size: int
    optimizer: str
    threads: int
    instruction_set: str


@dataclass(frozen=True, slots=True)
class PlannedMode:
    """The execution mode of a stage's training steps: known, or an input that the autotune step makes first."""

    mode: ExecutionMode = DEFAULT_MODE
    inputs: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[Step[AutotuneParams], ...] = ()


def accelerators(root: str = "/") -> dict[str, str]:
    """Return the accelerators of this machine that the installed torch can use, with their product names."""
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return {MPS: "Apple"}
    torch = find_spec("torch")
    if torch is None or torch.origin is None or not Path(torch.origin).with_name("lib").joinpath("libtorch_cuda.so").exists():
        return {}
    if os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}:
        return {}
    texts = [file.read_text(errors="replace") for file in sorted(Path(root, "proc/driver/nvidia/gpus").glob("*/information"))]
    names = {line.partition(":")[2].strip() for text in texts for line in text.splitlines() if line.startswith("Model:")}
    return {CUDA: ", ".join(sorted(names))} if names else {}


def allowed_devices(section: str, accelerator: str) -> dict[str, str]:
    """Return the devices that a recipe's ``accelerator`` allows, the CPU first, with their product names.

    Raises:
        UnavailableError: if the recipe names an accelerator that this machine lacks.
    """
    if accelerator == NO_ACCELERATOR:
        return {CPU: ""}
    available = accelerators()
    if accelerator == AUTO:
        return {CPU: "", **available}
    if accelerator not in available:
        names = ", ".join(f"{kind} ({name})" for kind, name in available.items()) or "none that the installed torch can use"
        raise UnavailableError(
            f"{section}.accelerator: '{accelerator}', and this machine has {names}; "
            'expected "auto", which uses an accelerator if there is one, or a build on a machine that has it'
        )
    return {accelerator: available[accelerator]}


def plan_execution_mode(
    stage: str,
    options: Distill | Training,
    features: Iterable[str],
    network: tuple[str, int, str],
    inputs: Mapping[str, str],
) -> PlannedMode:
    """Return the execution mode of a stage's training steps.

    Where several modes are possible, an autotune step chooses: it runs once, its result is stored and part of the other steps' keys.

    Args:
        stage: ``teach`` or ``distill``.
        options: ``precision``, ``accelerator``, ``batch_size`` and ``optimizer`` of the recipe.
        features: Of the CPU, as ``/proc/cpuinfo`` names them.
        network: Entry point of the network, threads and instruction set.
        inputs: Those of the training step.

    Raises:
        UnavailableError: if the recipe names an accelerator that this machine lacks.
    """
    section = {"teach": "teacher.train"}.get(stage, stage)
    has_bfloat16 = bool(BFLOAT16_FEATURES & set(features))
    precisions = None if options.precision == AUTO else [options.precision]
    modes = tuple(
        ExecutionMode(precision, device, name)
        for device, name in allowed_devices(section, options.accelerator).items()
        for precision in precisions or [FLOAT32, *([BFLOAT16] if device != CPU or has_bfloat16 else [])]
    )
    if len(modes) == 1:
        return PlannedMode(modes[0])
    model, threads, instruction_set = network
    params = AutotuneParams(modes, model, options.batch_size, options.optimizer, threads, instruction_set)
    sources = {name: reference for name, reference in inputs.items() if name == "code" or name.startswith("train.inputs.")}
    autotune = Step(f"{stage}/autotune", stage, params, sources, ("torch", "numpy"))
    return PlannedMode(inputs={"execution_mode": f"{autotune.id}:{MODE_FILE}"}, steps=(autotune,))


def write_execution_mode(path: Path, mode: ExecutionMode) -> None:
    """Write the mode that autotune chose."""
    path.write_text(json.dumps(asdict(mode), sort_keys=True) + "\n")


def read_execution_mode(artifact: Artifact) -> ExecutionMode:
    """Return the mode that autotune chose."""
    return ExecutionMode(**json.loads(artifact.path.read_text()))


def forward(module: nn.Module, entry: EntryPoint, inputs: Sequence[Tensor], mode: ExecutionMode) -> Any:
    """Return the output of a module of the user's; float32 if it ran in bfloat16.

    The module gets copies: other networks run on the same inputs, and it may change its own in place.

    Raises:
        RecipeError: if it fails.
    """
    import torch

    inputs = [item.clone() for item in inputs]
    if mode.precision == FLOAT32:
        return usercode.call_user_code(module, entry, *inputs)
    with torch.autocast(torch.device(mode.accelerator).type, dtype=torch.bfloat16):
        output = usercode.call_user_code(module, entry, *inputs)
    return output.float() if isinstance(output, torch.Tensor) and output.dtype == torch.bfloat16 else output


def module_to_device(module: nn.Module, memory_format: torch.memory_format, mode: ExecutionMode, section: str) -> nn.Module:
    """Return a module in a memory format, on the device of a mode; ``section`` is the recipe's, for messages.

    Raises:
        RecipeError: if the accelerator refuses it.
    """
    try:
        return module.to(device=mode.accelerator, memory_format=memory_format)  # type: ignore[call-overload,no-any-return]  # an overload torch forgot
    except (RuntimeError, AssertionError) as error:  # no driver, no memory, a torch without it
        why = str(error).splitlines()[0]
        raise RecipeError(f'{section}.accelerator: {mode.accelerator} fails: {why}; mend it, or set accelerator = "none"') from error


def inputs_to_device(inputs: tuple[Tensor, ...], memory_format: torch.memory_format, mode: ExecutionMode) -> list[Tensor]:
    """Return inputs in the memory format of the module, images only, on the device of a mode."""
    image_axes = 4
    converted = (item.contiguous(memory_format=memory_format) if item.ndim == image_axes else item for item in inputs)
    return [item.to(mode.accelerator) for item in converted]


def targets_to_device(batch: Samples, classes: int, mode: ExecutionMode) -> tuple[Tensor | None, Tensor]:
    """Return the teacher's logits of a batch, if there are any, and its labels (or class probabilities), on the device of a mode."""
    teacher_logits = cast("Tensor | None", batch.teacher_logits)  # those of a batch are in memory
    return None if teacher_logits is None else teacher_logits.to(mode.accelerator), batch.targets(classes).to(mode.accelerator)
