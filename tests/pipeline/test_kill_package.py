# SPDX-License-Identifier: Apache-2.0
"""``kill -9`` before each change that a build makes to a file of its output folder, then build again."""

from __future__ import annotations

import json
import shutil
import signal

import pytest

from edgekd.store.digests import file_digest
from tests import stripes

# ends the process before the change number KILL_AT of files in the output folder; a larger number ends nothing
KILLER = """\
import os, sys
changes, folder = 0, os.path.abspath("build")
EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.utime", "os.truncate", "os.link", "os.symlink")
def hook(event, arguments):
    global changes
    if event == "open":
        changes_something = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    else:
        changes_something = event in EVENTS
    paths = [os.path.abspath(os.fsdecode(item)) for item in arguments[:2] if isinstance(item, (str, bytes, os.PathLike))]
    if changes_something and any(path.startswith(folder) for path in paths):
        changes += 1
        if changes == int(os.environ["KILL_AT"]):
            os.kill(os.getpid(), 9)
sys.addaudithook(hook)
sys.argv[0] = "edgekd"
from edgekd.__main__ import main
main()
"""
SHIPPED = {"edgekd.stamp", "manifest.json", "report.json", "report.md", "stripes.onnx"}


def _files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.long
@pytest.mark.parametrize("before", ["nothing", "an earlier PASS", "an earlier FAIL"])
def test_a_build_that_was_killed_at_any_change_of_the_output_folder_is_mended_by_the_next(before, tmp_path):
    folder = stripes.write(tmp_path / "stripes")
    (folder / "killer.py").write_text(KILLER)
    first = stripes.build(folder)
    assert first.returncode == 0, first.stderr
    assert _files(folder / "build") == {"brief", *(f"brief/{name}" for name in SHIPPED)}
    model = file_digest(folder / "build" / "brief" / "stripes.onnx")
    recipe = folder / "edgekd.toml"
    earlier = tmp_path / "earlier"
    if before == "an earlier PASS":
        recipe.write_text(stripes.RECIPE.replace("= 30.0", "= 29.0"))
    elif before == "an earlier FAIL":
        recipe.write_text(stripes.RECIPE.replace("= 30.0", "= 30.0\nmax_size_kib = 0.1"))
    if before != "nothing":
        assert stripes.build(folder).returncode == (0 if before == "an earlier PASS" else 1)
        shutil.copytree(folder / "build", earlier)
        recipe.write_text(stripes.RECIPE)
    kills = 0
    while True:
        shutil.rmtree(folder / "build", ignore_errors=True)
        if earlier.exists():
            shutil.copytree(earlier, folder / "build")
        ended = stripes.build(folder, prefix=("killer.py",), KILL_AT=kills + 1)
        if ended.returncode != -signal.SIGKILL:
            assert ended.returncode == 0, ended.stderr
            break
        kills += 1
        report = folder / "build" / "brief" / "report.json"
        if report.is_file():
            json.loads(report.read_text())  # whole, or the earlier one
        resumed = stripes.build(folder)
        assert resumed.returncode == 0, f"{kills}: {resumed.stderr}"
        assert ": done in" not in resumed.stderr, f"{kills}: {resumed.stderr}"
        assert _files(folder / "build") == {"brief", *(f"brief/{name}" for name in SHIPPED)}, kills
        assert file_digest(folder / "build" / "brief" / "stripes.onnx") == model
        assert json.loads(report.read_text())["outcome"] == "PASS"
    assert kills >= len(SHIPPED)
