# SPDX-License-Identifier: Apache-2.0
"""Weights as users have them: checkpoints with other entries, prefixed, tied and renamed weights. What was changed is noted.

Files are read with ``weights_only=True``: they run no code. Names are matched to those of the module, which says what fits. Weights that
torch itself would load with ``strict=True`` are always loaded.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgekd.errors import RecipeError
from edgekd.kd.modules import describe_mismatch, enumerate_names
from edgekd.kd.teachers.checkpoints import read_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from edgekd.domain.recipe import EntryPoint

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # parts of names in compiled and sharded modules
_ALIASES = (  # weights of torch.nn.utils.weight_norm and spectral_norm, and the names of their parametrizations
    (r"(\w+)_g", r"parametrizations.\1.original0"),
    (r"(\w+)_v", r"parametrizations.\1.original1"),
    (r"(\w+)_orig", r"parametrizations.\1.original"),
    (r"(\w+)_u", r"parametrizations.\1.0._u"),
    (r"(\w+)_v", r"parametrizations.\1.0._v"),
    (r"parametrizations\.(\w+)\.original0", r"\1_g"),
    (r"parametrizations\.(\w+)\.original1", r"\1_v"),
    (r"parametrizations\.(\w+)\.original", r"\1_orig"),
    (r"parametrizations\.(\w+)\.0\._u", r"\1_u"),
    (r"parametrizations\.(\w+)\.0\._v", r"\1_v"),
)
_COUNTERS = ("num_batches_tracked",)  # of batch norm; eval mode does not read it, and torch before 0.4.1 had none
_FOREIGN = ("n_averaged", "total_ops", "total_params")  # what torch.optim.swa_utils and counters of operations add


@dataclass(frozen=True, slots=True)
class _Fit:
    """Weights under the names of the module, what is wrong with them, and what was changed."""

    weights: Mapping[str, Tensor]
    problems: list[str]
    notes: list[str] = field(default_factory=list)


def load_user_weights(module: nn.Module, path: Path, entry: EntryPoint) -> list[str]:
    """Load the weights of a user's file into a module; return notes on what was renamed or left out.

    Raises:
        RecipeError: if the file cannot be read, no part of it fits the module, or several parts fit and differ.
    """
    candidates = dict(_candidates(read_checkpoint(path)))
    where = f"{entry} with {path.name}"
    if not candidates:
        raise RecipeError(f"{path.name}: holds no weights; expected a state dict: torch.save(model.state_dict(), path)")
    fits = {key: _fit(module, weights, f"{where}{_index(key)}") for key, weights in candidates.items()}
    fitting = [key for key, fit in fits.items() if not fit.problems]
    if not fitting:
        best = max(fits, key=lambda key: len(fits[key].weights.keys() & module.state_dict().keys()) - len(fits[key].problems))
        raise RecipeError(*fits[best].problems)
    first = fitting[0]
    if different := [key for key in fitting[1:] if not _are_equal(fits[first].weights, fits[key].weights)]:
        choices = ", ".join(_index(key) or "the file itself" for key in (first, *different))
        remedy = f"torch.save(torch.load({path.name!r}, weights_only=True){_index(different[0])}, 'teacher.pth')"
        raise RecipeError(f"{where}: holds several weights that fit ({choices}); save the ones that you mean: {remedy}")
    fit = fits[first]
    module.load_state_dict(dict(fit.weights), strict=True)
    notes = [f"took the weights from {_index(first)}", *fit.notes] if first else fit.notes
    return [f"{path.name}: {'; '.join(notes)}"] if notes else []


def _index(key: tuple[str, ...]) -> str:
    return "".join(f"[{name!r}]" for name in key)


def _candidates(content: Mapping[object, object], key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yield the mappings from names to tensors that a checkpoint holds, at most two levels below the top, by their keys."""
    import torch

    if tensors := {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}:
        yield key, tensors
    if len(key) < 2:  # noqa: PLR2004  (levels)
        for name, value in content.items():
            if isinstance(name, str) and isinstance(value, Mapping):
                yield from _candidates(value, (*key, name))


def _fit(module: nn.Module, weights: Mapping[str, Tensor], where: str) -> _Fit:
    """Return weights under the names of a module: as they are, or else without or with a common prefix."""
    state = module.state_dict()
    plain, notes = _strip_wrappers(weights)
    fit = _complete(state, plain, where, notes)
    if not fit.problems:
        return fit
    if weights.keys() != state.keys() and _does_torch_load(module, weights):
        return _Fit(weights, [])
    others = [_complete(state, *renamed) for renamed in _other_prefixes(state, plain, where, notes)]
    fitting = [other for other in others if not other.problems]
    if any(not _are_equal(fitting[0].weights, other.weights) for other in fitting[1:]):
        prefixes = " and ".join(note for other in fitting for note in other.notes if "prefix" in note)
        return _Fit({}, [f"{where}: holds several weights that fit ({prefixes}), and they differ; save the ones that you mean"])
    return next(iter(fitting), min([fit, *others], key=lambda item: (len(state.keys() - item.weights.keys()), len(item.problems))))


