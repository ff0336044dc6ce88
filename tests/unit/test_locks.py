# SPDX-License-Identifier: Apache-2.0
"""Locks between real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from edgekd import locks

HOLD = "from pathlib import Path; from edgekd import locks\nwith locks.{how}: print('held', flush=True); input()"


def _hold(how):
    return subprocess.Popen([sys.executable, "-c", HOLD.format(how=how)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _is_held(child):
    return child.stdout.readline().strip() == "held"


def _waits(how):
    """Return whether a process would have to wait for a lock."""
    told = []
    program = (
        "import os; from pathlib import Path; from edgekd import locks\n"
        f"def w(): print('waits', flush=True); os._exit(0)\nwith locks.{how}: print('held')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    told.append(done.stdout.strip())
    return told == ["waits"]


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


def test_a_killed_process_holds_nothing():
    child = _hold("machine_exclusive()")
    assert _is_held(child)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    with locks.machine_exclusive(pytest.fail):
        pass


def test_one_writer_a_key(tmp_path):
    child = _hold(f"exclusive(Path({str(tmp_path / 'key')!r}))")
    assert _is_held(child)
    assert _waits(f"exclusive(Path({str(tmp_path / 'key')!r}), w)")
    assert not _waits(f"exclusive(Path({str(tmp_path / 'other')!r}), w)")
    child.communicate("\n")


def test_a_link_in_the_place_of_the_lock_is_refused(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"), locks.exclusive(tmp_path / "lock"):
        pass
