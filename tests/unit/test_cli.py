# SPDX-License-Identifier: Apache-2.0
"""The command line: where output goes that nobody can read, and how long a message is."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edgekd import cli
from tests import stripes

EDGEKD = (sys.executable, "-m", "edgekd")


@pytest.mark.parametrize("arguments", [("targets",), ("schema",), ("--help",)])
def test_a_full_disk_is_reported_and_is_no_verdict(arguments):
    with open("/dev/full", "w") as full:  # noqa: PTH123  (a device)
        process = subprocess.run([*EDGEKD, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert process.returncode == 5
    assert process.stderr == "edgekd: the output: cannot be read or written: No space left on device\n"


@pytest.mark.parametrize(("outcome", "exit_code"), [("PASS", 0), ("FAIL", 1), ("INCONCLUSIVE", 4)])
def test_a_reader_that_has_closed_the_output_does_not_change_the_exit_code(outcome, exit_code, monkeypatch, capfd):
    from edgekd.build import run
    from edgekd.build.judge import Result
    from edgekd.report import text

    def broken_echo(*arguments, **options):
        raise BrokenPipeError

    monkeypatch.setattr(run, "build", lambda request, reporter: [Result({"outcome": outcome}, cached=False, exit_code=exit_code)])
    monkeypatch.setattr(text, "render_verdict", lambda document, cached: outcome)
    monkeypatch.setattr(cli.click, "echo", broken_echo)
    monkeypatch.setattr(cli, "_discard_output", lambda: None)
    assert cli.run(["build"]) == exit_code
    assert capfd.readouterr().err == ""


def test_output_without_a_reader_is_no_verdict():
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    process = subprocess.run([*EDGEKD, "--help"], stdout=reader.stdin, stderr=subprocess.PIPE, text=True, check=False)
    reader.stdin.close()
    assert (process.returncode, process.stderr) == (5, "")


def test_a_message_has_at_most_twenty_problems(tmp_path):
    stripes.write(tmp_path, recipe=stripes.RECIPE + "".join(f"key{number} = 1\n" for number in range(1000)))
    process = stripes.build(tmp_path)
    stripes.check_message(process, {2})
    lines = process.stderr.splitlines()
    assert lines[0] == "edgekd: edgekd.toml: budget.key0: unknown key; " + lines[0].partition("unknown key; ")[2]
    assert lines[20:] == ["edgekd: and 980 more problems"]


def test_a_message_has_at_most_a_thousand_letters_and_no_control_character(tmp_path):
    stripes.write(tmp_path, recipe=stripes.RECIPE + f'"{"k" * 10**5}\\u001b[31m" = 1\n')
    process = stripes.build(tmp_path)
    stripes.check_message(process, {2})
    assert len(process.stderr) < 1100


def test_a_path_that_is_too_long_is_a_mistake_of_the_user(tmp_path):
    process = subprocess.run([*EDGEKD, "report", "a" * 5000], cwd=tmp_path, capture_output=True, text=True, check=False)
    stripes.check_message(process, {2})
    assert "aaa... (5,000 characters): " in process.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_change_the_exit_code(closed, tmp_path):
    folder = stripes.write(tmp_path / "stripes")
    shell = ["bash", "-c", f'"$@" {closed}', "bash", *stripes.command("--until", "inspect")]
    process = subprocess.run(shell, cwd=folder, stderr=subprocess.PIPE, text=True, check=False)
    assert process.returncode == 4, process.stderr
    assert process.stderr == "" or "Traceback" not in process.stderr
    assert (folder / "build" / "until-inspect" / "summary.json").is_file()
