# SPDX-License-Identifier: Apache-2.0
"""Processes of calls: a fresh one for each, results and errors as in this process, and each kind of end reported as what it is."""

from __future__ import annotations

import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
from contextlib import closing, suppress
from pathlib import Path

import pytest

from edgekd import errors, usercode
from edgekd.build import worker as worker_module
from edgekd.build import worker_process
from edgekd.build.worker import Worker
from edgekd.errors import OutOfMemoryError, ProcessDiedError, RecipeError, StageError, UnavailableError

PROGRAM = """\
import signal, sys
from pathlib import Path
from edgekd.build.worker import Worker
from tests.unit.build import test_worker
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
try:
    Worker(Path()).call("step", test_worker.wait, sys.argv[1], progress=None)
except KeyboardInterrupt:
    sys.exit(7)
"""
TIMEOUT_SECONDS = 60


def wait(pipe, progress):
    Path(pipe).write_text(str(os.getpid()))
    time.sleep(600)


def double(number, progress):
    progress(0.5, "half")
    return 2 * number


def facts(progress):
    return {
        "hash_seed": os.environ["PYTHONHASHSEED"],
        "spin_count": os.environ.get("GOMP_SPINCOUNT"),
        "variable": os.environ.get("TOY_VARIABLE"),
        "arguments": sys.argv[1:],
        "first_folder": sys.path[0],
        "torch": "torch" in sys.modules,
        "threads_of_helper": len(list(Path(f"/proc/{os.getppid()}/task").iterdir())),
    }


def change_everything(progress):
    import torch

    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    os.environ["TOY_VARIABLE"] = "changed"
    os.chdir("/")
    sys.modules["added"] = sys
    sys.stdout.close()
    sys.stderr = None


def read_state(progress):
    import torch

    return str(torch.get_default_dtype()), torch.is_grad_enabled(), os.environ.get("TOY_VARIABLE"), str(Path.cwd()), "added" in sys.modules


STREAM_CHANGES = ["sys.stdout = sys.stderr = None", "sys.stdout.close(); sys.stderr.close()", "os.close(1); os.close(2)", "os.close(1)"]


def close_streams(how, progress):
    from edgekd.domain.recipe import EntryPoint

    usercode.call_user_code(exec, EntryPoint("data.py", "splits"), how, {"os": os, "sys": sys})
    is_pipe = [os.path.sameopenfile(number, 1) and not os.isatty(number) for number in (1, 2)]
    sys.stdout.write("a")
    sys.stderr.write("b")
    sys.stdout.flush()
    return is_pipe, os.open(os.devnull, os.O_RDONLY) > 2


def raise_error(kind, arguments, progress):
    raise getattr(errors, kind, KeyError)(*arguments)


def end(how, progress):
    sys.stdout.write("first\nsecond \x1b[31mred\x1b[0m\n")
    warnings.warn_explicit("dropped: it is a library's", UserWarning, subprocess.__file__, 1)
    sys.stderr.write("third\n")
    with usercode.running("models.py:student"):
        exec(how, {"os": os})  # noqa: S102  (a line of the user's)


def leave_a_thread(progress):
    threading.Thread(target=time.sleep, args=(600,)).start()
    return 1


def leave_a_process(progress):
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid


def print_much(progress):
    sys.stdout.write("x\n" * 500_000)
    return 1


def own_pid(progress):
    return os.getpid()


def use_spawn(progress):
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(abs, (-3,))


def fork_in_user_code(path, progress):
    with usercode.running("models.py:student"):
        copy = os.fork()
    with Path(path).open("a") as file:
        file.write("once")
    os.waitpid(copy, 0)
    return 1


