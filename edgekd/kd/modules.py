# SPDX-License-Identifier: Apache-2.0
"""Modules from the user's code with weights from a file: students, and teachers given as weights.

``edgekd.kd.teachers.load`` also reads files that are whole models.
"""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
from typing import TYPE_CHECKING, Any

from edgekd import usercode
from edgekd.errors import RecipeError
from edgekd.store.digests import write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from edgekd.domain.recipe import EntryPoint

# what torch.load(weights_only=True) raises for files that are damaged or hold no weights
_UNREADABLE = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, EOFError, ImportError, OSError)
_MAX_SHOWN = 3


def build_module(recipe_dir: Path, entry: EntryPoint) -> nn.Module:
    """Return the module that the user's function makes, with fresh weights: seed torch before.

    Raises:
        RecipeError: if the function raises, or does not return a module.
    """
    from torch import nn

    module = usercode.call_user_code(usercode.load_function(recipe_dir, entry), entry)
    if not isinstance(module, nn.Module):
        raise RecipeError(f"{entry}: returned {type(module).__name__}; it must return a torch.nn.Module")
    return module


def load_module(recipe_dir: Path, entry: EntryPoint, weights: Path) -> nn.Module:
    """Return the module that the user's function makes, with weights from a file, in eval mode.

    Raises:
        RecipeError: if the function fails, or names or shapes of the weights differ from the module's.
    """
    module = build_module(recipe_dir, entry)
    load_weights(module, read_weights(weights), f"{entry} with {weights.name}")
    return module.eval()


def load_frozen_module(recipe_dir: Path, entry: EntryPoint, weights: Path) -> nn.Module:
    """Return a teacher as a module in eval mode whose parameters need no gradient.

    Raises:
        RecipeError: as :func:`load_module`.
    """
    return load_module(recipe_dir, entry, weights).requires_grad_(requires_grad=False)


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Copy weights into a module; every name and shape must match.

    Raises:
        RecipeError: that names the weights that are missing, unexpected or of another shape.
    """
    state = module.state_dict()
    problems = []
    if missing := sorted(state.keys() - weights.keys()):
        problems.append(f"{where}: the weights lack {_enumerate(missing)}")
    if unknown := sorted(weights.keys() - state.keys()):
        problems.append(f"{where}: the module has no {_enumerate(unknown)}")
    for name in sorted(state.keys() & weights.keys()):
        shape, expected = list(weights[name].shape), list(state[name].shape)
        if shape != expected:
            problems.append(f"{where}: {name} has shape {shape}; the module's is {expected}")
    if problems:
        raise RecipeError(*problems[: 2 * _MAX_SHOWN])
    module.load_state_dict(dict(weights), strict=True)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a ``.safetensors`` file, or of a plain state dict saved by torch; runs no code of the file.

    Raises:
        RecipeError: if the file is damaged, would run code, or holds anything but named tensors.
    """
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def save_weights(module: nn.Module, path: Path) -> None:
    """Write the weights as safetensors; equal weights give equal bytes.

    Tensors that share memory (tied weights) are written once under each of their names, so that any reader can load them.

    Raises:
        RecipeError: if the module's state holds anything but tensors.
    """
    write_atomically(path, serialize_weights(module.state_dict()))


def serialize_weights(weights: Mapping[str, Any]) -> bytes:
    """Return weights as the bytes of a safetensors file.

    Raises:
        RecipeError: if one is not a tensor (``get_extra_state``).
    """
    import torch
    from safetensors.torch import save

    if names := _other_than_tensors(weights):
        raise RecipeError(f"the module's state holds {_enumerate(names)}, which is not a tensor; keep state in parameters and buffers")
    packed: bytes = save({name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in weights.items()})
    return packed


def parameter_count(module: nn.Module) -> int:
    """Return how many numbers the parameters hold; tied ones count once, buffers do not count."""
    return sum(parameter.numel() for parameter in module.parameters())


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise RecipeError(f"{path.name}: is not a readable safetensors file ({error}); save it again") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about old pickles; all that matters is raised
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RecipeError(
            f"{path.name}: holds more than tensors and would run code when it is loaded, so it is refused; "
            "save only the weights: torch.save(model.state_dict(), path), or as .safetensors"
        ) from error
    except (*_UNREADABLE, struct.error, zipfile.BadZipFile) as error:
        raise RecipeError(f"{path.name}: cannot be read as weights ({type(error).__name__}); save model.state_dict() again") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise RecipeError(f"{path.name}: holds {type(content).__name__}; expected a state dict: torch.save(model.state_dict(), path)")
    if names := _other_than_tensors(content):
        raise RecipeError(
            f"{path.name}: {_enumerate(names)} is not a tensor; save only the state dict: torch.save(model.state_dict(), path)"
        )
    return content


def _other_than_tensors(values: Mapping[str, Any]) -> list[str]:
    """Return the names of values that are not tensors."""
    import torch

    return sorted(name for name, value in values.items() if not isinstance(value, torch.Tensor))


def _enumerate(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return ", ".join(names[:_MAX_SHOWN]) + more
