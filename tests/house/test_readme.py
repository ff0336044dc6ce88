# SPDX-License-Identifier: Apache-2.0
"""Every command in the README works: it is run here, or a verb of the Makefile, or covered by a test that is named here."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from edgekd import config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SETUP_VERBS = set(re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1).split())
RUN_HERE = ("init", "targets", "schema", "doctor", "--help", "plan")  # cheap commands, in a temporary folder
COVERED = {  # commands that take longer, and the tests that run them
    "edgekd build --recipe my-model/edgekd.toml --target host": "tests/pipeline/test_build.py::test_the_recipe_that_init_writes_builds_and_passes",
    "edgekd build --target host": "tests/pipeline/test_build.py::test_a_build_for_two_targets_shares_the_stages_and_ends_in_two_verdicts",
    "edgekd report build/host": "tests/pipeline/test_build.py::test_report_shows_the_verdict_of_an_earlier_build",
}


def commands(text):
    """Return the command lines of fenced blocks without a language: without prompt and comment, and split at ``&&``."""
    lines = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        shown = [] if language else block.splitlines()
        with_prompt = [line.removeprefix("$ ") for line in shown if line.startswith("$ ")]
        lines += with_prompt or shown  # in a block with a prompt, the other lines are output
    parts = [part.strip() for line in lines for part in re.sub(r"\s+#.*$", "", line).split("&&")]
    return [part.removeprefix(".venv/bin/") for part in parts if part]


def problem(command):
    """Return why nothing shows that a command works, or None."""
    program, *arguments = shlex.split(command)
    if program == "make" and set(arguments) <= SETUP_VERBS:
        return None
    if command in COVERED:
        path, _, name = COVERED[command].partition("::")
        return None if f"def {name}(" in (ROOT / path).read_text(encoding="utf-8") else f"{COVERED[command]} does not exist"
    if program == "edgekd" and arguments[0] in RUN_HERE:
        return None
    return "is neither run by this test, nor a verb of the Makefile, nor covered by a named test"


def test_readme_shows_both_commands_first():
    assert commands(README)[:2] == ["make demo", "make test"]
    assert len(commands(README)) >= 10


@pytest.mark.parametrize("command", dict.fromkeys(commands(README)))
def test_every_command_is_covered(command):
    assert problem(command) is None


def test_uncovered_commands_are_detected():
    text = "```\nedgekd upload  # nowhere\nmake coffee && edgekd doctor\n```\n```\n$ edgekd quantize\noutput\n```\n```toml\nx = 1\n```\n"
    assert [command for command in commands(text) if problem(command)] == ["edgekd upload", "make coffee", "edgekd quantize"]


def test_cheap_commands_run(tmp_path):
    environment = {**os.environ, "EDGEKD_CACHE": str(tmp_path / "cache")}
    cheap = [shlex.split(command)[1:] for command in commands(README) if command not in COVERED and command.startswith("edgekd ")]
    cheap.sort(key=lambda arguments: arguments[0] != "init")  # it writes the recipe that the others read
    assert cheap[0] == ["init", "my-model"]
    for arguments in cheap:
        folder = tmp_path / "my-model" if arguments[0] == "plan" else tmp_path
        completed = subprocess.run(
            [sys.executable, "-m", "edgekd", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert completed.returncode == 0, f"edgekd {shlex.join(arguments)}: {completed.stderr}"
        assert completed.stdout


def test_readme_recipe_is_valid(tmp_path):
    (recipe,) = re.findall(r"^```toml\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    (tmp_path / "edgekd.toml").write_text(recipe)
    for name in ("data.py", "models.py", "teacher.safetensors"):
        (tmp_path / name).touch()
    assert config.load_recipe(tmp_path / "edgekd.toml").name == "fashion"


def test_readme_lists_every_target():
    titles = {name: config.load_target(name).title for name in config.target_names()}
    assert dict(re.findall(r"^\| `([a-z0-9-]+)` \| (.+) \|$", README, re.MULTILINE)) == titles
