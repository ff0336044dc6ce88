# SPDX-License-Identifier: Apache-2.0
"""Setup: pinned versions, the verbs of the Makefile, and machines with the wrong Python or a CUDA build of torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
MAKE = str(shutil.which("make"))
PINS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
VERBS = ("help", "setup", "demo", "test", "test-long", "lint", "bench", "clean", "dist", "golden")


def test_every_constraint_is_one_version():
    assert len(PINS) > 80
    assert not [line for line in PINS if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)]
    assert "torch==2.13.0" in PINS
    assert not [line for line in PINS if line.startswith(("edgekd", "nvidia", "triton", "cuda"))]


def test_all_dependencies_of_the_package_and_its_tests_are_pinned():
    pinned = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in PINS}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    optional = project["project"]["optional-dependencies"]
    requirements = [
        *project["project"]["dependencies"],
        *project["dependency-groups"]["dev"],
        *(item for group in optional.values() for item in group),
    ]
    todo, checked = [Requirement(text) for text in requirements], set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if name == "edgekd" or key in checked:
            continue
        checked.add(key)
        assert name in pinned, f"{name} is not in constraints.txt"
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            pytest.fail(f"{name} is not installed; run: make setup")
        for text in installed.requires or ():
            further = Requirement(text)
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in (requirement.extras or {""})):
                todo.append(further)
    assert len({name for name, _ in checked}) > 80


def test_the_makefile_has_its_ten_verbs_and_each_is_one_line():
    text = (ROOT / "Makefile").read_text()
    rules = re.findall(r"^([a-z-]+):.*## (.+)\n((?:\t.*\n)*)", text, re.MULTILINE)
    assert tuple(sorted(name for name, _, _ in rules)) == tuple(sorted(VERBS))
    assert all(recipe.count("\n") <= 1 for _, _, recipe in rules)
    phony = re.search(r"^\.PHONY: (.+)$", text, re.MULTILINE)
    assert sorted(phony.group(1).split()) == sorted(VERBS)


def test_make_help_lists_every_verb():
    listing = subprocess.run([MAKE, "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line.split()[1] for line in listing.splitlines()] == list(VERBS)


def _set_up(tmp_path, *arguments):
    """Copy the files of setup to an empty folder, and run it there."""
    for name in ("Makefile", "constraints.txt", "pyproject.toml", "scripts/setup.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("bash", "dirname", "sh", "touch"):
        if not (tools / name).exists():
            (tools / name).symlink_to(str(shutil.which(name)))
    return _make_setup(tmp_path, *arguments)


def _make_setup(tmp_path, *arguments):
    """Run ``make setup`` with only the tools of the test on the path."""
    return subprocess.run(
        [MAKE, "setup", *arguments],
        cwd=tmp_path,
        env={"PATH": str(tmp_path / "tools"), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def _script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if text.startswith("#!") else f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_setup_without_python_names_the_package_to_install(tmp_path):
    process = _set_up(tmp_path)
    assert process.returncode == 2
    assert "no Python 3.11 or newer here (python3 is not there); install python3.11" in process.stderr
    assert not (tmp_path / ".venv").exists()


def test_setup_with_an_old_python_names_its_version(tmp_path):
    _script(tmp_path / "tools" / "python3", 'case "$*" in *platform*) echo 3.9.2;; *) exit 1;; esac')
    assert "(python3 is 3.9.2)" in _set_up(tmp_path).stderr
    explicit = _set_up(tmp_path, f"PYTHON={tmp_path}/tools/python3")
    assert f"PYTHON={tmp_path}/tools/python3 is 3.9.2; edgekd needs Python 3.11 or newer" in explicit.stderr


FAKE_PYTHON = """#!/bin/sh
case "$*" in
  "-m pip"*"torch=="*) echo "$*" >> pip.txt; exit {torch};;
  "-m pip"*) echo "$*" >> pip.txt;;
  -) exec "{real}" -S "$@";;
  *) PYTHONPATH={root} exec "{real}" "$@";;
esac
"""


def _environment(tmp_path, torch):
    """Write a fake Python for the environment: its pip logs its arguments, and it has no torch."""
    python = tmp_path / ".venv" / "bin" / "python"
    _script(python, FAKE_PYTHON.format(torch=torch, real=Path(sys.executable).resolve(), root=ROOT))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the plain build is the CPU build")
def test_setup_installs_the_cpu_build_or_fails_with_its_location(tmp_path):
    _environment(tmp_path, torch=1)
    process = _set_up(tmp_path)
    assert process.returncode == 2
    assert "pip did not get torch==2.13.0+cpu" in process.stderr
    assert "make setup PIP_EXTRA_INDEX_URL=https://" in process.stderr
    calls = (tmp_path / "pip.txt").read_text().splitlines()
    assert [line.split()[-1] for line in calls] == ["torch==2.13.0+cpu"]
    assert not (tmp_path / ".venv" / ".setup-stamp").exists()


def test_setup_installs_with_constraints_and_runs_again_only_if_they_change(tmp_path):
    _environment(tmp_path, torch=0)
    process = _set_up(tmp_path)
    assert process.returncode == 0, process.stderr
    calls = (tmp_path / "pip.txt").read_text().splitlines()
    assert len(calls) == 3
    assert all("--constraint constraints.txt" in line and "--only-binary :all:" in line for line in calls)
    assert "--no-build-isolation" in calls[-1]
    assert " ruff" in calls[-1]
    (tmp_path / "pip.txt").unlink()
    again = _make_setup(tmp_path)
    assert again.returncode == 0
    assert not (tmp_path / "pip.txt").exists(), again.stderr
    later = (tmp_path / ".venv" / ".setup-stamp").stat().st_mtime + 10
    os.utime(tmp_path / "constraints.txt", (later, later))
    assert _make_setup(tmp_path).returncode == 0
    assert (tmp_path / "pip.txt").exists()