@pytest.fixture(scope="module")
def environment():
    """Return an environment in which other processes can import this module."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])}


@pytest.fixture(scope="module")
def worker(environment):
    with pytest.MonkeyPatch.context() as patch, closing(Worker(Path("/recipe"))) as worker:
        patch.setenv("PYTHONPATH", environment["PYTHONPATH"])
        _call(worker, double, 1)
        yield worker


def _call(worker, function, *arguments):
    return worker.call("step/x", function, *arguments, progress=lambda share, text: None)


def test_the_result_and_the_progress_arrive(worker):
    calls = []
    assert worker.call("step", double, 4, progress=lambda *call: calls.append(call)) == 8
    assert calls == [(0.5, "half")]


@pytest.mark.parametrize(("name", "value"), [("GOMP_SPINCOUNT", "7"), ("OMP_WAIT_POLICY", "ACTIVE"), ("TOY_VARIABLE", "1")])
def test_the_environment_is_that_of_the_build_with_a_fixed_hash_seed(worker, monkeypatch, name, value):
    monkeypatch.setenv("PYTHONHASHSEED", "9")
    for variable in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "TOY_VARIABLE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, value)
    expected = {"GOMP_SPINCOUNT": "7", "OMP_WAIT_POLICY": None, "TOY_VARIABLE": "2000"}[name]
    result = _call(worker, facts)
    assert result["hash_seed"] == "0"
    assert result["spin_count"] == expected
    assert result["variable"] == (value if name == "TOY_VARIABLE" else None)
    assert result["torch"]
    assert result["threads_of_helper"] == 1  # a fork loses all others
    assert result["arguments"] == []
    assert result["first_folder"] not in {"", str(Path.cwd() / "edgekd")}


def test_nothing_that_a_call_changes_reaches_the_next(worker):
    before = _call(worker, read_state)
    _call(worker, change_everything)
    assert _call(worker, read_state) == before == ("torch.float32", True, None, str(Path.cwd()), False)


@pytest.mark.parametrize("how", STREAM_CHANGES)
def test_streams_that_user_code_closes_are_opened_again(worker, how):
    assert _call(worker, close_streams, how) == ([True, True], True)


def test_a_persistent_worker_uses_one_process(environment, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    with closing(Worker(Path(), persistent=True)) as worker:
        assert _call(worker, own_pid) == _call(worker, own_pid)
        with pytest.raises(ProcessDiedError):
            _call(worker, end, "os._exit(3)")
        assert _call(worker, double, 1) == 2


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [(RecipeError, ("one", "two")), (StageError, ("it failed",)), (UnavailableError, ("no device",))],
)
def test_errors_arrive_as_they_are(worker, kind, arguments):
    with pytest.raises(kind) as caught:
        _call(worker, raise_error, kind.__name__, arguments)
    assert type(caught.value) is kind
    assert str(caught.value) == "\n".join(arguments)
    assert getattr(caught.value, "problems", arguments) == arguments


def test_exceptions_are_the_user_s_edgekd_s_or_the_machine_s():
    assert worker_process._describe(RecipeError("a", "b")) == ("error", "RecipeError", ("a", "b"))
    assert worker_process._describe(MemoryError()) == ("memory",)
    assert worker_process._describe(OSError(28, "No space left", "x"))[:2] == ("os_error", (28, "No space left", "x"))
    assert worker_process._describe(KeyError("x"))[0] == "bug"
    try:
        raise_error("KeyError", ("x",), None)
    except KeyError as error:  # raised in a file of the user
        kind, name, (text,) = worker_process._describe(error)
    assert (kind, name) == ("error", "RecipeError")
    assert text.endswith("the code raised KeyError: 'x'")


def test_too_little_memory_is_an_error_of_the_step():
    with pytest.raises(OutOfMemoryError, match=r"^step/x: there is not enough memory; expected more, or smaller batches$"):
        worker_module._unpack("step/x", "memory")


def break_files(progress):
    for descriptor in range(3, 200):
        with suppress(OSError):
            os.write(descriptor, b"not a message\n")
    os.closerange(3, 200)
    return "returned"


def test_files_that_are_written_and_closed_by_number_leave_the_channel_alone(worker):
    assert _call(worker, break_files) == "returned"


def send_something_else(content, progress):
    """Write to the channel, as the user's code could."""
    os.write(worker_process._CHANNEL_DESCRIPTOR, struct.pack("!i", len(content)) + content.encode())
    return 1


