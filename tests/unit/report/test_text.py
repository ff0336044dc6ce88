# SPDX-License-Identifier: Apache-2.0
"""Numbers, the verdict and the progress of a build as text: without a terminal, and in a real pseudo-terminal."""

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
COLOR = re.compile(rb"\x1b\[(?:\d+;)*3\d")
VERDICT = (
    "import json, sys; from edgekd.report import text; sys.stdout.write(text.render_verdict(json.load(open(sys.argv[1])), cached=False))"
)
PROGRESS = """
from edgekd.report import text
with text.reporter() as reporter:
    reporter.log("line [bold]of text[/bold]")
    with reporter.step("quantize/x/ptq[a=1]") as progress:
        progress(0.5, "epoch 1/2 [/nothing] [b]")
        reporter.bars.refresh()
"""


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (None, "ms", "unknown"),
        (0.0, "pp", "0 pp"),
        (10.930975, "x", "10.93x"),
        (92.5, "%", "92.5 %"),
        (0.000123456, "ms", "0.0001235 ms"),
        (-1.23456, "pp", "-1.235 pp"),
        (9999.4, "KiB", "9999 KiB"),
        (24105.3, "MiB", "24,105 MiB"),
        (3.0, "", "3"),
    ],
)
def test_a_number_has_four_digits_and_its_unit(value, unit, expected):
    assert text.number(value, unit) == expected


def test_a_value_is_never_rounded_out_of_its_interval():
    assert f"{text.number(10.930975, 'x')} {text.interval([10.9193, 10.9431])}" == "10.93x [10.92, 10.94]"


def test_a_limit_has_its_direction():
    assert text.limit({"name": "min_speedup_x", "limit": 2.0, "unit": "x"}) == ">= 2x"
    assert text.limit({"name": "max_size_kib", "limit": 64.0, "unit": "KiB"}) == "<= 64 KiB"
    assert text.limit({"name": "limit.memory_mib", "limit": None, "unit": "MiB"}) == ""


def test_a_percentile_of_too_few_runs_is_not_shown():
    assert text.percentile({"ms": 3.21, "interval": None}) == "too few runs"
    assert text.percentile({"ms": 3.21, "interval": [3.0, 3.5]}) == "3.21 [3, 3.5]"


@pytest.mark.parametrize(
    ("shipped", "outcome", "expected"), [("a.tflite", "PASS", False), ("a.tflite", "INCONCLUSIVE", True), (None, "INCONCLUSIVE", False)]
)
def test_a_model_that_ships_without_having_passed_is_inconclusive_ok(shipped, outcome, expected):
    assert text.is_inconclusive_ok({"shipped": shipped, "outcome": outcome}) is expected


def _in_terminal(program, *arguments, **environment):
    """Run a program whose stdout and stderr are a terminal; return its output."""
    reader, terminal = pty.openpty()
    inherited = {key: value for key, value in os.environ.items() if key not in {"NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"}}
    environment = {**inherited, "TERM": "xterm-256color", "COLUMNS": "140", **environment}
    with subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], stdout=terminal, stderr=terminal, env=environment
    ) as process:
        os.close(terminal)
        output = b""
        try:
            while part := os.read(reader, 65536):
                output += part
        except OSError:  # the program has ended
            pass
    os.close(reader)
    assert process.returncode == 0, output
    return output


@pytest.mark.parametrize(("outcome", "color"), [("pass", b"\x1b[32m"), ("fail", b"\x1b[1;31m"), ("inconclusive", b"\x1b[33m")])
def test_a_terminal_gets_a_table_with_colors(outcome, color):
    shown = _in_terminal(VERDICT, GOLDEN / f"report_{outcome}.json")
    assert color + outcome.upper().encode() in shown
    assert b"[0.4, 1.2]" in shown


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_there_is_no_color_where_the_environment_forbids_it(environment):
    shown = _in_terminal(VERDICT, GOLDEN / "report_fail.json", **environment)
    assert b"FAIL" in shown
    assert not COLOR.search(shown)


