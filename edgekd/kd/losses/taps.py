# SPDX-License-Identifier: Apache-2.0
"""Taps: tensors inside two untouched networks, recorded by hooks on modules that the recipe names, and the losses between them.

The teacher runs beside the student on the same batch, frozen and in eval mode. Adapters, which make the student's width the
teacher's, live here and are trained with the student; no file of the student knows of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgekd import usercode
from edgekd.errors import RecipeError, did_you_mean
from edgekd.kd.losses.features import FEATURES
from edgekd.kd.reproducible import derive_seed

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor, nn

    from edgekd.domain.losses import Loss, Tap
    from edgekd.domain.recipe import EntryPoint

    Inputs = Sequence[Tensor] | Mapping[str, Tensor]

_SHOWN = 8
_MAP, _SEQUENCE, _MOST_AXES = 3, 3, 4


@dataclass(frozen=True, slots=True)
class Network:
    """A module and the entry that made it, for messages; ``role`` is ``student`` or ``teacher``."""

    role: str
    module: nn.Module
    entry: EntryPoint


@dataclass(slots=True)
class _Record:
    """What a tapped module did in the last forward pass; ``version`` is the output's when the module gave it."""

    calls: int = 0
    inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    output: Any = None
    version: int = 0


@dataclass(slots=True)
class TappedNetworks:
    """A student and its teacher with hooks on their taps; ``adapters`` belong into the optimizer and the checkpoint."""

    student: Network
    teacher: Network
    terms: Sequence[Loss]
    adapters: nn.ModuleDict
    records: dict[tuple[str, str], _Record]
    handles: list[Any] = field(default_factory=list)

    def counts_in(self, epoch: int) -> bool:
        """Return whether a term counts in an epoch, from 0."""
        return any(term.counts_in(epoch) for term in self.terms)

    def ask(self, inputs: Inputs) -> Any:
        """Show a batch to the teacher; return what it answers."""
        import torch

        with torch.no_grad():
            return _run(self.teacher, inputs)

    def loss(self, epoch: int) -> Tensor:
        """Return the weighted sum of the terms that count in an epoch (from 0; one does), for the batch that both have just seen."""
        terms = [term for term in self.terms if term.counts_in(epoch)]
        # read before any block runs again, which its hook would record
        pairs = {(kind, at): self.pair(tap) for kind, at, tap in _numbered(terms) if kind != "block"}
        summed = []
        for term in terms:
            for at, tap in enumerate(term.taps):
                found, wanted = self._of_block(tap) if term.kind == "block" else pairs[term.kind, at]
                if (name := _key(term.kind, at)) in self.adapters:
                    found = self.adapters[name](found)
                summed.append(float(term.weight) * FEATURES[term.kind](found, wanted, **term.options))
        self.forget()
        return sum(summed[1:], start=summed[0])

    def forget(self) -> None:
        """Drop what was recorded, so that no tensor of a batch stands for one of another."""
        for record in self.records.values():
            record.calls, record.inputs, record.output = 0, ((), {}), None

    def pair(self, tap: Tap) -> tuple[Tensor, Tensor]:
        """Return the tensors of a tap, the student's and the teacher's."""
        found, wanted = (_tensor(self.records[role, path], path) for role, path in (("student", tap.student), ("teacher", tap.teacher)))
        return found, wanted

    def _of_block(self, tap: Tap) -> tuple[Tensor, Tensor]:
        """Return what the student's block makes of the teacher's input of that block, and what the teacher made of it."""
        record = self.records["teacher", tap.teacher]
        arguments, named = record.inputs
        wanted = _tensor(record, tap.teacher)
        block = self.student.module.get_submodule(_path(tap.student)[0])
        made = usercode.call_user_code(
            lambda: block(*arguments, **named), self.student.entry, what=f"'{tap.student}' with the teacher's input"
        )
        return _picked(made, tap.student), wanted


