# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re

import pytest

from edgekd.report import markdown


def _tables(text):
    return re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)


@pytest.mark.parametrize("outcome", ["PASS", "FAIL", "INCONCLUSIVE"])
def test_the_first_line_is_the_verdict(report, outcome):
    assert markdown.render({**report, "outcome": outcome}).splitlines()[0] == f"# keywords on board: {outcome}"


def test_every_row_of_a_table_has_as_many_cells_as_its_head(report):
    report["checks"][0]["name"] = "a|b\nc"
    report["candidates"][0]["why_not"] = "slower | larger"
    tables = _tables(markdown.render(report))
    assert len(tables) == 8
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table


def test_the_classes_that_lose_most_come_first_and_are_five(report):
    table = _tables(markdown.render(report))[5]
    assert [row.split("|")[1].strip() for row in table.splitlines()[2:]] == ["3", "2", "6", "1", "5"]


def test_the_report_of_a_failure_says_that_nothing_ships(report):
    assert "**ships**" in markdown.render(report)
    text = markdown.render({**report, "outcome": "FAIL", "shipped": None})
    assert "**ships**" not in text
    assert "shipped" not in text
    assert "| judged; nothing ships |" in text


def test_a_model_that_ships_without_having_passed_is_noted_above_the_table(report):
    text = markdown.render({**report, "outcome": "INCONCLUSIVE", "inconclusive_ok": True})
    assert "**Shipped although it is INCONCLUSIVE" in text.partition("\n|")[0]
    assert "`edgekd build --target board --inconclusive-ok`" in text
    assert "although" not in markdown.render(report)


def test_unknown_values_leave_no_empty_section(report):
    report["teacher"] |= {"latency": [], "parameters": None}
    report["choice"] |= {"speedup": None}
    report |= {
        "classes": {},
        "environment": None,
        "notes": [],
        "shared_errors": {"teacher_errors": 0, "also_wrong": None, "same_prediction": None},
    }
    for row in report["candidates"]:
        row |= {"latency": [], "notes": []}
    text = markdown.render(report)
    for absent in ("## Latency", "lose most", "measured on", "errors the", "Notes", "speed-up 1", "None", "nan", "the teacher 363"):
        assert absent not in text
    assert "\n\n\n" not in text


def test_a_curve_without_accuracy_shows_the_loss(report):
    for line in report["student"]["curve"]["epochs"]:
        line["validation_accuracy"] = None
    assert "epoch 3 is the best, with a validation loss of 0.3\n" in markdown.render(report)


def test_a_percentile_of_too_few_runs_is_not_shown(report):
    report["candidates"][0]["latency"][0]["p99"] = {"ms": 7.77, "interval": None}
    text = markdown.render(report)
    assert "| too few runs | 300 |" in text
    assert "7.77" not in text
