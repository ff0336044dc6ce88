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

HOLD = (
    "import os; from pathlib import Path; from edgekd.store import locks\nwith locks.{lock}: {before}; print('held', flush=True); input()"
)


def _hold(lock, before="pass"):
    program = HOLD.format(lock=lock, before=before)
    return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _is_held(child):
    return child.stdout.readline().strip() == "held"


def _waits(lock):
    """Return whether a process would have to wait for a lock."""
    program = (
        "import os; from pathlib import Path; from edgekd.store import locks\n"
        f"def w(): print('waits', flush=True); os._exit(0)\nwith locks.{lock}: print('held')"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert process.stdout.strip() in {"held", "waits"}
    return process.stdout.strip() == "waits"


@pytest.mark.parametrize(
    ("first", "second", "must_wait"),
    [("shared", "shared", False), ("shared", "exclusive", True), ("exclusive", "shared", True), ("exclusive", "exclusive", True)],
)
def test_only_shared_locks_of_the_machine_do_not_wait(first, second, must_wait):
    child = _hold(f"machine_{first}()")
    assert _is_held(child)
    assert _waits(f"machine_{second}(w)") == must_wait
    child.communicate("\n")
    assert not _waits(f"machine_{second}(w)")


def test_a_waiting_process_continues_after_the_release():
    child = _hold("machine_exclusive()")
    assert _is_held(child)
    with locks.machine_exclusive(lambda: child.stdin.write("\n") and child.stdin.flush()):  # the callback ends the other process
        assert child.wait(10) == 0
    child.communicate()


def test_a_killed_process_holds_no_lock():
    child = _hold("machine_exclusive()")
    assert _is_held(child)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    with locks.machine_exclusive(pytest.fail):
        pass


def test_a_forked_child_does_not_keep_the_lock_of_a_killed_parent():
    # the grandchild reports that it runs, then waits for the end of its input, which this process keeps open
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


def test_one_writer_per_key(tmp_path):
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


def test_a_thread_may_take_its_lock_again_and_releases_it_at_the_outer_end():
    with locks.machine_exclusive():
        with locks.machine_exclusive(pytest.fail), locks.machine_shared(pytest.fail):
            pass
        assert _waits("machine_shared(w)")
    assert not _waits("machine_exclusive(w)")


def test_a_shared_lock_cannot_become_exclusive():
    with locks.machine_shared(), pytest.raises(RuntimeError, match="held as a shared lock by this thread"), locks.machine_exclusive():
        pass
    assert not _waits("machine_exclusive(w)")


def test_a_lock_file_removed_during_a_wait_is_created_again(tmp_path):
    path = tmp_path / "key"
    child = _hold(f"exclusive(Path({str(path)!r}))")
    assert _is_held(child)

    def remove_and_release():
        path.unlink()
        child.communicate("\n")

    with locks.exclusive(path, remove_and_release):
        assert _waits(f"exclusive(Path({str(path)!r}), w)")


def test_every_user_may_take_the_lock(tmp_path):
    umask = os.umask(0o077)
    try:
        with locks.exclusive(tmp_path / "key"):
            assert (tmp_path / "key").stat().st_mode & 0o777 == 0o666
    finally:
        os.umask(umask)


def test_a_symbolic_link_as_lock_file_is_refused(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="symbolic links.*EDGEKD_CACHE"), locks.exclusive(tmp_path / "lock"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_missing_lock_folder_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKD_LOCK_DIR", str(tmp_path / "none"))
    with (
        pytest.raises(StorageError, match=r"none/edgekd-machine.lock cannot be opened: no such.*set EDGEKD_LOCK_DIR"),
        locks.machine_shared(),
    ):
        pass


def test_the_machine_has_one_lock_file(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKD_LOCK_DIR", str(tmp_path))
    with locks.machine_exclusive():
        assert [path.name for path in tmp_path.iterdir()] == ["edgekd-machine.lock"]
