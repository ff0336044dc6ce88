# SPDX-License-Identifier: Apache-2.0
"""The terminal's verdict and progress: plain where there is no terminal, and in a real pseudo-terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgekd.report import text

GOLDEN = Path(__file__).parents[2] / "golden"
COLOUR = re.compile(rb"\x1b\[(?:\d+;)*3\d")
VERDICT = (
    "import json, sys; from edgekd.report import text;sys.stdout.write(text.render_verdict(json.load(open(sys.argv[1])), standing=False))"
)
PROGRESS = """
from edgekd.report import text
with text.reporter() as reporter:
    reporter.log("said [bold]plainly[/bold]")
    with reporter.step("quantize/x/ptq[a=1]") as progress:
        progress(0.5, "epoch 1/2 [/nothing] [b]")
        reporter.bars.refresh()
"""


def _in_terminal(program, *arguments, **environment):
    """Run a program whose stdout and stderr are a terminal; return what it showed."""
    ours, theirs = pty.openpty()
    known = {key: value for key, value in os.environ.items() if key not in {"NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"}}
    environment = {**known, "TERM": "xterm-256color", "COLUMNS": "140", **environment}
    with subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 65536):
                shown += part
        except OSError:  # the other side is closed
            pass
    os.close(ours)
    assert process.returncode == 0, shown
    return shown


@pytest.mark.parametrize(("outcome", "colour"), [("pass", b"\x1b[32m"), ("fail", b"\x1b[1;31m"), ("inconclusive", b"\x1b[33m")])
def test_a_terminal_gets_a_table_with_colours(outcome, colour):
    shown = _in_terminal(VERDICT, GOLDEN / f"report_{outcome}.json")
    assert colour + outcome.upper().encode() in shown
    assert b"[0.4, 1.2]" in shown


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colour_where_none_is_wanted(environment):
    shown = _in_terminal(VERDICT, GOLDEN / "report_fail.json", **environment)
    assert b"FAIL" in shown
    assert not COLOUR.search(shown)


def test_bars_show_brackets_as_they_are():
    shown = _in_terminal(PROGRESS)
    assert b"said [bold]plainly[/bold]" in shown
    assert b"quantize/x/ptq[a=1]" in shown
    assert b"epoch 1/2 [/nothing] [b]" in shown
    assert b"Traceback" not in shown


def test_where_there_is_no_terminal_progress_is_lines_not_too_many(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 9.9, 10.0, 10.1, 15.0, 20.1, 20.2])
    now = [0.0]

    def monotonic():
        now[0] = next(clock, now[0])
        return now[0]

    monkeypatch.setattr(text.time, "monotonic", monotonic)
    with text.reporter() as reporter, reporter.step("distill") as progress:
        reporter.log("distill: never run here")
        for epoch in range(1, 5):
            progress(epoch / 4, f"epoch {epoch}/4")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "distill: never run here\ndistill: 75 %, epoch 3/4\n"


def test_a_verdict_that_stands_tells_since_when(told):
    assert text.render_verdict(told, standing=True).splitlines()[0] == (
        "keywords on board: PASS; the verdict of 2026-01-02T03:04:05+00:00 stands"
    )


def test_a_build_that_was_stopped_tells_where_its_files_lie():
    told = {"schema": 1, "recipe": "toy", "outcome": "INCONCLUSIVE", "until": "distill", "folder": "build/until-distill"}
    assert text.render_verdict(told, standing=False) == (
        "toy: INCONCLUSIVE: stopped after distill; what it made lies in build/until-distill\n"
    )


def test_measurements_are_a_table_with_each_note_once(told):
    rows = [{"model": name, **told["candidates"][0]["latency"][0], "notes": ["the governor is unknown"]} for name in ("a.tflite", "b.onnx")]
    rows[0] |= {"speedup": None, "p99": {"ms": 1.0, "interval": None}}
    lines = text.render_measurements(rows).splitlines()
    assert len(lines) == 4
    assert "n too small" in lines[1]
    assert "8x [7.9, 8.1]" in lines[2]
    assert lines[3] == "  note: the governor is unknown"


def test_the_plain_verdict_imports_nothing_heavy():
    program = (
        VERDICT.replace("import json", "import json, os", 1) + "; print(sorted({'rich', 'numpy', 'torch', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(GOLDEN / "report_pass.json")], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
