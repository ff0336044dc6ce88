# SPDX-License-Identifier: Apache-2.0
"""This machine: harness processes are children of this one."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from edgekd.errors import printable
from edgekd.harness import board, runner
from edgekd.ports import ProcessEnd
from edgekd.store import locks
from edgekd.store.digests import tool_version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from edgekd.domain.artifact import Json
    from edgekd.domain.device import DeviceSpec

KIND = "local"
END_S = 30  # for a process to end after it has closed its output


@contextmanager
def connect(spec: DeviceSpec) -> Iterator[Local]:
    """Yield the connection to this machine."""
    yield Local(spec.label)


class Local:
    """This machine as a device; see :class:`edgekd.ports.Connection`."""

    kind = KIND

    def __init__(self, label: str) -> None:
        self.label = label

    def facts(self) -> Mapping[str, Json]:
        """Return the facts of this machine."""
        return runner.facts()  # type: ignore[no-any-return]  # the harness has no types

    def versions(self, packages: Sequence[str]) -> Mapping[str, str | None]:
        """Return the versions of installed distributions."""
        return {package: tool_version(package) for package in packages}

    def lease(self, on_wait: Callable[[str], None] | None = None) -> AbstractContextManager[None]:
        """Hold exclusive access to this machine."""
        return locks.machine_exclusive(on_wait)

    def push(self, path: Path) -> str:
        """Return the path of the file itself."""
        return str(path)

    def pull(self, path: str) -> bytes:
        """Return the content of a file."""
        return Path(path).read_bytes()

    def cpu_seconds(self) -> float:
        """Return the CPU time of this process and of its children that have ended."""
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system

    @contextmanager
    def start(self) -> Iterator[LocalProcess]:
        """Start a harness process; it ends when its input closes, so it does not outlive this process."""
        with tempfile.TemporaryFile() as stderr:  # a pipe that nobody reads would fill up
            process = subprocess.Popen(
                [sys.executable, "-P", str(Path(runner.__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=board.inherited_variables(),
            )
            try:
                yield LocalProcess(process, stderr)
            finally:
                process.kill()
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    try:
                        pipe.close()  # type: ignore[union-attr]  # both are pipes
                    except BrokenPipeError:  # a command was not read
                        continue


class LocalProcess:
    """A harness process and its pipes."""

    def __init__(self, process: subprocess.Popen[str], stderr: IO[bytes]) -> None:
        self.process, self.stderr = process, stderr

    def exchange(self, line: str, timeout_s: float) -> str | ProcessEnd:
        """Send a command and return the reply, or how the process ended."""
        stdin, stdout = self.process.stdin, self.process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the harness has no pipes")
        try:
            stdin.write(line + "\n")
            stdin.flush()
        except BrokenPipeError:
            return self._end()
        if not select.select([stdout], [], [], timeout_s)[0]:
            return ProcessEnd(None)
        reply = stdout.readline()
        return reply if reply.endswith("\n") else self._end()

    def _end(self) -> ProcessEnd:
        code = self.process.wait(END_S)
        self.stderr.seek(0)
        return ProcessEnd(code, printable(board.last_line(self.stderr.read())))
