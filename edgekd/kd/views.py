# SPDX-License-Identifier: Apache-2.0
"""Views: augmented and mixed inputs that depend on the split and the view's number alone, so that teacher and student see the same.

Source:
    Mixup: Zhang et al., arXiv 1710.09412; with the teacher's logits for the mixed inputs: Beyer et al., arXiv 2106.05237.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekd import usercode
from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError
from edgekd.kd.reproducible import derive_seed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch
    from torch import Tensor

    Augment = Callable[[tuple[Tensor, ...], torch.Generator], tuple[Tensor, ...]]

CHUNK = 256  # samples that are augmented at once, with one seed


def load_augmentation(recipe_dir: Path, entry: EntryPoint) -> Augment:
    """Return the user's augmentation as a function that checks what it returns.

    Raises:
        RecipeError: if it cannot be loaded; the function, if it fails or changes shapes or types.
    """
    import torch

    function = usercode.load_function(recipe_dir, entry)

    def augment(inputs: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        result = usercode.call_user_code(function, entry, inputs[0] if len(inputs) == 1 else inputs, generator)
        outputs = (result,) if isinstance(result, torch.Tensor) else result
        if not isinstance(outputs, tuple | list) or [_signature(item) for item in outputs] != [_signature(item) for item in inputs]:
            raise RecipeError(f"{entry}: changes the shapes or types of its inputs; expected tensors of the same shapes and types")
        return tuple(item.detach() for item in outputs)  # no gradient flows into an augmentation

    return augment


@dataclass(frozen=True, slots=True)
class ViewOptions:
    """How views are made: by the user's augmentation, mixed with other samples (``mixup`` is the alpha of a beta distribution), or both."""

    augment: Augment | None = None
    mixup: float | None = None


@dataclass(frozen=True, slots=True)
class Mixture:
    """What the samples of a view are mixed with: ``share`` times the sample, plus the rest of its partner.

    Shapes:
        partners: (n,) int64, rows of the split; shares: (n,) float32, from 0.5 to 1.
    """

    partners: Tensor
    shares: Tensor


def view_options(recipe_dir: Path, augment: str | None, mixup: float | None) -> ViewOptions | None:
    """Return the options with the user's augmentation, an entry point, loaded; None if samples have no views.

    Raises:
        RecipeError: if it cannot be loaded.
    """
    if augment is None and mixup is None:
        return None
    return ViewOptions(None if augment is None else load_augmentation(recipe_dir, EntryPoint.parse(augment)), mixup)


def draw_mixture(options: ViewOptions, split: str, samples: int, number: int) -> Mixture | None:
    """Return how a view is mixed; None for the first view, which is not mixed: it shows the teacher in the domain of the samples."""
    import numpy as np
    import torch

    if options.mixup is None or number == 0:
        return None
    generator = np.random.default_rng(derive_seed("mixup", split, number))
    shares = generator.beta(options.mixup, options.mixup, samples)
    partners = torch.from_numpy(generator.permutation(samples))
    return Mixture(partners, torch.from_numpy(np.maximum(shares, 1 - shares)).float())


def make_view(options: ViewOptions, split: str, inputs: tuple[Tensor, ...], number: int) -> tuple[Tensor, ...]:
    """Return one view of all samples of a split.

    Shapes:
        inputs, result: one tensor (n, ...) for each input of the student.
    """
    view = inputs if options.augment is None else _augment(options.augment, split, inputs, number)
    mixture = draw_mixture(options, split, len(inputs[0]), number)
    return view if mixture is None else tuple(_mix(item, mixture) for item in view)


def _augment(augment: Augment, split: str, inputs: tuple[Tensor, ...], number: int) -> tuple[Tensor, ...]:
    import torch

    view = tuple(torch.empty_like(item) for item in inputs)
    for start in range(0, len(inputs[0]), CHUNK):
        generator = torch.Generator().manual_seed(derive_seed("view", split, number, start))
        chunk = augment(tuple(item[start : start + CHUNK].clone() for item in inputs), generator)
        for target, part in zip(view, chunk, strict=True):
            target[start : start + CHUNK] = part
    return view


def _mix(item: Tensor, mixture: Mixture) -> Tensor:
    """Return a mixed input; a chunk at a time, so that there is one copy of the split."""
    import torch

    mixed = torch.empty_like(item)
    for start in range(0, len(item), CHUNK):
        rows = slice(start, start + CHUNK)
        rest = 1 - mixture.shares[rows].reshape(-1, *[1] * (item.ndim - 1))
        torch.lerp(item[rows], item[mixture.partners[rows]], rest, out=mixed[rows])
    return mixed


def _signature(item: object) -> object:
    import torch

    return (item.shape, item.dtype) if isinstance(item, torch.Tensor) else type(item)
