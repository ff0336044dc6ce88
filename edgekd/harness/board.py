# SPDX-License-Identifier: Apache-2.0
"""What runs on a board while a connection to it is open: it holds the lease, receives files, and starts and ends harness processes.

It is sent as text over the connection itself, so a board needs only Python 3.9 (and numpy and a runtime for the harness). It reads
commands from its input, one JSON object per line, one at a time, and replies to each with one line. A reply with ``error`` is a
failure. The bytes of a file follow the command ``put`` and the reply to ``get``. An empty line is a sign of life.

It ends when its input ends, or is silent for ``SILENCE_S``. Its processes, its lease and its temporary files end with it; files that
were put are stored by their content in ``~/.cache/edgekd/device``, and removed when nobody used them for ``MAX_AGE_S``.
"""

import fcntl
import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress

GREETING = "edgekd board "  # before the first reply: a login shell may print anything before it
MIN_PYTHON = (3, 9)
SILENCE_S = 60
END_S = 30  # for a process to end after it has closed its output
MAX_AGE_S = 30 * 86400
CHUNK_BYTES = 2**16
PR_SET_PDEATHSIG = 1
SCRATCH = "edgekd-board-"  # and the process id, of temporary folders
# the variables that a harness inherits; others may change the numbers (LD_PRELOAD, OMP_NUM_THREADS, MALLOC_ARENA_MAX ...)
INHERITED_VARIABLES = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH", "TMPDIR", "VIRTUAL_ENV")


def inherited_variables():
    """Return the environment of a harness process."""
    return {name: os.environ[name] for name in INHERITED_VARIABLES if name in os.environ}


def last_line(output):
    """Return the last line of a process's output that is not empty."""
    lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "none"


class ConnectionEndError(Exception):
    """The input ended, or was silent for too long."""


class Wire:
    """The two pipes of the connection."""

    def __init__(self, source, sink):
        self.source, self.sink, self.buffer, self.last_sign = source, sink, b"", time.monotonic()

    def wait(self, output=None, deadline=float("inf")):
        """Wait for input, or for a process's output; return whether that came before the deadline.

        Raises:
            ConnectionEndError: if the connection ended.
        """
        watched = [self.source] if output is None else [self.source, output]
        while True:
            now = time.monotonic()
            if now > self.last_sign + SILENCE_S:
                raise ConnectionEndError
            if now > deadline:
                return False
            ready = select.select(watched, [], [], max(0, min(deadline, self.last_sign + SILENCE_S) - now))[0]
            if self.source in ready:
                data = os.read(self.source, CHUNK_BYTES)
                if not data:
                    raise ConnectionEndError
                self.buffer += data
                self.last_sign = time.monotonic()
                if output is None:
                    return True
            if output in ready:
                return True

    def line(self):
        """Return the next line."""
        while b"\n" not in self.buffer:
            self.wait()
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line

    def chunks(self, size):
        """Yield the next bytes, in parts."""
        while size:
            if not self.buffer:
                self.wait()
            data, self.buffer = self.buffer[:size], self.buffer[size:]
            size -= len(data)
            yield data

    def send(self, data):
        """Write all bytes."""
        data = memoryview(data)
        while data:
            data = data[os.write(self.sink, data) :]

    def reply(self, content):
        """Write a line of JSON."""
        self.send(json.dumps(content).encode() + b"\n")


