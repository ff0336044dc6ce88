# SPDX-License-Identifier: Apache-2.0
"""The wheel contains all that the package needs: profiles, templates, the report's schema."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def _run(site_folder, folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(site_folder)}
    return subprocess.run([sys.executable, "-P", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_targets_come_from_the_wheel(unpacked, tmp_path):
    assert _run(unpacked, tmp_path, "-c", "import edgekd; print(edgekd.__file__)").stdout.startswith(str(unpacked))
    process = _run(unpacked, tmp_path, "-m", "edgekd", "targets")
    assert process.returncode == 0, process.stderr
    assert len(process.stdout.splitlines()) == 15


def test_init_comes_from_the_wheel(unpacked, tmp_path):
    assert _run(unpacked, tmp_path, "-m", "edgekd", "init", "new").returncode == 0
    assert _run(unpacked, tmp_path, "-m", "edgekd", "plan", "--recipe", "new/edgekd.toml").returncode == 0


def test_the_schema_comes_from_the_wheel(unpacked):
    assert (unpacked / "edgekd" / "report" / "report.schema.json").is_file()
    assert not (unpacked / "tests").exists()
