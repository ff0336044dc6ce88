# SPDX-License-Identifier: Apache-2.0
"""Setting up: the pins, the Makefile's verbs, and what happens on a machine that has the wrong Python or a CUDA torch."""

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


def test_all_that_the_package_and_its_tests_need_is_pinned():
    pinned = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in PINS}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    asked = [
        *project["project"]["dependencies"],
        *project["dependency-groups"]["dev"],
        *(item for group in extras.values() for item in group),
    ]
    todo, checked = [Requirement(text) for text in asked], set()
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
    shown = subprocess.run([MAKE, "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line.split()[1] for line in shown.splitlines()] == list(VERBS)


def _set_up(tmp_path, *arguments):
    """Copy what setup reads into a folder of its own, and run it there."""
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
    """Run it with nothing on the path but what the test put there."""
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


def test_setup_without_python_says_what_to_install(tmp_path):
    done = _set_up(tmp_path)
    assert done.returncode == 2
    assert "no Python 3.11 or newer here (python3 is not there); install python3.11" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_setup_with_an_old_python_says_which_it_found(tmp_path):
    _script(tmp_path / "tools" / "python3", 'case "$*" in *platform*) echo 3.9.2;; *) exit 1;; esac')
    assert "(python3 is 3.9.2)" in _set_up(tmp_path).stderr
    named = _set_up(tmp_path, f"PYTHON={tmp_path}/tools/python3")
    assert f"PYTHON={tmp_path}/tools/python3 is 3.9.2; edgekd needs Python 3.11 or newer" in named.stderr


FAKE_PYTHON = """#!/bin/sh
case "$*" in
  "-m pip"*"torch=="*) echo "$*" >> asked.txt; exit {torch};;
  "-m pip"*) echo "$*" >> asked.txt;;
  -) exec "{real}" -S "$@";;
  *) PYTHONPATH={root} exec "{real}" "$@";;
esac
"""


def _environment(tmp_path, torch):
    """Put a stand-in for the environment's Python there: its pip writes down what it was asked; it has no torch."""
    python = tmp_path / ".venv" / "bin" / "python"
    _script(python, FAKE_PYTHON.format(torch=torch, real=Path(sys.executable).resolve(), root=ROOT))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the plain build is the CPU build")
def test_setup_takes_the_cpu_build_or_none_and_says_where_it_is(tmp_path):
    _environment(tmp_path, torch=1)
    done = _set_up(tmp_path)
    assert done.returncode == 2
    assert "pip did not get torch==2.13.0+cpu" in done.stderr
    assert "make setup PIP_EXTRA_INDEX_URL=https://" in done.stderr
    asked = (tmp_path / "asked.txt").read_text().splitlines()
    assert [line.split()[-1] for line in asked] == ["torch==2.13.0+cpu"]
    assert not (tmp_path / ".venv" / ".setup-stamp").exists()


def test_setup_installs_with_the_constraints_and_then_is_not_due(tmp_path):
    _environment(tmp_path, torch=0)
    done = _set_up(tmp_path)
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked.txt").read_text().splitlines()
    assert len(asked) == 3
    assert all("--constraint constraints.txt" in line and "--only-binary :all:" in line for line in asked)
    assert "--no-build-isolation" in asked[-1]
    assert " ruff" in asked[-1]
    (tmp_path / "asked.txt").unlink()
    again = _make_setup(tmp_path)
    assert again.returncode == 0
    assert not (tmp_path / "asked.txt").exists(), again.stderr
    later = (tmp_path / ".venv" / ".setup-stamp").stat().st_mtime + 10
    os.utime(tmp_path / "constraints.txt", (later, later))
    assert _make_setup(tmp_path).returncode == 0
    assert (tmp_path / "asked.txt").exists()
