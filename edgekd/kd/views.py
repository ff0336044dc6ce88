# SPDX-License-Identifier: Apache-2.0
"""Views: augmentation as a function of the sample and the view's number alone, so that teacher and student see the same."""

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

CHUNK = 256  # samples that are augmented at once, from a seed of their own


def load_augmentation(recipe_dir: Path, entry: EntryPoint) -> Augment:
    """Return the user's augmentation, its answers checked.

    Raises:
        RecipeError: if it cannot be loaded; the callable, if it fails or changes shapes or types.
    """
    import torch

    function = usercode.load_function(recipe_dir, entry)

    def augment(inputs: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        given = inputs[0] if len(inputs) == 1 else inputs
        made = usercode.call_user_code(function, entry, given, generator)
        found = (made,) if isinstance(made, torch.Tensor) else made
        alike = isinstance(found, tuple | list) and [_kind(item) for item in found] == [_kind(item) for item in inputs]
        if not alike:
            raise RecipeError(f"{entry}: must return what it was given, in the same shapes and types; it changed them")
        return tuple(found)

    return augment


def make_view(augment: Augment, split: str, inputs: tuple[Tensor, ...], number: int) -> tuple[Tensor, ...]:
    """Return one view of all samples of a split.

    Shapes:
        inputs, result: one tensor (n, ...) for each input of the student.
    """
    import torch

    made = tuple(torch.empty_like(item) for item in inputs)
    for start in range(0, len(inputs[0]), CHUNK):
        generator = torch.Generator().manual_seed(derive_seed("view", split, number, start))
        found = augment(tuple(item[start : start + CHUNK].clone() for item in inputs), generator)
        for whole, part in zip(made, found, strict=True):
            whole[start : start + CHUNK] = part
    return made


def _kind(item: object) -> object:
    import torch

    return (item.shape, item.dtype) if isinstance(item, torch.Tensor) else type(item)
