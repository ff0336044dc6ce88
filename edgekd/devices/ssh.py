# SPDX-License-Identifier: Apache-2.0
"""A board over SSH: the user's own ``ssh``, with one connection that carries commands, files and the harness's lines.

The ``ssh`` program reads ``~/.ssh/config``, so jump hosts, agents and known hosts work as they do in a terminal. It never asks
(``BatchMode``), and host keys are always checked. What runs on the board is ``edgekd/harness/board.py``, which is sent as text.
"""

from __future__ import annotations

import getpass
import json
import os
import platform
import re
import select
import shlex
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from edgekd.errors import UnavailableError, printable
from edgekd.harness import board, runner
from edgekd.ports import ProcessEnd
from edgekd.store.digests import file_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from edgekd.domain.artifact import Json
    from edgekd.domain.device import DeviceSpec

KIND = "ssh"
OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "ConnectTimeout": "10",
    "ServerAliveInterval": "5",  # three times without a reply: the network is gone
    "ServerAliveCountMax": "3",
    "RemoteCommand": "none",
    "ClearAllForwardings": "yes",
}
GREETING_S = 60  # a slow board, and what its login shell does first
REPLY_S = 120  # of one command, beyond the time that the command itself allows
SIGN_OF_LIFE_S = 10
LEASE_WAIT_S = 5  # of one try
CLOSE_S = 10
MAX_NOISE_BYTES = 2**20  # before the greeting
TRANSPORT_ERROR = 255  # exit code of ssh
MISSING_COMMAND = (126, 127)  # exit codes of a shell
# what ssh prints -> what to do about it
ADVICE = {
    "REMOTE HOST IDENTIFICATION HAS CHANGED": (
        "its host key is not the one that is known: {line}; if you know why (a new system was installed), remove the old key: "
        "ssh-keygen -R {known_host}"
    ),
    "Host key verification failed": "its host key is not known; check its fingerprint and accept it once: {command}",
    "Permission denied": "it refused the login ({line}); edgekd asks for no password: set up a key with ssh-copy-id, then try {command}",
    "Connection refused": "it refused the connection ({line}); start sshd there, or name another port",
    "Could not resolve hostname": "its name is not known ({line}); expected user@host, or a host of your ssh configuration",
    "connect to host": "it cannot be reached ({line}); is it switched on and in this network?",
    "timed out": "it did not reply ({line}); is it switched on and in this network?",
}


@contextmanager
def connect(spec: DeviceSpec) -> Iterator[Ssh]:
    """Open a board; at the end nothing runs or lies there, except files that are stored by their content.

    Raises:
        UnavailableError: if ssh is not installed, the board cannot be reached, or has no Python 3.9.
    """
    if shutil.which("ssh") is None:
        raise UnavailableError(f"device {spec.label}: ssh is not installed; run: apt-get install openssh-client")
    program = Path(board.__file__).read_bytes()
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            [*arguments(spec), start_command(spec.python, len(program))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            bufsize=0,
            env={**os.environ, "SSH_ASKPASS_REQUIRE": "never"},  # also for a jump host, which the options do not reach
            start_new_session=True,  # an interrupt in the terminal ends it through its input, so that the board cleans up; no questions
        )
        connection = Ssh(spec, process, stderr)
        try:
            connection.open(program)
            yield connection
        finally:
            connection.close()


def arguments(spec: DeviceSpec) -> list[str]:
    """Return the command line of ssh, without the command for the board."""
    options = [part for name, value in OPTIONS.items() for part in ("-o", f"{name}={value}")]
    config = [] if spec.ssh_config is None else ["-F", spec.ssh_config]
    port = [] if spec.port is None else ["-p", str(spec.port)]
    return ["ssh", "-T", *config, *options, *port, "--", spec.address]


def start_command(python: str, size: int) -> str:
    """Return the shell command that runs a program of ``size`` bytes, which is read from the input."""
    code = f'import os;s=b"";exec("while len(s)<{size}:s+=os.read(0,{size}-len(s)) or exit(1)");exec(s)'
    return f"exec {shlex.quote(python)} -c {shlex.quote(code)}"


