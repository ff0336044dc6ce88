# SPDX-License-Identifier: Apache-2.0
"""Run functions in processes of their own, so that neither the user's code nor native code can end a build or leave a trace in it.

A helper process imports torch once and forks a process for each call, which inherits the import and nothing else. Whatever a step
changes (modules, global settings of torch, the environment, its streams) ends with its process. docs/decisions/0013-worker.md
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from edgekd import errors, usercode
from edgekd.build import messages
from edgekd.errors import EdgekdError, OutOfMemoryError, ProcessDiedError, StageError, printable

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from pathlib import Path

    from edgekd.ports import Progress

# OpenMP threads spin this long at a barrier before they sleep: beside other load they would spin in vain, by default for seconds.
# Results are the same. libgomp reads it when torch is loaded; docs/decisions/0012-threads.md
SPIN_COUNT = "2000"
_OUTPUT_BYTES = 65536  # the end of what a process prints: enough for the tracebacks of all its threads
_LAST_LINES = 3
# what a process sends, and how many values come with it
_KINDS = {"progress": 2, "ended": 2, "returned": 1, "error": 2, "memory": 0, "os_error": 2, "bug": 2}


class Worker:
    """Runs calls one after the other, each in a fresh process.

    Args:
        recipe_dir: Error messages name the user's files relative to this folder.
        persistent: All calls share one process, as the ranks of torchrun need it for their process group.
    """

    def __init__(self, recipe_dir: Path, *, persistent: bool = False) -> None:
        self.recipe_dir, self._persistent = recipe_dir, persistent
        self._helper: subprocess.Popen[bytes] | None = None
        self._channel: Connection | None = None
        self._printed = b""

    def call(self, name: str, function: Callable[..., Any], *arguments: Any, progress: Progress, max_silence_s: float | None = None) -> Any:
        """Return ``function(*arguments, progress=progress)``, computed in another process.

        The function is one of a module; its arguments and its result are what :mod:`~edgekd.build.messages` can carry. What it prints is
        shown only if the process dies.

        Args:
            name: What is run, for error messages.
            function: What to call.
            arguments: Its positional arguments.
            progress: Called in this process.
            max_silence_s: The process is ended if it reports no progress for so long; None for no limit.

        Raises:
            EdgekdError: what the function raised.
            ProcessDiedError: if the process ended before the function returned.
            OSError: what the function raised.
            StageError: for any other exception, with its traceback as the cause.
        """
        helper, channel = self._start()
        self._printed = b""
        result: tuple[Any, ...] = ()
        try:
            channel.send_bytes(messages.encode((function.__module__, function.__qualname__, arguments, _environment())))
            while True:
                kind, *content = self._receive(helper, channel, max_silence_s)
                if kind == "progress":
                    progress(*content)
                elif kind == "ended":
                    break
                else:
                    result = (kind, *content)
                    if self._persistent:
                        break
        except TimeoutError:
            self.close()
            reason = f"the process was ended: it reported nothing for {max_silence_s:g} s"
            raise ProcessDiedError(name, reason, in_user_code=False, temporary=True) from None
        except (OSError, EOFError, messages.MessageError):
            self.close()
            content = [helper.returncode, None]
        except BaseException:
            self.close()
            raise
        if not result:
            if self._helper is not None and self._persistent:
                self.close()
            exit_code, running = content
            raise _death(name, exit_code, running, self._printed, self.recipe_dir)
        return _unpack(name, *result)

    def close(self) -> None:
        """End all processes."""
        helper, channel, self._helper, self._channel = self._helper, self._channel, None, None
        if helper is None or channel is None:
            return
        helper.kill()  # the kernel then ends the process that it forked
        helper.wait()
        with suppress(BlockingIOError):
            self._read_output(helper)
        channel.close()
        if helper.stdout is not None:
            helper.stdout.close()

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection]:
        if self._helper is not None and self._channel is not None:
            return self._helper, self._channel
        # imported only when a step runs: a build with nothing to do starts no process
        from multiprocessing.connection import Connection
        from socket import socketpair

        mine, theirs = socketpair()
        # -P: no module in the current folder can replace one of edgekd's; -u: what is printed before a crash is not lost
        options = [str(theirs.fileno()), str(os.getpid()), *(["persistent"] if self._persistent else [])]
        helper = subprocess.Popen(
            [sys.executable, "-P", "-u", "-m", "edgekd.build.worker_process", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_environment(),
            pass_fds=(theirs.fileno(),),
        )
        theirs.close()
        self._helper, self._channel = helper, Connection(mine.detach())
        if helper.stdout is not None:
            os.set_blocking(helper.stdout.fileno(), False)
        return helper, self._channel

    def _receive(self, helper: subprocess.Popen[bytes], channel: Connection, max_seconds: float | None) -> Any:
        """Return the next message; meanwhile read what the processes print.

        Raises:
            TimeoutError: if none comes in time.
            MessageError: if it is not one of a process.
        """
        from multiprocessing.connection import wait

        sources: list[Any] = [channel, helper.stdout]
        started = time.monotonic()
        while True:
            ready: list[Any] = wait(sources, None if max_seconds is None else max(0.0, started + max_seconds - time.monotonic()))
            if not ready and max_seconds is not None:
                raise TimeoutError
            if helper.stdout in ready and not self._read_output(helper):
                sources.remove(helper.stdout)
            if channel in ready:
                message = _check(messages.decode(channel.recv_bytes()))
                if message[0] != "progress":
                    with suppress(BlockingIOError):
                        self._read_output(helper)
                return message

    def _read_output(self, helper: subprocess.Popen[bytes]) -> bool:
        """Read what is there, and remember its end; return whether there may be more."""
        assert helper.stdout is not None  # noqa: S101  (a pipe was requested)
        chunk = os.read(helper.stdout.fileno(), _OUTPUT_BYTES)
        self._printed = (self._printed + chunk)[-_OUTPUT_BYTES:]
        return bool(chunk)


def _environment() -> dict[str, str]:
    """Return the environment of the processes: a fixed hash seed, so that sets have the same order in each build."""
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    if "OMP_WAIT_POLICY" not in os.environ:
        environment.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    return environment


def _check(message: Any) -> tuple[Any, ...]:
    if not isinstance(message, tuple) or not message or _KINDS.get(message[0]) != len(message) - 1:
        raise messages.MessageError(f"not a message of a process: {message!r:.100}")
    return message


def _unpack(name: str, kind: str, *content: Any) -> Any:
    """Return the result of a call, or raise its error."""
    if kind == "returned":
        return content[0]
    if kind == "error":
        class_name, problems = content
        error_class = getattr(errors, str(class_name), None)
        if isinstance(error_class, type) and issubclass(error_class, EdgekdError):
            raise error_class(*problems)
        raise StageError(f"{name}: {class_name}: {'; '.join(map(str, problems))}")
    if kind == "memory":
        raise OutOfMemoryError(f"{name}: there is not enough memory; expected more, or smaller batches")
    description, trace = content
    cause = RuntimeError(f"{name}: in its process:\n{trace}")
    if kind == "os_error":
        raise OSError(*description) from cause
    raise StageError(f"{name}: {printable(trace.strip().splitlines()[-1])}; check what the recipe's code does to Python") from cause


def _death(name: str, exit_code: int, running: str | None, printed: bytes, recipe_dir: Path) -> ProcessDiedError:
    """Return the error for a process that ended without a result. ``running``: the entry point whose code ran."""
    lines = [text for line in printed.decode(errors="replace").splitlines() if (text := printable(line.strip()))]
    if exit_code < 0:
        end = f"was ended by signal {_signal_name(-exit_code)}"
        end += " (was there enough memory?)" if exit_code == -signal.SIGKILL else ""
    else:
        end = f"ended with exit code {exit_code}"
    fault = next((number for number, line in enumerate(lines) if line.startswith("Fatal Python error")), len(lines))
    dump = lines[fault:]  # the stacks of all threads, and first of all other threads
    current = next((number for number, line in enumerate(dump) if line.startswith("Current thread")), 0)
    locations = [place for line in dump[current:] if (place := _location(line, recipe_dir))]
    reason = f"the process {end}{f' at {locations[0]}' if locations else ''}"
    if running is not None:
        reason = f"{running}: {reason} while this ran"
    if lines[:fault]:
        reason += f"; its last output: {printable(' | '.join(lines[:fault][-_LAST_LINES:]))}"
    return ProcessDiedError(name, reason, in_user_code=running is not None, temporary=exit_code == -signal.SIGKILL)


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else str(number)  # those for real time have no names


def _location(line: str, recipe_dir: Path) -> str | None:
    """Return ``file:line`` of a line of a fault's traceback, ``File "data.py", line 3 in splits``, if the file is the user's."""
    parts = line.split('"')
    expected = 3
    if not line.startswith('File "') or len(parts) != expected or not usercode.is_user_file(parts[1]):
        return None
    return f"{os.path.relpath(parts[1], recipe_dir)}:{parts[2].removeprefix(', line ').partition(' ')[0]}"
