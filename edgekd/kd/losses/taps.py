# SPDX-License-Identifier: Apache-2.0
"""Taps: tensors inside two unchanged networks, recorded by hooks on modules that the recipe names, and the losses between them.

The teacher runs on the same batches as the student, frozen and in eval mode. Adapters project the student's tensors to the teacher's
width. They are created here and trained with the student, and are in no file of the student.
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
    from collections.abc import Iterable, Sequence

    import torch
    from torch import Tensor, nn

    from edgekd.domain.losses import Loss, Tap
    from edgekd.domain.recipe import EntryPoint

    Inputs = Sequence[Tensor] | Mapping[str, Tensor]

_MAX_SHOWN = 8  # module names in a message
_SEQUENCE_AXES, _MIN_MAP_AXES, _MAX_AXES = 3, 3, 4


@dataclass(frozen=True, slots=True)
class Network:
    """A module and the entry point that made it, for messages; ``role`` is ``student`` or ``teacher``."""

    role: str
    module: nn.Module
    entry: EntryPoint


@dataclass(slots=True)
class _Record:
    """The calls of a tapped module in the last forward pass: copies of its inputs (for ``block`` only) and of its output.

    Copies, as the network may change either in place afterwards.
    """

    calls: int = 0
    inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    output: Any = None


@dataclass(slots=True)
class TappedNetworks:
    """A student and its teacher with hooks on their taps; the optimizer and the checkpoint have to include ``adapters``."""

    student: Network
    teacher: Network
    losses: Sequence[Loss]
    adapters: nn.ModuleDict
    records: dict[tuple[str, str], _Record]  # by role and path
    handles: list[Any] = field(default_factory=list)

    def is_active_in(self, epoch: int) -> bool:
        """Return whether one of the losses is active in an epoch, from 0."""
        return any(loss.is_active_in(epoch) for loss in self.losses)

    def run_teacher(self, inputs: Inputs) -> Any:
        """Run the teacher on a batch, so that its taps are recorded; return its output."""
        import torch

        with torch.no_grad():
            return _forward(self.teacher, inputs)

    def loss(self, epoch: int) -> Tensor:
        """Return the weighted sum of the losses that are active in an epoch (from 0; one is), for the batch that both networks just ran."""
        losses = [loss for loss in self.losses if loss.is_active_in(epoch)]
        # read before any block runs again, which its hook would record
        pairs = {(kind, index): self.pair(tap) for kind, index, tap in _indexed_taps(losses) if kind != "block"}
        values = []
        for loss in losses:
            for index, tap in enumerate(loss.taps):
                student, teacher = self.block_pair(tap) if loss.kind == "block" else pairs[loss.kind, index]
                if (name := _adapter_name(loss.kind, index)) in self.adapters:
                    student = self.adapters[name](student)
                values.append(float(loss.weight) * FEATURES[loss.kind](student, teacher, **loss.options))
        self.clear()
        return sum(values[1:], start=values[0])

    def clear(self) -> None:
        """Drop all recorded tensors, so that none is used for another batch."""
        for record in self.records.values():
            record.calls, record.inputs, record.output = 0, ((), {}), None

    def pair(self, tap: Tap) -> tuple[Tensor, Tensor]:
        """Return the tensors of a tap, the student's and the teacher's."""
        return (
            _tensor(self.records["student", tap.student], tap.student),
            _tensor(self.records["teacher", tap.teacher], tap.teacher),
        )

    def block_pair(self, tap: Tap) -> tuple[Tensor, Tensor]:
        """Return the outputs of the student's block and of the teacher's, both for the teacher's input of that block.

        In training mode the student's batch norm normalizes with the statistics of this batch, and its running statistics, which
        are of the student's own activations, do not change.
        """
        from torch.func import functional_call

        record = self.records["teacher", tap.teacher]
        args, kwargs = clone_tensors(record.inputs)
        expected = _tensor(record, tap.teacher)
        block = self.student.module.get_submodule(_parse_path(tap.student)[0])
        buffers = clone_tensors(dict(block.named_buffers()))
        output = usercode.call_user_code(
            lambda: functional_call(block, buffers, args, kwargs), self.student.entry, what=f"'{tap.student}' with the teacher's input"
        )
        return _select_output(output, tap.student), expected


def attach_taps(student: Network, teacher: Network, losses: Sequence[Loss], inputs: Inputs, seed: int) -> TappedNetworks:
    """Put hooks on two networks, check all taps on a batch, and create the adapters that different widths need.

    Args:
        student: Stays in its mode (train or eval).
        teacher: Is frozen and put into eval mode.
        losses: Losses of the kinds in ``domain.losses.TAPPED``.
        inputs: A few samples, as the networks take them: by position, or by name.
        seed: Of the adapters' weights.

    Raises:
        RecipeError: all that is wrong with the taps: no such module, not called or called twice, no tensor, or shapes that do not
            match. The hooks are removed then.
    """
    import torch

    teacher.module.eval().requires_grad_(requires_grad=False)
    tapped = TappedNetworks(student, teacher, losses, torch.nn.ModuleDict(), {})
    was_training = student.module.training
    try:
        _check(tapped, inputs, seed)
    except RecipeError:
        for handle in tapped.handles:
            handle.remove()
        raise
    finally:
        student.module.train(was_training)
        tapped.clear()
    return tapped


def _check(tapped: TappedNetworks, inputs: Inputs, seed: int) -> None:
    """Hook both networks, run them on a batch, and match their taps."""
    import torch

    networks = (tapped.student, tapped.teacher)
    _raise_if_any(problem for network in networks for problem in _hook(tapped, network))
    with torch.no_grad():
        for network in networks:
            _forward(network, inputs)
        _raise_if_any(_tap_problem(record, role, path) for (role, path), record in tapped.records.items())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "adapters"))
            _raise_if_any(_match(tapped, loss, index) for loss in tapped.losses for index in range(len(loss.taps)))


def clone_tensors(tree: Any) -> Any:
    """Return a copy of each tensor in nested tuples, lists and mappings: whoever gets it may change it in place."""
    import torch
    from torch.utils._pytree import tree_map

    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, tree)


def _forward(network: Network, inputs: Inputs) -> Any:
    module, inputs = network.module.eval(), clone_tensors(inputs)
    if isinstance(inputs, Mapping):
        return usercode.call_user_code(lambda: module(**inputs), network.entry, what=f"forward() of the {network.role}")
    return usercode.call_user_code(module, network.entry, *inputs)


def _hook(tapped: TappedNetworks, network: Network) -> list[str]:
    """Hook the taps of a network; return the problems of their paths."""
    modules = dict(network.module.named_modules())
    problems = []
    for path in dict.fromkeys(getattr(tap, network.role) for loss in tapped.losses for tap in loss.taps):
        name, index = _parse_path(path)
        if index is None or name not in modules or not name:
            names = [name for name in modules if name]
            examples = ", ".join(names[:_MAX_SHOWN]) + (", ..." if len(names) > _MAX_SHOWN else "")
            problems.append(
                f"tap '{path}' of the {network.role} ({network.entry}): no such module{did_you_mean(name, names)}; it has {examples}"
            )
            continue
        record = tapped.records[network.role, path] = _Record()
        tapped.handles.append(modules[name].register_forward_hook(_output_recorder(record)))
        if network.role == "teacher" and any(path == tap.teacher for kind, _, tap in _indexed_taps(tapped.losses) if kind == "block"):
            tapped.handles.append(modules[name].register_forward_pre_hook(_input_recorder(record), with_kwargs=True))
    return problems


def _output_recorder(record: _Record) -> Any:
    def hook(_: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        record.calls += 1
        record.output = clone_tensors(output)

    return hook


def _input_recorder(record: _Record) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record.inputs = clone_tensors((args, kwargs))

    return hook


def _tap_problem(record: _Record, role: str, path: str) -> str | None:
    """Return why a tap cannot be used, judged after a forward pass, or None."""
    import torch

    where = f"tap '{path}' of the {role}"
    if record.calls != 1:
        calls = "is not called in a forward pass" if record.calls == 0 else f"is called {record.calls} times in one forward pass"
        return f"{where}: the module {calls}; name one that is called once"
    if ":" in path and isinstance(record.output, torch.Tensor):
        return f"{where}: the module returns one tensor; expected '{_parse_path(path)[0]}', without a number"
    tensor = _select_output(record.output, path)
    if not isinstance(tensor, torch.Tensor):
        is_several = isinstance(record.output, tuple | list)
        returned = f"{len(record.output)} outputs" if is_several else type(record.output).__name__
        hint = f"; name one by its number: '{_parse_path(path)[0]}:0'" if is_several else ""
        return f"{where}: the module returns {returned}; expected one tensor{hint}"
    if not tensor.is_floating_point():
        return f"{where}: the module returns {str(tensor.dtype).removeprefix('torch.')}; expected floating point numbers"
    return None


def _match(tapped: TappedNetworks, loss: Loss, index: int) -> str | None:
    """Create the adapter of a tap if it needs one; return the problem of the shapes, or None."""
    kind, tap = loss.kind, loss.taps[index]
    where = f"{kind}: taps '{tap.student}' of the student and '{tap.teacher}' of the teacher"
    try:
        student, teacher = tapped.block_pair(tap) if kind == "block" else tapped.pair(tap)
    except RecipeError as error:
        return f"{where}: the student's block cannot take the teacher's input of that block; block needs equal shapes there ({error})"
    shapes = tuple(student.shape), tuple(teacher.shape)
    if problem := _shape_problem(kind, str(loss.options.get("over", "")), *shapes):
        return f"{where}: have shapes {list(student.shape)} and {list(teacher.shape)}; {problem}"
    if kind in {"hint", "hidden"}:
        axis = 2 if kind == "hidden" else 1
        student_width, teacher_width = shapes[0][axis], shapes[1][axis]
        if student_width != teacher_width:
            adapter = _adapter(student_width, teacher_width, student.ndim - 2 if kind == "hint" else 0)
            tapped.adapters[_adapter_name(kind, index)] = adapter.to(student.device)
    return None


def _shape_problem(kind: str, over: str, student: tuple[int, ...], teacher: tuple[int, ...]) -> str | None:
    """Return what a kind of loss expects that the shapes of two tensors do not satisfy, or None."""
    axes = len(student)
    if axes != len(teacher) and kind != "relation":
        return "expected the same number of axes"
    if student[:1] != teacher[:1] or axes < 2:  # noqa: PLR2004  (the batch and one more)
        return "expected the batch as the first axis, and at least one more axis"
    if kind == "block" and student != teacher:
        return "block needs equal shapes"
    if kind == "hidden" and (axes != _SEQUENCE_AXES or student[1] != teacher[1]):
        return "expected (n, tokens, width) with the same number of tokens (are the vocabularies or lengths different?)"
    if kind == "hint" and axes > _MAX_AXES:
        return "expected (n, width), (n, channels, length) or (n, channels, height, width)"
    if over == "channels" and not _MIN_MAP_AXES <= axes <= _MAX_AXES:
        return "expected (n, channels, length) or (n, channels, height, width)"
    if over == "heads" and (axes != _MAX_AXES or student[2:] != teacher[2:]):
        return "expected (n, heads, queries, keys) with the same numbers of queries and keys (are the vocabularies or lengths different?)"
    return None


def _adapter(student_width: int, teacher_width: int, spatial_axes: int) -> nn.Module:
    from torch import nn

    if spatial_axes == 0:
        return nn.Linear(student_width, teacher_width)
    convolution = nn.Conv1d if spatial_axes == 1 else nn.Conv2d
    return convolution(student_width, teacher_width, 1)


def _indexed_taps(losses: Sequence[Loss]) -> list[tuple[str, int, Tap]]:
    """Return the taps of losses, each with the loss's kind and its index there."""
    return [(loss.kind, index, tap) for loss in losses for index, tap in enumerate(loss.taps)]


def _adapter_name(kind: str, index: int) -> str:
    return f"{kind}_{index}"


def _parse_path(path: str) -> tuple[str, int | None]:
    """Return the module's dotted path and the index of the output that a tap names (0 if none); None if that is not a number."""
    name, _, index = path.partition(":")
    return name, int(index or 0) if not index or index.isdecimal() else None


def _select_output(output: Any, path: str) -> Any:
    index = _parse_path(path)[1]
    if ":" in path and isinstance(output, tuple | list) and index is not None and index < len(output):
        return output[index]
    return output


def _tensor(record: _Record, path: str) -> Tensor:
    if record.output is None:
        raise RecipeError(
            f"distill.losses: tap '{path}': the module was not called for this batch; name one that is called for every batch"
        )
    tensor: torch.Tensor = _select_output(record.output, path)
    return tensor


def _raise_if_any(problems: Iterable[str | None]) -> None:
    if messages := [f"distill.losses: {problem}" for problem in problems if problem]:
        raise RecipeError(*messages)