def attach_taps(student: Network, teacher: Network, terms: Sequence[Loss], inputs: Inputs, seed: int) -> TappedNetworks:
    """Put hooks on two networks, after all taps were checked on a batch, and make the adapters that their shapes ask for.

    Args:
        student: Stays in the mode that it is in.
        teacher: Is frozen and put into eval mode.
        terms: Losses of the kinds in ``domain.losses.TAPPED``.
        inputs: A few samples, as the networks take them: by position, or by name.
        seed: For the adapters' weights.

    Raises:
        RecipeError: all that is wrong with the taps: no such module, not called or called twice, no tensor, changed in place
            afterwards, or shapes that do not match.
    """
    import torch

    teacher.module.eval().requires_grad_(requires_grad=False)
    tapped = TappedNetworks(student, teacher, terms, torch.nn.ModuleDict(), {})
    was_training = student.module.training
    try:
        _check(tapped, inputs, seed)
    except RecipeError:
        for handle in tapped.handles:
            handle.remove()
        raise
    finally:
        student.module.train(was_training)
        tapped.forget()
    return tapped


def _check(tapped: TappedNetworks, inputs: Inputs, seed: int) -> None:
    """Hook both networks, let them see a batch, and match their taps."""
    import torch

    networks = (tapped.student, tapped.teacher)
    _refuse([problem for network in networks for problem in _hook(tapped, network)])
    with torch.no_grad():  # not inference_mode, which counts no changes in place
        for network in networks:
            _run(network, inputs)
        _refuse([problem for (role, path), record in tapped.records.items() if (problem := _unfit(record, role, path))])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "adapters"))
            _refuse([problem for kind, at, tap in _numbered(tapped.terms) for problem in _match(tapped, kind, at, tap)])


def _run(network: Network, inputs: Inputs) -> Any:
    module = network.module.eval()
    if isinstance(inputs, Mapping):
        return usercode.call_user_code(lambda: module(**inputs), network.entry, what=f"forward() of the {network.role}")
    return usercode.call_user_code(module, network.entry, *inputs)


def _hook(tapped: TappedNetworks, network: Network) -> list[str]:
    """Hook the taps of a network; return what is wrong with their paths."""
    modules = dict(network.module.named_modules())
    problems = []
    for path in dict.fromkeys(getattr(tap, network.role) for term in tapped.terms for tap in term.taps):
        name, number = _path(path)
        if number is None or name not in modules or not name:
            shown = [each for each in modules if each]
            some = ", ".join(shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "")
            problems.append(
                f"tap '{path}' of the {network.role} ({network.entry}): no such module{did_you_mean(name, shown)}; it has {some}"
            )
            continue
        record = tapped.records[network.role, path] = _Record()
        tapped.handles.append(modules[name].register_forward_hook(_recorder(record, path), with_kwargs=True))
    return problems


