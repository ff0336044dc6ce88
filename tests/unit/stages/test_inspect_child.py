# SPDX-License-Identifier: Apache-2.0
"""The child process of inspect: it ends with the build, and each kind of end is reported as what it is."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from edgekd import config
from edgekd.domain.recipe import TensorSpec
from edgekd.ports import Context
from edgekd.stages import inspect
from tests.toy import DATA, MODELS, RECIPE

PROGRAM = """\
import signal, sys
from pathlib import Path
from edgekd import config
from edgekd.ports import Context
from edgekd.stages import inspect
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
folder = Path(sys.argv[1])
step = inspect.steps(config.load_recipe(folder / "edgekd.toml"), [])[0]
try:
    inspect.run(step, {}, Context(folder, folder, folder, lambda share, text: None))
except KeyboardInterrupt:
    sys.exit(7)
"""
WAITING = """\
import os, pathlib, time
def splits():
    pathlib.Path("pipe").write_text(str(os.getpid()))
    time.sleep(600)
"""
TIMEOUT_SECONDS = 60


def _write_recipe(folder):
    folder.mkdir()
    for name, text in (("edgekd.toml", RECIPE), ("data.py", DATA), ("models.py", MODELS)):
        (folder / name).write_text(text)
    return folder


def _start_waiting_build(folder):
    """Start a build whose data function waits; return it and a descriptor of its child's process."""
    _write_recipe(folder)
    (folder / "data.py").write_text(WAITING)
    os.mkfifo(folder / "pipe")
    pipe = os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    build = subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder)])
    assert select.select([pipe], [], [], TIMEOUT_SECONDS)[0]
    child = os.pidfd_open(int(os.read(pipe, 20)))
    os.close(pipe)
    return build, child


def _ends(child):
    return bool(select.select([child], [], [], TIMEOUT_SECONDS)[0])


def test_the_child_ends_when_the_build_is_killed(tmp_path):
    build, child = _start_waiting_build(tmp_path / "recipe")
    with build:
        build.kill()
    assert _ends(child)
    os.close(child)


def test_an_interrupt_of_the_build_ends_the_child(tmp_path):
    build, child = _start_waiting_build(tmp_path / "recipe")
    with build:
        build.send_signal(signal.SIGINT)
        assert build.wait(TIMEOUT_SECONDS) == 7
    assert _ends(child)
    os.close(child)


def test_a_full_disk_is_reported_as_an_os_error(tmp_path):
    folder = _write_recipe(tmp_path / "recipe")
    step = inspect.steps(config.load_recipe(folder / "edgekd.toml"), [])[0]
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "out" / "train.inputs.0.npy").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        inspect.run(step, {}, Context(folder, tmp_path / "out", tmp_path / "work", lambda share, text: None))


def test_a_bug_in_edgekd_is_not_blamed_on_the_user(tmp_path):
    folder = _write_recipe(tmp_path / "recipe")
    step = inspect.steps(config.load_recipe(folder / "edgekd.toml"), [])[0]
    broken = replace(step, params=replace(step.params, inputs=(TensorSpec("x", (1, 4), "no such type"),)))
    with pytest.raises(RuntimeError, match=r"(?s)the child failed:.*TypeError"):
        inspect.run(broken, {}, Context(folder, tmp_path, tmp_path, lambda share, text: None))
