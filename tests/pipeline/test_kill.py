# SPDX-License-Identifier: Apache-2.0
"""``kill -9`` at random moments of a build, then build again: the same bytes, and no finished stage runs twice."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgekd.store.cache import Cache
from edgekd.store.digests import file_digest
from tests.pipeline.files import cached_files

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits"
KILLS = 20


def _start(folder, cache, locks):
    environment = {**os.environ, "EDGEKD_CACHE": str(cache), "EDGEKD_LOCK_DIR": str(locks)}
    command = [sys.executable, "-m", "edgekd", "build", "--target", "host", "--recipe", str(folder / "edgekd.toml")]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.long
def test_killed_builds_end_in_the_same_bytes(tmp_path):
    folder = tmp_path / "digits"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("build", "__pycache__"))
    recipe = folder / "edgekd.toml"
    text = recipe.read_text()
    for section in ("[teacher.train]", "[distill]"):  # two caches may come to different choices between float32 and bfloat16
        text = text.replace(section, f'{section}\nprecision = "float32"')
    recipe.write_text(text)
    locks = tmp_path / "locks"
    locks.mkdir()
    started = time.monotonic()
    undisturbed = _start(folder, tmp_path / "undisturbed", locks)
    assert undisturbed.wait(300) == 0, undisturbed.stderr.read()
    seconds = time.monotonic() - started
    expected = cached_files(Cache(tmp_path / "undisturbed", lambda text: None))

    generator = random.Random(20)
    logs = []
    for _ in range(KILLS):
        shutil.rmtree(folder / "build", ignore_errors=True)
        build = _start(folder, tmp_path / "killed", locks)
        time.sleep(generator.uniform(0.1, seconds))
        os.killpg(build.pid, signal.SIGKILL)
        logs.append(build.stderr.read())
        build.wait()
    last = _start(folder, tmp_path / "killed", locks)
    last_log = last.communicate(timeout=300)[1]
    assert last.returncode == 0, last_log
    assert cached_files(Cache(tmp_path / "killed", lambda text: None)) == expected
    # the candidates are measured again, so another one may be the fastest
    (model,) = [path for path in (folder / "build" / "host").iterdir() if path.suffix in {".tflite", ".onnx"}]
    assert file_digest(model) in {item for files in expected.values() for item in files.values()}
    finished = [step for log in [*logs, last_log] for step in re.findall(r"^(\S+): done", log, re.MULTILINE)]
    assert len(finished) == len(set(finished))
