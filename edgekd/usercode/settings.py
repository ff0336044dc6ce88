# SPDX-License-Identifier: Apache-2.0
"""Settings of the whole process that the user's code may change, restored after each call: edgekd's own code depends on them.

In processes of edgekd's, also the standard streams: a file that is opened later would get the number of a closed one, and all that
native code prints with it.
"""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

WARNINGS = "the warnings filters"
NAMES = (
    "the recursion limit",
    WARNINGS,
    "numpy's error handling",
    "torch's gradient mode",
    "torch's default dtype",
    "torch's default device",
    "torch's number of threads",
    "torch's deterministic algorithms",
)
_STREAMS = {1: "stdout", 2: "stderr"}
_output: int | None = None  # a descriptor of what the standard streams of this process write to, if they are to be restored
undone: dict[str, set[str]] = {}  # entry point to the names of the settings that it changed


@contextmanager
def restored(entry: str) -> Iterator[None]:
    """Restore the settings at the end, and note in ``undone`` which of them an entry point has changed."""
    before = _read()
    try:
        yield
    finally:
        if (after := _read()) != before:
            for name, value, changed in zip(NAMES, before, after, strict=True):
                if value != changed and value is not None:  # None: not imported yet
                    _write(name, value)
                    if name != WARNINGS:  # packages change them when they are imported
                        undone.setdefault(entry, set()).add(name)
        if _output is not None:
            _restore_streams(_output)


def protect_streams() -> None:
    """Restore the standard streams of this process too; both write to one pipe."""
    global _output  # noqa: PLW0603  (one for the process)
    _output = os.dup(1)


def _restore_streams(output: int) -> None:
    for number, name in _STREAMS.items():
        try:
            is_open = os.path.sameopenfile(number, output)
        except OSError:
            is_open = False
        if not is_open:
            os.dup2(output, number)
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            file = open(number, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115  (it stays)
            setattr(sys, name, file)


def _read() -> tuple[Any, ...]:
    """Return the values, in the order of ``NAMES``; it runs twice per batch, so it makes no tensors and no dictionaries."""
    process = sys.getrecursionlimit(), tuple(warnings.filters)
    torch: Any = sys.modules.get("torch")
    if not hasattr(torch, "get_num_threads"):  # it is not imported, or not completely
        return (*process, *[None] * (len(NAMES) - len(process)))
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)  # noqa: SLF001  (the public function makes a tensor)
    return (
        *process,
        tuple(sys.modules["numpy"].geterr().values()),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        "cpu" if context is None else str(context.device),
        torch.get_num_threads(),
        (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
    )


def _write(name: str, value: Any) -> None:
    torch: Any = sys.modules.get("torch")
    numpy: Any = sys.modules.get("numpy")
    match name:
        case "the recursion limit":
            sys.setrecursionlimit(value)
        case "the warnings filters":  # WARNINGS
            warnings.filters[:] = value  # type: ignore[index]  # it is a list
            warnings._filters_mutated()  # type: ignore[attr-defined]  # noqa: SLF001  (as catch_warnings does)
        case "numpy's error handling":
            numpy.seterr(**dict(zip(numpy.geterr(), value, strict=True)))
        case "torch's gradient mode":
            torch.set_grad_enabled(value)
        case "torch's default dtype":
            torch.set_default_dtype(value)
        case "torch's default device":
            torch.set_default_device(None if value == "cpu" else value)
        case "torch's number of threads":
            torch.set_num_threads(value)
        case "torch's deterministic algorithms":
            torch.use_deterministic_algorithms(value[0], warn_only=value[1])