class Ssh:
    """A board, see :class:`edgekd.ports.Connection`; one command at a time."""

    kind = KIND

    def __init__(self, spec: DeviceSpec, process: subprocess.Popen[bytes], stderr: IO[bytes]) -> None:
        self.spec, self.label = spec, spec.label
        self.process, self.stderr = process, stderr
        self.buffer = b""
        self.paths: dict[str, str] = {}  # on the board, by the names of files

    def open(self, program: bytes) -> None:
        """Send the program, and wait until it runs.

        Raises:
            UnavailableError: if it does not.
        """
        self._write(program)
        deadline, noise = time.monotonic() + GREETING_S, 0
        while not (line := self._read_line(deadline)).startswith(board.GREETING.encode()):
            noise += len(line)
            if noise > MAX_NOISE_BYTES:
                raise UnavailableError(f"device {self.label}: its login shell does not stop printing; run: {self._command('true')}")
        greeting = json.loads(line[len(board.GREETING) :])
        if tuple(map(int, greeting["python"].split("."))) < board.MIN_PYTHON:
            needed = ".".join(map(str, board.MIN_PYTHON))
            raise UnavailableError(
                f"device {self.label}: {greeting['executable']} is Python {greeting['python']}; expected {needed} or newer; "
                f"name another with python = ... in devices.toml"
            )

    def close(self) -> None:
        """End the connection, and wait until the board has cleaned up."""
        with suppress(BrokenPipeError):
            self._stdin.close()
        try:
            self.process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._stdout.close()

    def facts(self) -> Mapping[str, Json]:
        """Return the facts of the board."""
        with self.start() as process:
            reply = process.exchange(json.dumps({"do": "facts"}), REPLY_S)
        if isinstance(reply, ProcessEnd):
            raise UnavailableError(f"device {self.label}: its facts cannot be read: {reply.last_line}")
        facts: Mapping[str, Json] = json.loads(reply)
        return facts

    def versions(self, packages: Sequence[str]) -> Mapping[str, str | None]:
        """Return the versions of distributions in the board's Python."""
        versions: Mapping[str, str | None] = self.request("versions", packages=list(packages))["versions"]
        return versions

    @contextmanager
    def lease(self, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
        """Hold exclusive access to the board: the lock that a build on the board itself takes too. It ends with the connection."""
        holder, wait_s = f"edgekd of {getpass.getuser()} on {platform.node()}", 0
        while not (reply := self.request("lease", seconds=wait_s, holder=holder))["held"]:
            if on_wait is not None and not wait_s:
                on_wait(printable(reply["holder"]))
            wait_s = LEASE_WAIT_S
        try:
            yield
        finally:
            self._request_at_end("release")

    def push(self, path: Path) -> str:
        """Return the path on the board of a file with the same content, which is copied if it is not there."""
        name = file_digest(path) + path.suffix
        if name not in self.paths:
            present = self.request("have", name=name)["path"]
            self.paths[name] = present if present is not None else self._put(path, name)
        return self.paths[name]

    def _put(self, path: Path, name: str) -> str:
        size = path.stat().st_size
        self._send("put", name=name, size=size)
        with path.open("rb") as file:
            while data := file.read(2**20):
                self._write(data)
        stored: str = self._reply("put", REPLY_S)["path"]
        return stored

    def pull(self, path: str) -> bytes:
        """Return the content of a file on the board."""
        size = self.request("get", path=path)["size"]
        deadline = time.monotonic() + REPLY_S
        while len(self.buffer) < size:
            self._fill(deadline)
        content, self.buffer = self.buffer[:size], self.buffer[size:]
        self._reply("get", REPLY_S)
        return content

    def cpu_seconds(self) -> float:
        """Return the CPU time on the board of this connection, and of its processes that have ended."""
        seconds: float = self.request("cpu")["seconds"]
        return seconds

    @contextmanager
    def start(self) -> Iterator[SshProcess]:
        """Start a harness process on the board; it ends with the context, and with the connection."""
        number = self.request("start", path=self.push(Path(runner.__file__)))["process"]
        try:
            yield SshProcess(self, number)
        finally:
            self._request_at_end("stop", process=number)

    def request(self, command: str, *, wait_s: float = 0, **values: Any) -> dict[str, Any]:
        """Send a command to the board and return its reply. ``wait_s``: how long the command itself may take.

        Raises:
            UnavailableError: if the connection ended, or the board could not do it.
        """
        self._send(command, **values)
        return self._reply(command, wait_s + REPLY_S)

    def _request_at_end(self, command: str, **values: Any) -> None:
        """Send a command that cleans up; a board that is gone has cleaned up by itself."""
        with suppress(UnavailableError):
            self.request(command, **values)

    def _send(self, command: str, **values: Any) -> None:
        self._write(json.dumps({"do": command, **values}).encode() + b"\n")

    def _reply(self, command: str, seconds: float) -> dict[str, Any]:
        reply: dict[str, Any] = json.loads(self._read_line(time.monotonic() + seconds))
        if "error" in reply:
            raise UnavailableError(f"device {self.label}: {command}: {printable(reply['error'])}")
        return reply

    @property
    def _stdin(self) -> Any:
        return self.process.stdin

    @property
    def _stdout(self) -> Any:
        return self.process.stdout

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[self._stdin.write(view) :]
        except (BrokenPipeError, ValueError):  # ValueError: it is closed
            raise self._lost() from None

    def _read_line(self, deadline: float) -> bytes:
        while b"\n" not in self.buffer:
            self._fill(deadline)
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line

    def _fill(self, deadline: float) -> None:
        """Read what comes; an empty line now and then keeps the lease."""
        while not select.select([self._stdout], [], [], SIGN_OF_LIFE_S)[0]:
            if time.monotonic() > deadline:
                self.process.kill()
                raise UnavailableError(f"device {self.label}: it does not reply any more; check it with: {self._command('uptime')}")
            self._write(b"\n")
        data = os.read(self._stdout.fileno(), 2**20)
        if not data:
            raise self._lost()
        self.buffer += data

    def _lost(self) -> UnavailableError:
        """Return the error for a connection that has ended, from what ssh printed."""
        with suppress(BrokenPipeError):
            self._stdin.close()
        try:
            code = self.process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.stderr.seek(0)
        output = self.stderr.read()
        line = printable(board.last_line(output))
        if code in MISSING_COMMAND:
            return UnavailableError(
                f"device {self.label}: {self.spec.python} cannot be run there ({line}); "
                "install Python 3.9 or newer, or name its path with python = ... in devices.toml"
            )
        if code == TRANSPORT_ERROR:
            for sign, advice in ADVICE.items():
                if sign.encode() in output:
                    values = {"line": line, "command": self._command("true"), "known_host": self._known_host(output)}
                    return UnavailableError(f"device {self.label}: {advice.format(**values)}")
        return UnavailableError(f"device {self.label}: the connection ended ({line}); check it with: {self._command('true')}")

    def _command(self, command: str) -> str:
        """Return a command line for the user."""
        config = ["-F", self.spec.ssh_config] if self.spec.ssh_config else []
        port = ["-p", str(self.spec.port)] if self.spec.port else []
        return shlex.join(["ssh", *config, *port, self.spec.address, command])

    def _known_host(self, output: bytes) -> str:
        match = re.search(rb'ssh-keygen .*-R "?(\S+?)"?\s', output)
        return shlex.quote(match[1].decode(errors="replace")) if match else self.spec.address.rpartition("@")[2]


class SshProcess:
    """A harness process on a board."""

    def __init__(self, connection: Ssh, number: int) -> None:
        self.connection, self.number = connection, number

    def exchange(self, line: str, timeout_s: float) -> str | ProcessEnd:
        """Send a command and return the reply, or how the process ended."""
        reply = self.connection.request("exchange", wait_s=timeout_s, process=self.number, line=line, seconds=timeout_s)
        if "line" in reply:
            text: str = reply["line"]
            return text
        return ProcessEnd(reply["code"], printable(reply.get("last_line", "none")))