def _recorder(record: _Record, path: str) -> Any:
    import torch

    def seen(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        record.calls += 1
        record.inputs, record.output = (arguments, named), output
        found = _picked(output, path)
        counted = isinstance(found, torch.Tensor) and not found.is_inference()
        record.version = found._version if counted else 0  # noqa: SLF001  (torch has no other name for it)

    return seen


def _unfit(record: _Record, role: str, path: str) -> str | None:
    """Return why a tap cannot be used after a forward pass, or None."""
    import torch

    where = f"tap '{path}' of the {role}"
    if record.calls != 1:
        how = "is not called in a forward pass" if record.calls == 0 else f"is called {record.calls} times in one forward pass"
        return f"{where}: the module {how}; name one that is called once"
    found = _picked(record.output, path)
    if not isinstance(found, torch.Tensor):
        several = isinstance(record.output, tuple | list)
        told = f"{len(record.output)} outputs" if several else type(record.output).__name__
        more = f"; name one by its number: '{_path(path)[0]}:0'" if several else ""
        return f"{where}: the module gives {told}; expected one tensor{more}"
    if found._version != record.version:  # noqa: SLF001  (as above)
        return f"{where}: what it gives is changed in place afterwards (by a ReLU with inplace=True?); name the module that changes it"
    if not found.is_floating_point():
        return f"{where}: the module gives {str(found.dtype).removeprefix('torch.')}; expected floating point numbers"
    return None


def _match(tapped: TappedNetworks, kind: str, at: int, tap: Tap) -> list[str]:
    """Make the adapter of a tap if it takes one; return what is wrong with the shapes."""
    where = f"{kind}: taps '{tap.student}' of the student and '{tap.teacher}' of the teacher"
    term = next(term for term in tapped.terms if term.kind == kind)
    try:
        found, wanted = tapped._of_block(tap) if kind == "block" else tapped.pair(tap)  # noqa: SLF001  (this module's own)
    except RecipeError as error:
        return [f"{where}: the student's block cannot take the teacher's input of that block; block needs equal shapes there ({error})"]
    shapes, told = (tuple(found.shape), tuple(wanted.shape)), f"give {list(found.shape)} and {list(wanted.shape)}"
    if len(shapes[0]) != len(shapes[1]) and kind != "relation":
        return [f"{where}: {told}; expected as many axes"]
    if problem := _mismatch(kind, str(term.options.get("over", "")), *shapes):
        return [f"{where}: {told}; {problem}"]
    if kind in {"hint", "hidden"}:
        axis = 2 if kind == "hidden" else 1
        narrow, wide = shapes[0][axis], shapes[1][axis]
        if narrow != wide:
            adapter = _adapter(narrow, wide, len(shapes[0]) - 2 if kind == "hint" else 0)
            tapped.adapters[_key(kind, at)] = adapter.to(found.device)
    return []


def _mismatch(kind: str, over: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> str | None:
    """Return what shapes with as many axes lack for a kind of loss, or None."""
    if found[:1] != wanted[:1] or len(found) < 2:  # noqa: PLR2004  (samples, and something of each)
        return "expected the batch as the first axis, and one more at least"
    if kind == "block" and found != wanted:
        return "block needs equal shapes"
    if kind == "hidden" and (len(found) != _SEQUENCE or found[1] != wanted[1]):
        return "expected (n, tokens, width) with as many tokens (are the vocabularies or lengths different?)"
    if kind == "hint" and len(found) > _MOST_AXES:
        return "expected (n, width), (n, channels, length) or (n, channels, height, width)"
    if over == "channels" and not _MAP <= len(found) <= _MOST_AXES:
        return "expected (n, channels, length) or (n, channels, height, width)"
    if over == "heads" and (len(found) != _MOST_AXES or found[2:] != wanted[2:]):
        return "expected (n, heads, queries, keys) with as many queries and keys (are the vocabularies or lengths different?)"
    return None


def _adapter(narrow: int, wide: int, axes_of_space: int) -> nn.Module:
    from torch import nn

    if axes_of_space == 0:
        return nn.Linear(narrow, wide)
    return nn.Conv1d(narrow, wide, 1) if axes_of_space == 1 else nn.Conv2d(narrow, wide, 1)


def _numbered(terms: Sequence[Loss]) -> list[tuple[str, int, Tap]]:
    return [(term.kind, at, tap) for term in terms for at, tap in enumerate(term.taps)]


def _key(kind: str, at: int) -> str:
    return f"{kind}_{at}"


def _path(text: str) -> tuple[str, int | None]:
    """Return the module's path and which of its outputs a tap means; the number is None if it is none."""
    name, _, number = text.partition(":")
    return name, int(number or 0) if not number or number.isdecimal() else None


def _picked(output: Any, path: str) -> Any:
    number = _path(path)[1]
    if ":" in path and isinstance(output, tuple | list) and number is not None and number < len(output):
        return output[number]
    return output


def _tensor(record: _Record, path: str) -> Tensor:
    if record.output is None:
        raise RecipeError(f"distill.losses: tap '{path}': the module was not called for this batch; name one that always is")
    found: torch.Tensor = _picked(record.output, path)
    return found


def _refuse(problems: list[str]) -> None:
    if problems:
        raise RecipeError(*(f"distill.losses: {problem}" for problem in problems))
