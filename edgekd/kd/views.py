# SPDX-License-Identifier: Apache-2.0
"""Views: augmentations that depend on the sample and the view's number alone, so that teacher and student see the same inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekd import usercode
from edgekd.errors import RecipeError
from edgekd.kd.reproducible import derive_seed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch
    from torch import Tensor

    from edgekd.domain.recipe import EntryPoint

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


def make_view(augment: Augment, split: str, inputs: tuple[Tensor, ...], number: int) -> tuple[Tensor, ...]:
    """Return one view of all samples of a split.

    Shapes:
        inputs, result: one tensor (n, ...) for each input of the student.
    """
    import torch

    view = tuple(torch.empty_like(item) for item in inputs)
    for start in range(0, len(inputs[0]), CHUNK):
        generator = torch.Generator().manual_seed(derive_seed("view", split, number, start))
        chunk = augment(tuple(item[start : start + CHUNK].clone() for item in inputs), generator)
        for target, part in zip(view, chunk, strict=True):
            target[start : start + CHUNK] = part
    return view


def _signature(item: object) -> object:
    import torch

    return (item.shape, item.dtype) if isinstance(item, torch.Tensor) else type(item)
