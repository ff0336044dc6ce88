# SPDX-License-Identifier: Apache-2.0
"""Builds that share a cache, and a cache that is pruned or removed while builds run: no step runs twice, nothing is left over."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from edgekd.store.cache import Cache
from tests import stripes
from tests.pipeline.files import cached_files

BUILDS = 6
KILLS = 30
RECIPE = stripes.RECIPE.replace('["onnxruntime"]', '["litert", "onnxruntime"]')


def _start(folder, cache, *arguments):
    command = stripes.command("--cache", str(cache), *arguments)
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)


def _finished_steps(log):
    return re.findall(r"^(\S+): done", log, re.MULTILINE)


def _rests(cache):
    """Return what unfinished work left in a cache."""
    return [str(path.relative_to(cache)) for name in ("tmp", "work") for path in (cache / name).rglob("*") if path.is_file()]


@pytest.mark.long
def test_six_builds_at_once_share_each_step(tmp_path):
    folder, cache = stripes.write(tmp_path / "stripes", recipe=RECIPE), tmp_path / "cache"
    builds = [_start(folder, cache, "--out", f"out{number}") for number in range(BUILDS)]
    logs = [build.communicate(timeout=600)[1] for build in builds]
    assert [build.returncode for build in builds] == [0] * BUILDS, logs
    steps = [step for log in logs for step in _finished_steps(log)]
    assert len(steps) == len(set(steps))
    assert {"inspect", "distill"} <= set(steps)
    for number in range(BUILDS):
        names = {path.name for path in (folder / f"out{number}" / "brief").iterdir()}
        assert {"edgekd.stamp", "manifest.json", "report.json", "report.md"} <= names
        assert len(names) == 5  # and the model
    assert _rests(cache) == []


@pytest.mark.long
@pytest.mark.parametrize("harm", ["prune", "remove objects", "remove entries", "remove all"])
def test_a_cache_that_shrinks_during_a_build_costs_steps_and_no_more(harm, tmp_path):
    folder, cache = stripes.write(tmp_path / "stripes", recipe=RECIPE), tmp_path / "cache"
    reference = _start(folder, tmp_path / "reference")
    log = reference.communicate(timeout=600)[1]
    assert reference.returncode == 0, log
    expected = cached_files(Cache(tmp_path / "reference", lambda text: None))
    generator = random.Random(harm)
    for _ in range(3):
        build = _start(folder, cache)
        while build.poll() is None:
            _shrink(cache, harm)
            time.sleep(generator.uniform(0.02, 0.5))
        log = build.communicate()[1]
        lines = log.splitlines()
        assert build.returncode in {0, 5}, log
        assert "Traceback" not in log, log
        assert sum(line.startswith("edgekd: ") for line in lines) == (1 if build.returncode else 0), log
    last = _start(folder, cache)
    log = last.communicate(timeout=600)[1]
    assert last.returncode == 0, log
    assert cached_files(Cache(cache, lambda text: None)) == expected


def _shrink(cache, harm):
    if harm == "prune":
        command = [sys.executable, "-m", "edgekd", "cache", "prune", "--max-gib", "0", "--cache", str(cache)]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stderr
    elif harm == "remove all":
        shutil.rmtree(cache, ignore_errors=True)
    else:
        shutil.rmtree(cache / harm.removeprefix("remove "), ignore_errors=True)


@pytest.mark.long
def test_builds_that_are_killed_leave_nothing_over(tmp_path):
    folder, cache = stripes.write(tmp_path / "stripes", recipe=RECIPE), tmp_path / "cache"
    started = time.monotonic()
    reference = _start(folder, tmp_path / "reference")
    log = reference.communicate(timeout=600)[1]
    seconds = time.monotonic() - started
    assert reference.returncode == 0, log
    expected = cached_files(Cache(tmp_path / "reference", lambda text: None))
    generator = random.Random(30)
    logs = []
    for _ in range(KILLS):
        shutil.rmtree(folder / "build", ignore_errors=True)
        build = _start(folder, cache)
        time.sleep(generator.uniform(0.1, seconds))
        os.kill(build.pid, signal.SIGKILL)  # its children see that it ended
        logs.append(build.communicate(timeout=60)[1])
    last = _start(folder, cache)
    logs.append(last.communicate(timeout=600)[1])
    assert last.returncode == 0, logs[-1]
    assert cached_files(Cache(cache, lambda text: None)) == expected
    steps = [step for log in logs for step in _finished_steps(log)]
    assert len(steps) == len(set(steps))
    assert {path.name for path in (folder / "build" / "brief").iterdir() if path.name.startswith(".")} == set()
    assert _rests(cache) == []