class Board:
    """The state of one connection: processes by number, their temporary folder, the lease's file, and the folder of stored files."""

    def __init__(self, wire):
        self.wire, self.processes, self.scratch, self.lease_file = wire, {}, None, None
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        self.folder = os.path.join(cache, "edgekd", "device")

    def serve(self):
        """Reply to commands until the connection ends, and clean up."""
        try:
            while True:
                line = self.wire.line()
                if line.strip():
                    self.wire.reply(self.run(json.loads(line)))
        except (ConnectionEndError, BrokenPipeError):
            pass
        finally:
            for number in list(self.processes):
                self.stop(number)
            if self.scratch is not None:
                shutil.rmtree(self.scratch, ignore_errors=True)
            self.release()

    def run(self, command):
        """Return the reply to a command."""
        try:
            return getattr(self, command.pop("do"))(**command)
        except BrokenPipeError:
            raise
        except OSError as error:
            return {"error": "%s: %s" % (error.filename or self.folder, (error.strerror or str(error)).lower())}

    def lease(self, seconds, holder):
        """Take the lock of this machine that edgekd has here too; wait for it for some seconds."""
        path = os.path.join(os.environ.get("EDGEKD_LOCK_DIR") or tempfile.gettempdir(), "edgekd-machine.lock")
        deadline = time.monotonic() + seconds
        while True:
            descriptor = _open_lock(path)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, holder.encode())
                    self.lease_file = path, descriptor
                    return {"held": True}
            except BlockingIOError:
                if time.monotonic() > deadline:
                    text = os.pread(descriptor, 200, 0).decode(errors="replace")
                    return {"held": False, "holder": text or "another process on the device"}
                self.wire.wait(deadline=time.monotonic() + 0.1)
            finally:
                if self.lease_file is None:
                    os.close(descriptor)

    def release(self):
        """Give the lease back, and remove its file."""
        if self.lease_file is not None:
            path, descriptor = self.lease_file
            self.lease_file = None
            os.ftruncate(descriptor, 0)
            with suppress(OSError):  # another user's, in a sticky folder
                os.unlink(path)
            os.close(descriptor)
        return {}

    def have(self, name):
        """Return the path of a stored file, or None if it is absent or damaged; its name starts with its SHA-256."""
        path = os.path.join(self.folder, name)
        digest = hashlib.sha256()
        try:
            with open(path, "rb") as file:
                for data in iter(lambda: file.read(2**20), b""):
                    digest.update(data)
            os.utime(path)
        except FileNotFoundError:
            return {"path": None}
        return {"path": path if name.startswith(digest.hexdigest()) else None}

    def put(self, name, size):
        """Store the bytes that follow, all or nothing."""
        path, digest, chunks = os.path.join(self.folder, name), hashlib.sha256(), self.wire.chunks(size)
        part = "%s.%d.part" % (path, os.getpid())
        try:
            self.clean()
            with open(part, "xb") as file:
                for data in chunks:
                    digest.update(data)
                    file.write(data)
            if not name.startswith(digest.hexdigest()):
                return {"error": "%s: the bytes that arrived are not those that were sent" % name}
            os.replace(part, path)
        finally:
            with suppress(OSError):
                os.unlink(part)
            for _ in chunks:  # also after an error, so that the next command is where it is expected
                pass
        return {"path": path}

    def clean(self):
        """Create the folder; remove old files, and unfinished ones of processes that have ended."""
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        for name in os.listdir(self.folder):
            path, fields = os.path.join(self.folder, name), name.split(".")
            try:
                is_unfinished = fields[-1] == "part" and not os.path.exists("/proc/" + fields[-2])
                if is_unfinished or time.time() - os.stat(path).st_mtime > MAX_AGE_S:
                    os.unlink(path)
            except FileNotFoundError:  # another connection was faster
                pass

    def get(self, path):
        """Reply with a file's size; its bytes follow."""
        with open(path, "rb") as file:
            content = file.read()
        self.wire.reply({"size": len(content)})
        self.wire.send(content)
        return {}

    def versions(self, packages):
        """Return the versions of distributions of this Python."""
        from importlib import metadata

        versions = {}
        for package in packages:
            try:
                versions[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                versions[package] = None
        return {"versions": versions}

    def cpu(self):
        """Return the CPU time of this process and of its children that have ended."""
        return {"seconds": sum(os.times()[:4])}

    def start(self, path):
        """Start a program of Python: its pipes are those of ``exchange``. What it leaves in the temporary folder is removed."""
        if self.scratch is None:
            self.scratch = _new_scratch()
        stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed by stop; a pipe that nobody reads would fill up)
        process = subprocess.Popen(
            [sys.executable, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            bufsize=0,
            env={**inherited_variables(), "TMPDIR": self.scratch},
            preexec_fn=_end_with_parent,  # noqa: PLW1509  (there is one thread)
        )
        self.processes[process.pid] = process, stderr
        return {"process": process.pid}

    def exchange(self, process, line, seconds):
        """Write a line to a process, and return the line that it writes, or how it ended."""
        child = self.processes[process][0]
        output, reply, deadline = child.stdout.fileno(), b"", time.monotonic() + seconds
        try:
            data = line.encode() + b"\n"
            while data:
                data = data[child.stdin.write(data) :]
        except BrokenPipeError:
            return self._end(process)
        while not reply.endswith(b"\n"):
            if not self.wire.wait(output, deadline):
                return {"code": None}
            data = os.read(output, CHUNK_BYTES)
            if not data:
                return self._end(process)
            reply += data
        return {"line": reply.decode()}

    def _end(self, number):
        process, stderr = self.processes[number]
        try:
            code = process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - CHUNK_BYTES))
        return {"code": code, "last_line": last_line(stderr.read())}

    def stop(self, process):
        """End a process."""
        child, stderr = self.processes.pop(process)
        child.kill()
        child.wait()
        for file in (child.stdin, child.stdout, stderr):
            file.close()
        return {}


def _new_scratch():
    """Return a temporary folder; remove those of processes that were killed."""
    folder = tempfile.gettempdir()
    for name in os.listdir(folder):
        if name.startswith(SCRATCH) and not os.path.exists("/proc/" + name.split("-")[2]):
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
    return tempfile.mkdtemp(prefix="%s%d-" % (SCRATCH, os.getpid()))


def _open_lock(path):
    """Open a lock file that all users of the machine may lock: without O_CREAT, which a sticky folder refuses for another user's."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        try:
            return os.open(path, flags)
        except FileNotFoundError:
            try:
                descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                continue  # another process was faster
            os.fchmod(descriptor, 0o666)  # whatever the umask
            return descriptor


def _end_with_parent():
    """Let the kernel end this process when its parent ends, also if that is killed."""
    import ctypes

    with suppress(OSError, AttributeError):  # no such function here: the process ends with its input
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main():
    """Serve the connection on stdin and stdout."""
    wire = Wire(0, os.dup(1))
    os.dup2(2, 1)
    version = "%d.%d.%d" % sys.version_info[:3]
    wire.send(GREETING.encode() + json.dumps({"python": version, "executable": sys.executable}).encode() + b"\n")
    if sys.version_info < MIN_PYTHON:
        sys.exit(1)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    Board(wire).serve()


if __name__ == "__main__":
    main()
