# SPDX-License-Identifier: Apache-2.0
"""The child process of inspect: it ends with the build, and what ends it is told as what it is."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

import pytest

from edgekd import config
from edgekd.ports import Context
from edgekd.stages import inspect
from tests.toy import DATA, MODELS, RECIPE

PROGRAM = """\
import signal, sys
from pathlib import Path
from edgekd import config
from edgekd.ports import Context
from edgekd.stages import inspect
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background has it ignored
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
PATIENCE_SECONDS = 60


def _site(folder):
    folder.mkdir()
    for name, text in (("edgekd.toml", RECIPE), ("data.py", DATA), ("models.py", MODELS)):
        (folder / name).write_text(text)
    return folder


def _waiting_build(folder):
    """Start a build whose data function waits; return it and a descriptor of its child's process."""
    _site(folder)
    (folder / "data.py").write_text(WAITING)
    os.mkfifo(folder / "pipe")
    pipe = os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    build = subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder)])
    assert select.select([pipe], [], [], PATIENCE_SECONDS)[0]
    child = os.pidfd_open(int(os.read(pipe, 20)))
    os.close(pipe)
    return build, child


def _ends(descriptor):
    return bool(select.select([descriptor], [], [], PATIENCE_SECONDS)[0])


def test_the_child_ends_when_the_build_is_killed(tmp_path):
    build, child = _waiting_build(tmp_path / "recipe")
    with build:
        build.kill()
    assert _ends(child)
    os.close(child)


def test_an_interrupt_of_the_build_ends_the_child(tmp_path):
    build, child = _waiting_build(tmp_path / "recipe")
    with build:
        build.send_signal(signal.SIGINT)
        assert build.wait(PATIENCE_SECONDS) == 7
    assert _ends(child)
    os.close(child)


def test_a_full_disk_is_told_as_one(tmp_path):
    folder = _site(tmp_path / "recipe")
    step = inspect.steps(config.load_recipe(folder / "edgekd.toml"), [])[0]
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "out" / "train.inputs.0.npy").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        inspect.run(step, {}, Context(folder, tmp_path / "out", tmp_path / "work", lambda share, text: None))


def test_a_bug_of_ours_is_not_blamed_on_the_user(tmp_path):
    folder = _site(tmp_path / "recipe")
    step = inspect.steps(config.load_recipe(folder / "edgekd.toml"), [])[0]
    broken = type(step)(step.id, step.stage, {"splits": "data.py:splits"}, {}, step.tools)
    with pytest.raises(RuntimeError, match=r"(?s)the child failed:.*KeyError"):
        inspect.run(broken, {}, Context(folder, tmp_path, tmp_path, lambda share, text: None))