def _strip_wrappers(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Remove from names what torch.compile and sharding add, anywhere."""
    plain = {".".join(part for part in name.split(".") if part not in _WRAPPERS): value for name, value in weights.items()}
    if plain.keys() == weights.keys() or len(plain) < len(weights):
        return dict(weights), []
    removed = sorted({f"'{part}.'" for name in weights for part in name.split(".") if part in _WRAPPERS})
    return plain, [f"removed {', '.join(removed)} from names"]


def _other_prefixes(
    state: Mapping[str, Tensor], weights: Mapping[str, Tensor], where: str, notes: Sequence[str]
) -> Iterator[tuple[dict[str, Tensor], str, list[str]]]:
    """Yield weights without each prefix that stands before names of the module, and with each prefix that all of them have."""
    if not state:
        return
    anchors = {alias for name in state for alias in (name, *_aliases(name))}
    prefixes = {name[: -len(tail)] for name in weights for tail in _tails(name) if tail in anchors}
    for prefix in sorted(prefixes):
        renamed = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        note = f"removed the prefix {prefix!r}"
        if ignored := sorted(name for name in weights if not name.startswith(prefix) and name not in _FOREIGN):
            note += f", left out {enumerate_names(ignored)}"
        yield renamed, f"{where} without the prefix {prefix!r}", [*notes, note]
    first = next(iter(state))
    for prefix in (first[: -len(tail)] for tail in _tails(first)):
        if all(name.startswith(prefix) for name in state):
            renamed = {f"{prefix}{name}": value for name, value in weights.items()}
            yield renamed, f"{where} with the prefix {prefix!r}", [*notes, f"added the prefix {prefix!r}"]


def _tails(name: str) -> list[str]:
    """Return what is left of a dotted name without its first parts: ``a.b.c`` -> ``b.c``, ``c``."""
    parts = name.split(".")
    return [".".join(parts[number:]) for number in range(1, len(parts))]


def _aliases(name: str) -> list[str]:
    """Return the other names of a normalized weight."""
    aliases = []
    for pattern, alias in _ALIASES:
        if match := re.fullmatch(rf"(.*\.)?{pattern}", name):
            aliases.append((match[1] or "") + match.expand(alias.replace(r"\1", r"\2")))
    return aliases


def _complete(state: Mapping[str, Tensor], weights: Mapping[str, Tensor], where: str, notes: Sequence[str]) -> _Fit:
    """Rename normalized weights, fill in tied names and counters, and compare all with the module's state."""
    renamed: dict[str, Tensor] = {}
    changes = []
    for name, value in weights.items():
        alias = next((alias for alias in _aliases(name) if alias in state and alias not in weights), None)
        if name not in state and name.rpartition(".")[2] in _FOREIGN:
            continue
        is_renamed = name not in state and alias is not None
        changes += [f"{name} is {alias}"] if is_renamed else []
        renamed[alias if is_renamed and alias else name] = value
    filled = []
    for name, value in state.items():
        if name in renamed:
            continue
        tied = next((other for other in _tied_names(state, name) if other in renamed), None)
        if tied is not None:
            renamed[name] = renamed[tied]
            filled.append(f"{name} is tied to {tied}")
        elif name.rpartition(".")[2] in _COUNTERS:
            renamed[name] = value
    problems = describe_mismatch(state, renamed, where) or _tie_problems(state, renamed, where)
    return _Fit(
        renamed, problems, [*notes, *([enumerate_names(changes)] if changes else []), *([enumerate_names(filled)] if filled else [])]
    )


def _tied_names(state: Mapping[str, Tensor], name: str) -> list[str]:
    """Return the other names of a tensor that a module has under several."""
    tensor = state[name]
    return [
        other
        for other, value in state.items()
        if other != name and tensor.numel() > 0 and value.data_ptr() == tensor.data_ptr() and value.shape == tensor.shape
    ]


def _tie_problems(state: Mapping[str, Tensor], weights: Mapping[str, Tensor], where: str) -> list[str]:
    """Return the names that are one weight in the module and different ones in the file."""
    import torch

    first_names: dict[tuple[object, ...], str] = {}
    problems = []
    for name, value in state.items():
        first = first_names.setdefault((value.data_ptr(), value.shape), name) if value.numel() else name
        if first != name and not torch.equal(weights[first].nan_to_num(), weights[name].nan_to_num()):  # NaN is reported for the outputs
            problems.append(f"{where}: {first} and {name} are one weight of the module; the file has different ones")
    return problems


def _does_torch_load(module: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Return whether torch loads weights into a module, whose own hooks may rename them."""
    try:
        copy.deepcopy(module).load_state_dict(dict(weights), strict=True)
    except Exception:  # noqa: BLE001  (code of the module runs here)
        return False
    return True


def _are_equal(weights: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    import torch

    return weights.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in weights.items())
