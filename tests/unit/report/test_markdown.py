# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re

import pytest

from edgekd.report import markdown


def _tables(text):
    return re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)


@pytest.mark.parametrize("outcome", ["PASS", "FAIL", "INCONCLUSIVE"])
def test_the_first_line_is_the_verdict(told, outcome):
    assert markdown.render({**told, "outcome": outcome}).splitlines()[0] == f"# keywords on board: {outcome}"


def test_every_row_of_a_table_has_the_cells_of_its_head(told):
    told["checks"][0]["name"] = "a|b\nc"
    told["candidates"][0]["why_not"] = "slower | larger"
    tables = _tables(markdown.render(told))
    assert len(tables) == 8
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table


def test_the_classes_that_lose_most_come_first_and_are_five(told):
    table = _tables(markdown.render(told))[5]
    assert [row.split("|")[1].strip() for row in table.splitlines()[2:]] == ["3", "2", "6", "1", "5"]


def test_nothing_ships_in_a_report_of_a_failure(told):
    assert "**ships**" in markdown.render(told)
    text = markdown.render({**told, "outcome": "FAIL", "shipped": None})
    assert "**ships**" not in text
    assert "shipped" not in text
    assert "| judged; nothing ships |" in text


def test_a_model_that_ships_without_having_passed_is_told_above_the_table(told):
    text = markdown.render({**told, "outcome": "INCONCLUSIVE", "inconclusive_ok": True})
    assert "**Shipped although it is INCONCLUSIVE" in text.partition("\n|")[0]
    assert "`edgekd build --target board --inconclusive-ok`" in text
    assert "although" not in markdown.render(told)


def test_what_is_not_known_leaves_no_empty_chapter(told):
    told["teacher"] |= {"latency": [], "parameters": None}
    told["choice"] |= {"speedup": None}
    told |= {
        "classes": {},
        "environment": None,
        "notes": [],
        "shared_errors": {"teacher_errors": 0, "also_wrong": None, "same_answer": None},
    }
    for row in told["candidates"]:
        row |= {"latency": [], "notes": []}
    text = markdown.render(told)
    for absent in ("## Latency", "lose most", "measured on", "errors the", "Remarks", "speed-up 1", "None", "nan", "the teacher 363"):
        assert absent not in text
    assert "\n\n\n" not in text


def test_a_curve_without_accuracy_tells_the_loss(told):
    for line in told["student"]["curve"]["epochs"]:
        line["validation_accuracy"] = None
    assert "epoch 3 was kept, with a validation loss of 0.3\n" in markdown.render(told)


def test_a_percentile_that_the_runs_cannot_carry_is_not_told(told):
    told["candidates"][0]["latency"][0]["p99"] = {"ms": 7.77, "interval": None}
    text = markdown.render(told)
    assert "| n too small | 300 |" in text
    assert "7.77" not in text
