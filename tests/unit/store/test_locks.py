# SPDX-License-Identifier: Apache-2.0
"""Locks between real processes."""

from __future__ import annotations

import errno
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


PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}


def _hold(lock, before="pass"):
    program = HOLD.format(lock=lock, before=before)
    return subprocess.Popen([sys.executable, "-c", program], **PIPES)


def _is_held(child):
    return child.stdout.readline().strip() == "held"


def _waits(lock):
    """Return whether a process would have to wait for a lock."""
    program = (
        "import os; from pathlib import Path; from edgekd.store import locks\n"
        f"def w(_): print('waits', flush=True); os._exit(0)\nwith locks.{lock}: print('held')"
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
    with locks.machine_exclusive(lambda _: child.stdin.write("\n") and child.stdin.flush()):  # the callback ends the other process
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
        with locks.exclusive(tmp_path / "key", lambda _: waits.set()):
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

    def remove_and_release(_):
        path.unlink()
        child.communicate("\n")

    with locks.exclusive(path, remove_and_release):
        assert _waits(f"exclusive(Path({str(path)!r}), w)")


@pytest.mark.parametrize("umask", [0o077, 0o000])
def test_every_user_may_take_the_lock_of_the_machine_and_only_this_one_those_of_a_cache(tmp_path, monkeypatch, umask):
    monkeypatch.setenv("EDGEKD_LOCK_DIR", str(tmp_path))
    previous = os.umask(umask)
    try:
        with locks.exclusive(tmp_path / "key"), locks.machine_shared():
            modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    finally:
        os.umask(previous)
    assert modes == {"key": 0o600, "edgekd-machine.lock": 0o666}


def test_the_process_that_holds_a_lock_is_named(tmp_path):
    child, messages = _hold(f"exclusive(Path({str(tmp_path / 'key')!r}))"), []
    assert _is_held(child)

    def release(holders):
        messages.append(holders)
        child.communicate("\n")

    with locks.exclusive(tmp_path / "key", release):
        pass
    assert len(messages) == 1
    assert messages[0].startswith(f"process {child.pid} (")
    assert "python" in messages[0]


def test_a_lock_that_another_program_holds_for_ever_ends_with_a_message(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKD_LOCK_DIR", str(tmp_path))
    monkeypatch.setenv("EDGEKD_LOCK_TIMEOUT", "0.1")
    (tmp_path / "edgekd-machine.lock").touch()
    child = subprocess.Popen(["flock", str(tmp_path / "edgekd-machine.lock"), "sh", "-c", "echo held; read x"], **PIPES)
    assert _is_held(child)
    with pytest.raises(StorageError, match=r"is held by process \d+ \(flock .*set EDGEKD_LOCK_TIMEOUT"), locks.machine_exclusive():
        pass
    child.communicate("\n")


def test_a_build_of_this_user_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKD_LOCK_TIMEOUT", "0.01")
    child, waited = _hold(f"exclusive(Path({str(tmp_path / 'key')!r}))"), threading.Event()
    assert _is_held(child)
    timer = threading.Timer(0.5, lambda: child.communicate("\n"))
    with locks.exclusive(tmp_path / "key", lambda _: (timer.start(), waited.set())):  # its command line names edgekd
        assert waited.is_set()
    timer.join()


def test_a_timeout_that_is_no_number_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKD_LOCK_TIMEOUT", "soon")
    child = _hold(f"exclusive(Path({str(tmp_path / 'key')!r}))")
    assert _is_held(child)
    with (
        pytest.raises(StorageError, match="EDGEKD_LOCK_TIMEOUT is 'soon'; expected a number of seconds"),
        locks.exclusive(tmp_path / "key"),
    ):
        pass
    child.communicate("\n")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_flock_is_one_message_for_locks_and_spares_nothing(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with pytest.raises(StorageError, match="cannot be locked.*local disk"), locks.exclusive(tmp_path / "key"):
        pass
    lease = locks.lease(tmp_path)
    assert lease is not None
    locks.end_lease(lease)
    with locks.try_exclusive(tmp_path) as is_free:
        assert is_free


def test_a_leased_folder_is_not_free_until_the_lease_ends(tmp_path):
    lease = locks.lease(tmp_path)
    with locks.try_exclusive(tmp_path) as is_free:
        assert not is_free
    locks.end_lease(lease)
    with locks.try_exclusive(tmp_path) as is_free:
        assert is_free
        assert locks.lease(tmp_path) is None  # it is being pruned
    assert locks.lease(tmp_path / "none") is None
    (tmp_path / "link").symlink_to(tmp_path)
    assert locks.lease(tmp_path / "link") is None


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


def test_a_folder_is_locked_without_a_file_in_it(tmp_path):
    folder = tmp_path / "out" / "host"
    child = _hold(f"exclusive_folder(Path({str(folder)!r}))")
    assert _is_held(child)
    assert _waits(f"exclusive_folder(Path({str(folder)!r}), w)")
    assert not _waits(f"exclusive_folder(Path({str(folder.with_name('other'))!r}), w)")
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert _waits(f"exclusive_folder(Path({str(link)!r}), w)")
    child.communicate("\n")
    assert not _waits(f"exclusive_folder(Path({str(folder)!r}), w)")
    assert list(folder.iterdir()) == []
