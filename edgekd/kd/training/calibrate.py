# SPDX-License-Identifier: Apache-2.0
"""Temperature scaling: one temperature, fitted on the validation split, is folded into the last layer. Accuracy does not change."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgekd import usercode
from edgekd.kd import modules
from edgekd.kd.losses import UNLABELLED
from edgekd.kd.reproducible import deterministic

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from edgekd.domain.recipe import EntryPoint
    from edgekd.kd.data import Samples

LOWEST, HIGHEST = 0.02, 50.0
BATCH = 256
MIN_SAMPLES = 30  # fewer are too few to fit probabilities


def calibrate(
    module: nn.Module, weights: dict[str, Tensor], validation: Samples, entry: EntryPoint, threads: int
) -> tuple[dict[str, Tensor], str]:
    """Return weights calibrated on the validation split, or the same weights if that is not possible, and a note on what was done."""
    import torch

    modules.load_weights(module, weights, str(entry))
    module.eval()
    with deterministic(threads), torch.inference_mode():
        batches = torch.split(torch.arange(len(validation)), BATCH)
        logits = torch.cat([usercode.call_user_code(module, entry, *validation.pick(rows).inputs) for rows in batches])
    temperature = fit_temperature(logits, validation.labels)
    if temperature is None:
        return weights, "the logits are not calibrated: too few samples of the validation split have a class"
    if not fold_temperature(module, validation.pick(batches[0]).inputs, temperature):
        return weights, "the logits are not calibrated: no linear layer of its own computes them"
    return dict(module.state_dict()), f"a temperature of {temperature:.3g}, fitted on validation, is folded into the last layer"


def fit_temperature(logits: Tensor, labels: Tensor) -> float | None:
    """Return the T that minimises the log loss of ``softmax(logits / T)``; None if too few samples have a label.

    Shapes:
        logits: (n, C); labels: (n,) int64, -1 where there is none.

    Source:
        Guo et al., arXiv 1706.04599, section 4.2.
    """
    from scipy.optimize import minimize_scalar
    from torch.nn.functional import cross_entropy

    labelled = labels != UNLABELLED
    if int(labelled.sum()) < MIN_SAMPLES:
        return None
    labelled_logits, classes = logits[labelled].double(), labels[labelled]
    optimum = minimize_scalar(
        lambda log_t: float(cross_entropy(labelled_logits / math.exp(log_t), classes)),
        bounds=(math.log(LOWEST), math.log(HIGHEST)),
        method="bounded",
    )
    return math.exp(optimum.x)


def fold_temperature(module: nn.Module, inputs: Sequence[Tensor], temperature: float) -> bool:
    """Divide the weights of the layer that computes the logits by a temperature; return False, without a change, if there is none.

    It is the linear layer or convolution whose output equals that of the module for ``inputs``, one batch.
    """
    import torch
    from torch import nn

    module.eval()
    outputs: list[tuple[nn.Module, Tensor]] = []
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)]
    hooks = [layer.register_forward_hook(lambda layer, _, output: outputs.append((layer, output))) for layer in layers]
    try:
        with torch.inference_mode():
            logits = module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    last = next(
        (
            layer
            for layer, output in reversed(outputs)
            if output.numel() == logits.numel() and torch.equal(output.reshape(logits.shape), logits)
        ),
        None,
    )
    if last is None or _is_shared(module, last):
        return False
    with torch.no_grad():
        for parameter in last.parameters(recurse=False):
            parameter.div_(temperature)
    return True


def _is_shared(module: nn.Module, layer: nn.Module) -> bool:
    """Return whether another layer uses the same weights (tied to an embedding, say)."""
    pointers = {parameter.data_ptr() for parameter in layer.parameters(recurse=False)}
    return any(
        parameter.data_ptr() in pointers
        for other in module.modules()
        if other is not layer
        for parameter in other.parameters(recurse=False)
    )
