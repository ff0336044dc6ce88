# SPDX-License-Identifier: Apache-2.0
"""Modules from the user's code with weights from a file: students, and teachers given as weights.

``edgekd.kd.teachers.load`` also reads files that are whole models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgekd import usercode
from edgekd.errors import RecipeError
from edgekd.store.digests import write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from edgekd.domain.recipe import EntryPoint

_MAX_SHOWN = 3


def build_module(recipe_dir: Path, entry: EntryPoint) -> nn.Module:
    """Return the module that the user's function makes, with fresh weights: seed torch before.

    It is on the CPU, and without what ``torch.compile`` and parallel training put around it.

    Raises:
        RecipeError: if the function raises, does not return a module, or returns one that cannot be trained, stored and exported.
    """
    from torch import nn

    module = usercode.call_user_code(usercode.load_function(recipe_dir, entry), entry)
    if isinstance(module, type):
        raise RecipeError(f"{entry}: returned the class {module.__name__}; it must return a torch.nn.Module: return {module.__name__}(...)")
    if not isinstance(module, nn.Module):
        raise RecipeError(f"{entry}: returned {type(module).__name__}; it must return a torch.nn.Module")
    inner: nn.Module = usercode.call_user_code(unwrap, entry, module, what=f"an attribute of what {entry.function}() made")
    problem = usercode.call_user_code(_module_problem, entry, inner, what=f"state_dict() of what {entry.function}() made")
    if problem is not None:
        raise RecipeError(f"{entry}: {problem}")
    return inner.cpu()


def unwrap(module: nn.Module) -> nn.Module:
    """Return a module without the wrappers of ``torch.compile``, DataParallel and DistributedDataParallel, inside of it too."""
    module = _inner(module)
    pending, visited = [module], {id(module)}
    while pending:
        parent = pending.pop()
        parent._compiled_call_impl = None  # noqa: SLF001  (of Module.compile)
        for name, child in parent.named_children():
            inner = _inner(child)
            if inner is not child:
                setattr(parent, name, inner)
            if id(inner) not in visited:
                visited.add(id(inner))
                pending.append(inner)
    return module


def _inner(module: nn.Module) -> nn.Module:
    from torch import nn

    while isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel) or hasattr(module, "_orig_mod"):
        module = module._orig_mod if hasattr(module, "_orig_mod") else module.module  # type: ignore[assignment]  # noqa: SLF001  (torch's)
    return module


def _module_problem(module: nn.Module) -> str | None:
    """Return why a module cannot be trained, stored and exported, or None."""
    import torch
    from torch.nn.parameter import is_lazy

    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        return "returned a TorchScript module, which cannot be exported; return the module itself, without torch.jit.script or trace"
    tensors = [*module.named_parameters(), *module.named_buffers()]
    if lazy := [name for name, tensor in tensors if is_lazy(tensor)]:
        return f"{enumerate_names(lazy)} is lazy, without a shape; run the module on a sample before you return it, or name all sizes"
    if any(type(part).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")) for part in module.modules()):
        return "returned a quantized module; return the float32 module: edgekd quantizes the exported model"
    for name, tensor in tensors:
        if tensor.is_meta:
            return f"{name} is on the meta device, without values; make the module on the CPU, without torch.device('meta')"
        if tensor.is_quantized or tensor.is_complex():
            kind = str(tensor.dtype).removeprefix("torch.")
            return f"{name} is {kind}; expected real numbers (a complex weight as two: torch.view_as_real)"
    if names := _other_than_tensors(module.state_dict()):
        return f"the module's state holds {enumerate_names(names)}, which is not a tensor; keep state in parameters and buffers"
    return None


def trainable_problem(module: nn.Module, other: nn.Module, role: str) -> str | None:
    """Return why a network cannot be trained, or None; ``other`` is what the same function returned in another call."""
    import torch

    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not trainable:
        return f"the {role} has no trainable parameter"
    for name, parameter in trainable.items():
        if parameter.dtype != torch.float32:
            dtype = str(parameter.dtype).removeprefix("torch.")
            return f"{name} of the {role} is {dtype}; expected float32: return model.float()"
    if {*map(id, trainable.values())} & {*map(id, other.parameters())}:
        return "returns a module with the same parameters in each call; expected new ones: make it in the function"
    return None


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
    if problems := describe_mismatch(module.state_dict(), weights, where):
        raise RecipeError(*problems)
    module.load_state_dict(dict(weights), strict=True)


def describe_mismatch(state: Mapping[str, Tensor], weights: Mapping[str, Tensor], where: str) -> list[str]:
    """Return how weights differ from a module's state in names, shapes and kinds of numbers; at most six problems."""
    problems = []
    if missing := sorted(state.keys() - weights.keys()):
        problems.append(f"{where}: the weights lack {enumerate_names(missing)}")
    if unknown := sorted(weights.keys() - state.keys()):
        problems.append(f"{where}: the module has no {enumerate_names(unknown)}")
    for name in sorted(state.keys() & weights.keys()):
        value, expected = weights[name], state[name]
        is_old_scalar = expected.ndim == 0 and list(value.shape) == [1]  # of torch before 0.4; torch loads it
        if value.shape != expected.shape and not is_old_scalar:
            problems.append(f"{where}: {name} has shape {list(value.shape)}; the module's is {list(expected.shape)}")
        elif (kind := _kind(value)) != (expected_kind := _kind(expected)):
            problems.append(f"{where}: {name} is {kind}; the module's is {expected_kind}")
    return problems[: 2 * _MAX_SHOWN]


def _kind(tensor: Tensor) -> str:
    """Return the kind of a tensor's numbers: copying another kind would change them, or fail."""
    if tensor.is_meta:
        return "on the meta device, without values"
    if tensor.is_quantized:
        return "quantized"
    if tensor.is_sparse:
        return "sparse"
    if tensor.is_floating_point():
        return "floating-point"
    return "complex" if tensor.is_complex() else "whole numbers"


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a ``.safetensors`` file; ``kd.teachers.checkpoints`` reads other files of weights.

    Raises:
        RecipeError: if the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        raise RecipeError(f"{path.name}: is not a readable safetensors file ({error}); save it again") from error


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
        raise RecipeError(f"the module's state holds {enumerate_names(names)}, which is not a tensor; keep state in parameters and buffers")
    packed: bytes = save({name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in weights.items()})
    return packed


def parameter_count(module: nn.Module) -> int:
    """Return how many numbers the parameters hold; tied ones count once, buffers do not count."""
    return sum(parameter.numel() for parameter in module.parameters())


def _other_than_tensors(values: Mapping[str, Any]) -> list[str]:
    """Return the names of values that are not tensors."""
    import torch

    return sorted(name for name, value in values.items() if not isinstance(value, torch.Tensor))


def enumerate_names(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return ", ".join(names[:_MAX_SHOWN]) + more
