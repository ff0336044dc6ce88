# SPDX-License-Identifier: Apache-2.0
"""Locks between real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from edgekd.errors import StorageError
from edgekd.store import locks

HOLD = "import os; from pathlib import Path; from edgekd.store import locks\nwith locks.{how}: {before}; print('held', flush=True); input()"


def _hold(how, before="pass"):
    program = HOLD.format(how=how, before=before)
    return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _is_held(child):
    return child.stdout.readline().strip() == "held"


def _waits(how):
    """Return whether a process would have to wait for a lock."""
    program = (
        "import os; from pathlib import Path; from edgekd.store import locks\n"
        f"def w(): print('waits', flush=True); os._exit(0)\nwith locks.{how}: print('held')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in {"held", "waits"}
    return done.stdout.strip() == "waits"


@pytest.mark.parametrize(
    ("first", "second", "waits"),
    [("shared", "shared", False), ("shared", "exclusive", True), ("exclusive", "shared", True), ("exclusive", "exclusive", True)],
)
def test_who_waits_for_whom(first, second, waits):
    child = _hold(f"machine_{first}()")
    assert _is_held(child)
    assert _waits(f"machine_{second}(w)") == waits
    child.communicate("\n")
    assert not _waits(f"machine_{second}(w)")


def test_one_that_waits_goes_on_when_the_other_lets_go():
    child = _hold("machine_exclusive()")
    assert _is_held(child)
    with locks.machine_exclusive(lambda: child.stdin.write("\n") and child.stdin.flush()):  # only a waiter ends the other
        assert child.wait(10) == 0
    child.communicate()


def test_a_killed_process_holds_nothing():
    child = _hold("machine_exclusive()")
    assert _is_held(child)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    with locks.machine_exclusive(pytest.fail):
        pass


def test_a_forked_child_does_not_keep_the_lock_of_a_killed_parent():
    # the child tells that it is there, then waits for the end of its input, which this process keeps open
    child = _hold(
        "machine_exclusive()",
        before="r, w = os.pipe(); pid = os.fork(); pid or (os.write(w, b'x'), os.read(0, 1), os._exit(0)); os.read(r, 1)",
    )
    assert _is_held(child)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    with locks.machine_exclusive(pytest.fail):
        pass
    child.stdin.close()
    child.stdout.close()


def test_one_writer_a_key(tmp_path):
    child = _hold(f"exclusive(Path({str(tmp_path / 'key')!r}))")
    assert _is_held(child)
    assert _waits(f"exclusive(Path({str(tmp_path / 'key')!r}), w)")
    assert not _waits(f"exclusive(Path({str(tmp_path / 'other')!r}), w)")
    child.communicate("\n")


def test_threads_of_one_process_wait_for_each_other(tmp_path):
    waits, order = threading.Event(), []

    def second():
        with locks.exclusive(tmp_path / "key", waits.set):
            order.append("second")

    thread = threading.Thread(target=second)
    with locks.exclusive(tmp_path / "key"):
        thread.start()
        assert waits.wait(10)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_a_thread_goes_on_with_what_it_holds_and_lets_go_at_the_outer_end():
    with locks.machine_exclusive():
        with locks.machine_exclusive(pytest.fail), locks.machine_shared(pytest.fail):
            pass
        assert _waits("machine_shared(w)")
    assert not _waits("machine_exclusive(w)")


def test_one_that_shares_the_machine_is_refused_it_alone():
    with locks.machine_shared(), pytest.raises(RuntimeError, match="shared by this thread"), locks.machine_exclusive():
        pass
    assert not _waits("machine_exclusive(w)")


def test_a_lock_file_that_was_removed_while_waiting_is_made_anew(tmp_path):
    path = tmp_path / "key"
    child = _hold(f"exclusive(Path({str(path)!r}))")
    assert _is_held(child)

    def removed():
        path.unlink()
        child.communicate("\n")

    with locks.exclusive(path, removed):
        assert _waits(f"exclusive(Path({str(path)!r}), w)")


def test_every_user_may_take_the_lock(tmp_path):
    before = os.umask(0o077)
    try:
        with locks.exclusive(tmp_path / "key"):
            assert (tmp_path / "key").stat().st_mode & 0o777 == 0o666
    finally:
        os.umask(before)


def test_a_link_in_the_place_of_the_lock_is_refused(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="symbolic links.*EDGEKD_CACHE"), locks.exclusive(tmp_path / "lock"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_lock_folder_that_is_none_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKD_LOCK_DIR", str(tmp_path / "none"))
    with (
        pytest.raises(StorageError, match=r"none/edgekd-machine.lock cannot be opened: no such.*set EDGEKD_LOCK_DIR"),
        locks.machine_shared(),
    ):
        pass


def test_the_machine_has_one_lock_wherever_the_process_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKD_LOCK_DIR", str(tmp_path))
    with locks.machine_exclusive():
        assert [path.name for path in tmp_path.iterdir()] == ["edgekd-machine.lock"]
