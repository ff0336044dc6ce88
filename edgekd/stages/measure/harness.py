# SPDX-License-Identifier: Apache-2.0
"""One model file in a harness process on a device: commands, replies, and what is said about a process that ended."""

from __future__ import annotations

import json
import signal
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekd import registry
from edgekd.errors import HarnessError, UnavailableError
from edgekd.ports import ProcessEnd

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from edgekd.ports import Connection, Process

TIMEOUT_S = 600


@contextmanager
def start(connection: Connection, subject: Mapping[str, Any]) -> Iterator[Harness]:
    """Start the process of a subject (``id``, ``runtime``); it ends with the context."""
    with connection.start() as process:
        yield Harness(connection, process, subject)


@dataclass(frozen=True, slots=True)
class Harness:
    """A harness process on a device, and the subject that it runs."""

    connection: Connection
    process: Process
    subject: Mapping[str, Any]

    def send(self, **command: Any) -> dict[str, Any]:
        """Send a command and return the reply.

        Raises:
            HarnessError: if the process has ended or does not reply.
            UnavailableError: if the runtime is missing, or the connection to the device ended.
        """
        reply = self.process.exchange(json.dumps(command), TIMEOUT_S)
        if isinstance(reply, ProcessEnd):
            raise self._error(reply, command["do"])
        content: dict[str, Any] = json.loads(reply)
        return content

    def _error(self, end: ProcessEnd, command: str) -> HarnessError | UnavailableError:
        if end.code is None:
            return HarnessError(self.subject["id"], f"the harness did not reply to '{command}' within {TIMEOUT_S} s")
        runtime = self.subject["runtime"]
        if "ModuleNotFoundError" in end.last_line or "ImportError" in end.last_line:
            package = registry.runtime(runtime).PACKAGE
            place = "" if self.connection.kind == "local" else f" on {self.connection.label}"
            return UnavailableError(f"measure: {runtime} cannot be imported{place} ({end.last_line}); run{place}: pip install {package}")
        status = f"exit code {end.code}" if end.code >= 0 else signal.Signals(-end.code).name
        if end.code == -signal.SIGKILL:
            status += ", as the kernel does when memory runs out"
        return HarnessError(self.subject["id"], f"the harness ended with {status}; last line of its output: {end.last_line}")
