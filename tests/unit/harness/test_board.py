# SPDX-License-Identifier: Apache-2.0
"""The program on a board: its commands, and what it leaves when it ends."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

import pytest

from edgekd.harness import board
from edgekd.store import locks

CONTENT = b"a model" * 1000
NAME = hashlib.sha256(CONTENT).hexdigest() + ".onnx"
SLEEPER = "import sys, time\nprint('{}', flush=True)\ntime.sleep(60)\n"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache" / "edgekd" / "device"


@contextmanager
def _running(tmp_path, setup=""):
    """Start the program, as ssh does; yields it, and a function that sends a command and returns the reply."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "EDGEKD_LOCK_DIR": str(tmp_path)}
    code = f"from edgekd.harness import board\n{setup}\nboard.main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert process.stdout.readline().startswith(board.GREETING.encode())

    def send(command, data=b"", **values):
        process.stdin.write(json.dumps({"do": command, **values}).encode() + b"\n" + data)
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    try:
        yield process, send
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def _has_ended(pid):
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    has_ended = bool(select.select([descriptor], [], [], 10)[0])
    os.close(descriptor)
    return has_ended


def test_it_is_python_3_9_and_needs_the_standard_library_only():
    tree = ast.parse(Path(board.__file__).read_text(), feature_version=(3, 9))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names


def test_a_file_is_stored_by_its_content(tmp_path, folder):
    with _running(tmp_path) as (_, send):
        assert send("have", name=NAME) == {"path": None}
        assert send("put", CONTENT, name=NAME, size=len(CONTENT)) == {"path": str(folder / NAME)}
        assert send("have", name=NAME) == {"path": str(folder / NAME)}
        assert [path.name for path in folder.iterdir()] == [NAME]
        assert folder.stat().st_mode & 0o077 == 0


def test_other_bytes_than_the_name_says_are_refused_and_the_next_command_works(tmp_path, folder):
    with _running(tmp_path) as (_, send):
        assert "not those that were sent" in send("put", CONTENT[1:], name=NAME, size=len(CONTENT) - 1)["error"]
        assert list(folder.iterdir()) == []
        assert send("have", name=NAME) == {"path": None}


def test_an_unfinished_file_is_removed_when_the_connection_ends(tmp_path, folder):
    with _running(tmp_path) as (process, _):
        process.stdin.write(json.dumps({"do": "put", "name": NAME, "size": 10**6}).encode() + b"\n" + CONTENT)
        process.stdin.flush()
        while not folder.is_dir() or not list(folder.iterdir()):
            time.sleep(0.01)
    assert list(folder.iterdir()) == []


def test_old_files_and_those_of_a_killed_process_are_removed(tmp_path, folder):
    folder.mkdir(parents=True)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in ("old.onnx", "new.onnx", f"x.{ended.pid}.part", f"x.{os.getpid()}.part"):
        (folder / name).write_bytes(b"")
    os.utime(folder / "old.onnx", (0, time.time() - 31 * 86400))
    with _running(tmp_path) as (_, send):
        send("put", CONTENT, name=NAME, size=len(CONTENT))
    assert {path.name for path in folder.iterdir()} == {"new.onnx", f"x.{os.getpid()}.part", NAME}


def test_a_process_that_ends_is_described(tmp_path):
    (tmp_path / "program.py").write_text("import sys; sys.stderr.write('one\\n\\ntwo\\n'); input(); sys.exit(3)")
    with _running(tmp_path) as (_, send):
        number = send("start", path=str(tmp_path / "program.py"))["process"]
        assert send("exchange", process=number, line="x", seconds=30) == {"code": 3, "last_line": "two"}
        assert send("stop", process=number) == {}
        assert send("cpu")["seconds"] > 0


def _fall_silent(process):
    process.send_signal(signal.SIGUSR1)
    process.stdin.write(b"\n")  # the last sign of life
    process.stdin.flush()


ENDS = {"input": lambda process: process.stdin.close(), "terminate": Popen.terminate, "kill": Popen.kill, "silence": _fall_silent}


def test_temporary_files_of_its_processes_end_with_it_and_those_of_a_killed_one_with_the_next(tmp_path, monkeypatch):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    (tmp_path / "program.py").write_text("import os\nopen(os.environ['TMPDIR'] + '/x', 'w').write('x')\nprint('{}', flush=True)\ninput()\n")

    def start(send):
        number = send("start", path=str(tmp_path / "program.py"))["process"]
        assert send("exchange", process=number, line="x", seconds=30) == {"line": "{}\n"}
        return [path.name for path in temporary.rglob("x")]

    with _running(tmp_path) as (process, send):
        assert start(send) == ["x"]
        process.kill()
    assert [path.name for path in temporary.rglob("x")] == ["x"]
    with _running(tmp_path) as (_, send):
        assert start(send) == ["x"]
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("end", ENDS)
def test_its_processes_and_its_lease_end_with_it(tmp_path, end, monkeypatch):
    (tmp_path / "program.py").write_text(SLEEPER)
    monkeypatch.setenv("EDGEKD_LOCK_DIR", str(tmp_path))
    setup = "import signal; signal.signal(signal.SIGUSR1, lambda *_: setattr(board, 'SILENCE_S', 0.05))"
    with _running(tmp_path, setup) as (process, send):
        number = send("start", path=str(tmp_path / "program.py"))["process"]
        assert send("exchange", process=number, line="x", seconds=30) == {"line": "{}\n"}
        assert send("lease", seconds=0, holder="a build") == {"held": True}
        ENDS[end](process)
        process.wait(30)
    assert _has_ended(number)
    assert (tmp_path / "edgekd-machine.lock").exists() == (end == "kill")
    with locks.machine_exclusive(lambda _: pytest.fail("the lease is still held")):
        pass


def test_an_empty_line_is_a_sign_of_life(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(board.time, "monotonic", lambda: now)
    source, sink = os.pipe()
    wire = board.Wire(source, sink)
    for _ in range(3):
        now += board.SILENCE_S - 1
        os.write(sink, b"\n")
        assert wire.wait()
    now += board.SILENCE_S + 1
    with pytest.raises(board.ConnectionEndError):
        wire.wait()
    os.close(source)
    os.close(sink)


def test_a_lease_that_somebody_holds_is_described_and_then_taken(tmp_path):
    with _running(tmp_path) as (_, first), _running(tmp_path) as (_, second):
        assert first("lease", seconds=0, holder="edgekd of joe on laptop") == {"held": True}
        assert second("lease", seconds=0, holder="another") == {"held": False, "holder": "edgekd of joe on laptop"}
        assert first("release") == {}
        assert second("lease", seconds=10, holder="another") == {"held": True}


def test_a_harness_inherits_no_variable_that_changes_the_numbers(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert "PATH" in board.inherited_variables()
    assert "OMP_NUM_THREADS" not in board.inherited_variables()
