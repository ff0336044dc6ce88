# SPDX-License-Identifier: Apache-2.0
"""The helper process of :class:`~edgekd.build.worker.Worker`: it imports torch, then forks a process for each call.

It runs no code of torch itself, so it has no threads that a fork would lose and no state that a call could inherit.
"""

from __future__ import annotations

import builtins
import ctypes
import faulthandler
import fcntl
import gc
import importlib
import mmap
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from edgekd import usercode
from edgekd.build import messages
from edgekd.errors import EdgekdError

_PRELOADED = ("numpy", "torch", "torch._inductor")  # most steps need them; torch loads the last one to be deterministic
_CHANNEL_DESCRIPTOR = 500
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_SECONDS_BETWEEN_MESSAGES = 0.1
_BUILTINS = dict(vars(builtins))  # the user's code may replace them


def main(descriptor: int, parent: int, *, persistent: bool) -> None:
    """Fork a process for each call that arrives, and report how it ended, until the parent closes the channel."""
    _die_with(parent)
    _libc().prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what the user's code leaves running becomes a child of this process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles an interrupt and ends this process
    os.set_inheritable(descriptor, False)  # noqa: FBT003  (takes no keyword)
    sys.argv = sys.argv[:1]  # the user's code sees the same in each build
    channel = Connection(_move_up(descriptor))
    with suppress(ImportError):  # the steps that need them name them
        for name in _PRELOADED:
            importlib.import_module(name)
    gc.freeze()  # the processes share these pages
    running = mmap.mmap(-1, mmap.PAGESIZE)
    helper = os.getpid()
    while True:
        try:
            call = channel.recv_bytes()
        except EOFError:
            return
        usercode.note_running(running)
        child = os.fork()
        if child == 0:
            try:
                _die_with(helper)
                _serve(channel, call, persistent=persistent)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        _end_children()
        channel.send_bytes(messages.encode(("ended", os.waitstatus_to_exitcode(status), usercode.read_running(running))))


def _serve(channel: Connection, call: bytes, *, persistent: bool) -> None:
    """Run a call and send its result; a persistent process waits for the next one."""
    faulthandler.enable(file=2)
    usercode.protect_streams()
    usercode.quieten_libraries()
    own = os.getpid()
    while True:
        message = _run(channel, call)
        if os.getpid() != own:  # the user's code has forked, and this is the copy
            return
        channel.send_bytes(message)
        if not persistent:
            os._exit(0)  # threads and exit handlers of the user's code do not delay the build
        call = channel.recv_bytes()


def _run(channel: Connection, call: bytes) -> bytes:
    """Return the message with the result of a call."""
    last_time, last_text = 0.0, ""

    def progress(share: float, text: str) -> None:
        nonlocal last_time, last_text
        if text != last_text or time.monotonic() - last_time >= _SECONDS_BETWEEN_MESSAGES:
            last_time, last_text = time.monotonic(), text
            channel.send_bytes(messages.encode(("progress", share, text)))

    try:
        module, name, arguments, environment = messages.decode(call)
        os.environ.clear()
        os.environ.update(environment)
        function = getattr(importlib.import_module(module), name)
        result = ("returned", function(*arguments, progress=progress))
        vars(builtins).update(_BUILTINS)
        return messages.encode(result)
    except BaseException as error:  # noqa: BLE001  (the outermost level of this process)
        vars(builtins).update(_BUILTINS)
        return messages.encode(_describe(error))


def _describe(error: BaseException) -> tuple[Any, ...]:
    """Return the message about an exception."""
    if isinstance(error, EdgekdError):
        return "error", type(error).__name__, getattr(error, "problems", (str(error),))
    problem = usercode.describe_user_error(error)
    if problem is not None:
        return "error", "RecipeError", (problem,)
    if isinstance(error, MemoryError):
        return ("memory",)
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, OSError):
        return "os_error", (error.errno, error.strerror, error.filename), trace
    return "bug", None, trace


def _end_children() -> None:
    """End all processes that the user's code left behind, and their children in turn."""
    while children := [int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]:
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in children:
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _die_with(parent: int) -> None:
    """Let the kernel end this process when its parent ends."""
    _libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os._exit(1)


def _move_up(descriptor: int) -> int:
    """Return a descriptor of the channel above those that the user's code gets, and may close or write to by mistake."""
    try:
        high_descriptor = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _CHANNEL_DESCRIPTOR)
    except OSError:  # fewer are allowed
        return descriptor
    os.close(descriptor)
    return high_descriptor


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), persistent=sys.argv[3:] == ["persistent"])