@pytest.mark.parametrize("content", ["", "null", '{"tuple": ["returned"]}', '{"tuple": ["unknown", 1]}', '{"os:system": {}}'])
def test_a_message_that_is_none_ends_the_step_and_runs_nothing(worker, content):
    with pytest.raises(ProcessDiedError):
        _call(worker, send_something_else, content)
    assert _call(worker, double, 1) == 2


def break_builtins(progress):
    import builtins

    builtins.isinstance = lambda *arguments: True
    raise KeyError("x")


def test_an_error_of_a_process_whose_builtins_are_replaced_is_described_all_the_same(worker):
    with pytest.raises(RecipeError, match=r"the code raised KeyError: 'x'$"):
        _call(worker, break_builtins)


ENDS = {
    "os._exit(0)": "ended with exit code 0",
    "os._exit(7)": "ended with exit code 7",
    "os.abort()": "was ended by signal SIGABRT",
    "import ctypes; ctypes.string_at(0)": "was ended by signal SIGSEGV",
    "os.kill(os.getpid(), 9)": "was ended by signal SIGKILL (was there enough memory?)",
    "os.kill(os.getpid(), 15)": "was ended by signal SIGTERM",
    "os.closerange(3, 600)": "ended with exit code 1",
}


@pytest.mark.parametrize("how", ENDS)
def test_an_early_end_is_an_error_with_the_last_output(worker, how):
    with pytest.raises(ProcessDiedError) as caught:
        _call(worker, end, how)
    assert caught.value.reason.startswith(f"{'' if 'closerange' in how else 'models.py:student: '}the process {ENDS[how]}")
    assert "; its last output: first | second \\x1b[31mred\\x1b[0m | third" in caught.value.reason
    assert str(caught.value) == f"step/x: {caught.value.reason}"
    assert caught.value.exit_code == 5
    assert caught.value.in_user_code == ("closerange" not in how)
    assert _call(worker, double, 1) == 2


def test_the_end_of_the_helper_is_an_error_too_and_the_next_call_has_a_new_one(worker):
    with pytest.raises(ProcessDiedError, match="SIGKILL"):
        _call(worker, end, "import time; os.kill(os.getppid(), 9); time.sleep(60)")
    assert _call(worker, double, 1) == 2


def test_threads_and_processes_of_the_user_s_code_end_with_the_call(worker):
    assert _call(worker, leave_a_thread) == 1
    pid = _call(worker, leave_a_process)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_copy_that_user_code_forks_does_not_go_on_with_the_step(worker, tmp_path):
    assert _call(worker, fork_in_user_code, str(tmp_path / "file")) == 1
    assert (tmp_path / "file").read_text() == "once"


def test_output_is_read_and_forgotten(worker, capfd):
    assert _call(worker, print_much) == 1
    assert capfd.readouterr() == ("", "")


def test_user_code_may_spawn_processes(worker):
    assert _call(worker, use_spawn) == 3


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_the_process_ends_with_the_build(tmp_path, environment, sent):
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "pipe")], env=environment) as build:
        assert select.select([pipe], [], [], TIMEOUT_SECONDS)[0]
        child = os.pidfd_open(int(os.read(pipe, 20)))
        build.send_signal(sent)
        assert build.wait(TIMEOUT_SECONDS) == (7 if sent == signal.SIGINT else -sent)
    assert select.select([child], [], [], TIMEOUT_SECONDS)[0]
    os.close(child)
    os.close(pipe)


def test_a_process_that_reports_nothing_for_too_long_is_ended():
    with (
        closing(Worker(Path())) as worker,
        pytest.raises(ProcessDiedError, match="step: .* ended: it reported nothing for 0.5 s") as caught,
    ):
        worker.call("step", wait, os.devnull, progress=None, max_silence_s=0.5)
    assert caught.value.temporary
    with closing(Worker(Path())) as worker:
        assert worker.call("step", double, 2, progress=lambda *_: None, max_silence_s=100.0) == 4
