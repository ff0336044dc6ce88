# SPDX-License-Identifier: Apache-2.0
"""The precision in which a network is trained: float32, or bfloat16 where the processor has instructions for it that pay.

Weights, losses and validation are float32 in any case; bfloat16 is that of the forward and backward pass of a training step
(torch.autocast). Such a step keeps the default memory layout, in which it was faster (docs/decisions/0009-precision.md).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from edgekd import usercode
from edgekd.domain.losses import AUTO
from edgekd.ports import Step

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.recipe import Entry

FLOAT32, BFLOAT16 = "float32", "bfloat16"
INSTRUCTIONS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # as /proc/cpuinfo names them, on x86 and ARM
FILE = "precision.json"


def planned(stage: str, wanted: str, features: Iterable[str], params: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    """Return what a stage's training steps get for a precision: ``params``, ``inputs``, and ``steps``, the trial that comes before them.

    Where ``wanted`` is left to ``auto`` and the processor has instructions, the trial's answer is an input of the others: it is
    made once, stored, and part of their keys. ``params`` and ``inputs`` are the trained network's.
    """
    found = sorted(INSTRUCTIONS & set(features))
    if wanted == BFLOAT16:
        return {"params": {"precision": BFLOAT16}, "inputs": {}, "steps": []}
    if wanted != AUTO or not found:
        return {"params": {}, "inputs": {}, "steps": []}
    own = {name: params[name] for name in ("model", "batch_size", "optimizer", "threads", "instruction_set")}
    shown = {name: reference for name, reference in inputs.items() if name == "code" or name.startswith("train.inputs.")}
    trial = Step(f"{stage}/precision", stage, {**own, "tried": found}, shown, ("torch", "numpy"))
    return {"params": {}, "inputs": {"precision": f"{trial.id}:{FILE}"}, "steps": [trial]}


def of(params: Mapping[str, Any], inputs: Mapping[str, Artifact]) -> str:
    """Return the precision of a step that trains."""
    if "precision" in inputs:
        return str(json.loads(inputs["precision"].path.read_text())["precision"])
    return str(params.get("precision", FLOAT32))


def call(module: nn.Module, entry: Entry, inputs: Sequence[Tensor], precision: str) -> Any:
    """Return what a module of the user's answers in a precision, as float32 if that is bfloat16.

    Raises:
        RecipeError: if it fails.
    """
    import torch

    if precision == FLOAT32:
        return usercode.call(module, entry, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = usercode.call(module, entry, *inputs)
    return found.float() if isinstance(found, torch.Tensor) and found.dtype == torch.bfloat16 else found