def test_bars_show_brackets_as_they_are():
    shown = _in_terminal(PROGRESS)
    assert b"line [bold]of text[/bold]" in shown
    assert b"quantize/x/ptq[a=1]" in shown
    assert b"epoch 1/2 [/nothing] [b]" in shown
    assert b"Traceback" not in shown


def test_without_a_terminal_progress_is_a_line_every_ten_seconds(monkeypatch, capsys):
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


def test_a_cached_verdict_shows_its_date(report):
    assert text.render_verdict(report, cached=True).splitlines()[0] == (
        "keywords on board: PASS; cached verdict of 2026-01-02T03:04:05+00:00"
    )


def test_a_build_that_was_stopped_shows_where_its_output_is():
    report = {"schema": 1, "recipe": "toy", "outcome": "INCONCLUSIVE", "until": "distill", "folder": "build/until-distill"}
    assert text.render_verdict(report, cached=False) == ("toy: INCONCLUSIVE: stopped after distill; its output is in build/until-distill\n")


def test_measurements_are_a_table_with_each_note_once(report):
    rows = [
        {"model": name, **report["candidates"][0]["latency"][0], "notes": ["the governor is unknown"]} for name in ("a.tflite", "b.onnx")
    ]
    rows[0] |= {"speedup": None, "p99": {"ms": 1.0, "interval": None}}
    lines = text.render_measurements(rows).splitlines()
    assert len(lines) == 4
    assert "too few runs" in lines[1]
    assert "8x [7.9, 8.1]" in lines[2]
    assert lines[3] == "  note: the governor is unknown"


def test_the_plain_verdict_imports_nothing_heavy():
    program = (
        VERDICT.replace("import json", "import json, os", 1) + "; print(sorted({'rich', 'numpy', 'torch', 'scipy'} & set(sys.modules)))"
    )
    process = subprocess.run([sys.executable, "-c", program, str(GOLDEN / "report_pass.json")], capture_output=True, text=True, check=True)
    assert process.stdout.splitlines()[-1] == "[]"


def test_lines_stay_lines_and_many_are_counted():
    assert text.plain_lines("a\x1b\nb\r\nc") == ["a\\x1b", "b", "c"]
    assert text.plain_lines("a\n" * 1000)[-1] == "... (1,001 lines)"


ESTIMATE = {
    "threads": 4,
    "ms": 0.123456,
    "band": [0.0654, 12345.6],
    "level": 0.8,
    "tier": "spec-scaled",
    "provenance": "9 rows",
    "notes": ["far"],
}


def test_an_estimate_has_two_digits_a_band_a_tier_and_what_it_rests_on():
    choice = {"threads": 4, "estimates": [{**ESTIMATE, "threads": 1}, ESTIMATE], "no_estimate": None}
    expected = "latency estimate: about 0.12 ms [0.065, 1.2e+04] (80 % band, spec-scaled); 9 rows; far"
    assert text.estimate_line({"choice": choice}) == expected


def test_a_missing_estimate_says_why_and_a_measured_model_needs_none():
    choice = {"threads": 1, "estimates": [], "no_estimate": "no estimate: the work of LSTM cannot be counted"}
    assert text.estimate_line({"choice": choice}) == "no estimate: the work of LSTM cannot be counted"
    assert text.estimate_line({"choice": {**choice, "no_estimate": None}}) is None


def test_the_row_of_a_check_tells_an_estimate_from_a_measurement():
    check = {
        "name": "max_latency_p95_ms",
        "value": 3.456,
        "interval": [2.1611, 5.5296],
        "unit": "ms",
        "limit": 5.0,
        "outcome": "FAIL",
        "tier": None,
    }
    assert text.check_cells(check)[1:3] == ("3.456 ms", "[2.161, 5.53]")
    assert text.check_cells({**check, "tier": "fitted"})[1:3] == ("about 3.5 ms (fitted)", "[2.2, 5.5] (80 % band)")
