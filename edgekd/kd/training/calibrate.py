# SPDX-License-Identifier: Apache-2.0
"""Temperature scaling: one temperature, fitted on the validation split, is folded into the last layer. Accuracy does not change."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

from edgekd import usercode
from edgekd.kd import modules
from edgekd.kd.losses import UNLABELLED
from edgekd.kd.reproducible import deterministic

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from edgekd.domain.recipe import EntryPoint
    from edgekd.kd.data import Samples

LOWEST, HIGHEST = 0.02, 50.0
BATCH = 256
MIN_SAMPLES = 30  # fewer are too few to fit probabilities
FOLDING_TOLERANCE = 1e-4  # relative; rounding of float32 weights changes logits by 1e-6
AT_BOUND = 1.01  # a bounded search ends this close to a bound, as a factor


def calibrate(
    build: Callable[[], nn.Module], weights: dict[str, Tensor], validation: Samples, entry: EntryPoint, threads: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Return weights calibrated on the validation split, or the same weights if that is not possible, and notes on what was done.

    The calibrated weights are checked in a fresh module, as all that follows loads them into one.
    """
    import torch

    rows = torch.split(torch.arange(len(validation)), BATCH)

    def load(values: dict[str, Tensor]) -> nn.Module:
        module = build()
        modules.load_weights(module, values, str(entry))
        return module.eval()

    def run(module: nn.Module) -> Tensor:
        with torch.inference_mode():
            return torch.cat([usercode.call_user_code(module, entry, *validation.pick(batch).inputs) for batch in rows])

    with deterministic(threads):
        module = load(weights)
        logits = run(module)
        temperature = fit_temperature(logits, validation.labels)
        if temperature is None:
            return weights, ["the logits are not calibrated: too few samples of the validation split have a class"]
        notes = _range_notes(temperature)
        if not fold_temperature(module, validation.pick(rows[0]).inputs, temperature):
            return weights, [*notes, "the logits are not calibrated: no linear layer of its own computes them"]
        folded = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        if problem := folding_problem(logits, run(load(folded)), temperature):
            why = f"a temperature of {temperature:.3g} is not folded: dividing the last layer {problem}"
            return weights, [*notes, f"{why}; the logits are not calibrated"]
    return folded, [*notes, f"a temperature of {temperature:.3g}, fitted on validation, is folded into the last layer"]


def _range_notes(temperature: float) -> list[str]:
    """Return a note if the fit ended at a bound of its range."""
    if LOWEST * AT_BOUND < temperature < HIGHEST / AT_BOUND:
        return []
    reason = "the logits do not predict the labels" if temperature > 1 else "the logits separate the classes of every validation sample"
    return [f"the temperature fitted on validation, {temperature:.3g}, is at the end of its range [{LOWEST:g}, {HIGHEST:g}]: {reason}"]


def folding_problem(before: Tensor, after: Tensor, temperature: float) -> str | None:
    """Return how logits after folding differ from those before, divided by the temperature; None if they do not.

    A layer may be normalized (spectral norm, cosine), its output may be changed in place or read elsewhere: dividing its weights
    then has another effect. Shapes: before and after are (n, C).
    """
    expected, actual = before.double() / temperature, after.double()
    # of each logit, and of a typical one for those near 0; not of the largest, which may be a mask of -1e4
    typical = float(expected.abs().median())
    is_close = (actual - expected).abs() <= FOLDING_TOLERANCE * (expected.abs() + typical)
    changed = float((actual.argmax(1) != expected.argmax(1)).double().mean())
    if bool(is_close.all()) and not changed:
        return None
    return f"changes {1 - float(is_close.double().mean()):.1%} of the logits in another way, and {changed:.1%} of the predictions"


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
    """Divide the weights of the layer that computes the logits by a temperature; return False if there is none that can be divided.

    It is the linear layer or convolution whose output equals that of the module for ``inputs``, one batch. The caller has to check
    the result with :func:`folding_problem`: the layer may be tied to another, or be read elsewhere.
    """
    import torch
    from torch import nn

    module.eval()
    outputs: list[tuple[nn.Module, Tensor]] = []
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)]
    hooks = [layer.register_forward_hook(lambda layer, _, output: outputs.append((layer, output))) for layer in layers]
    try:
        with torch.inference_mode():
            logits = module(*(item.clone() for item in inputs))
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
    if last is None:
        return False
    with torch.no_grad():
        for parameter in last.parameters(recurse=False):
            parameter.div_(temperature)
        return _divide_parametrized(last, temperature)


def _divide_parametrized(layer: nn.Module, temperature: float) -> bool:
    """Divide the tensors that a parametrization computes (weight norm); return False if one cannot be assigned.

    Source:
        torch.nn.utils.parametrize: an assignment calls ``right_inverse`` of the parametrization.
    """
    from torch.nn.utils import parametrize

    if not parametrize.is_parametrized(layer):
        return True
    try:
        for name in cast("nn.ModuleDict", layer.parametrizations):
            setattr(layer, name, getattr(layer, name) / temperature)
    except (RuntimeError, NotImplementedError, ValueError, TypeError):  # it has no inverse, or not for this value
        return False
    return True
