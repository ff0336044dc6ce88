# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re

import pytest
from markdown_it import MarkdownIt

from edgekd.errors import printable
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
    assert "trained for 3 epochs; a validation loss of 0.3 after the last\n" in markdown.render(report)


def test_a_percentile_of_too_few_runs_is_not_shown(report):
    report["candidates"][0]["latency"][0]["p99"] = {"ms": 7.77, "interval": None}
    text = markdown.render(report)
    assert "| too few runs | 300 |" in text
    assert "7.77" not in text


HOSTILE = (
    *("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<!-- x", "&lt;b&gt;", "&#60;b>", "a < b > c & d"),
    *("[text](http://example.org)", "![image](x)", "[a][b]", "[a]: /b", "<http://example.org>", "http://example.org", "www.example.org"),
    *("*a* **b** _c_ __d__ ~~e~~ ~f~", "snake_case_name", "`code`", "``", "a | b || c", "\\", "\\|", "a\\`b`", "@someone", "x@example.org"),
    *("# heading", "> quotation", "- item", "+ item", "1. item", "2) item", "---", "===", "```", "~~~", "|a|b|", "$x$", "trailing \\"),
    *("line\n\n# heading", "a\r\n- b", "\x1b[31mred", "\u202eright", "\udcff", "-1.5", "1.5", "12", "#1"),
)


def _shown(markdown, kind):
    """Return the text that a Markdown parser shows for a paragraph, a list item or a cell, and the kinds of its inline parts."""
    content = {"paragraph": f"{markdown}\n", "item": f"- {markdown}\n", "cell": f"| a | b |\n| --- | --- |\n| {markdown} | end |\n"}[kind]
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(content)
    inline = [token for token in tokens if token.type == "inline"]
    parts = inline[2 if kind == "cell" else 0].children
    assert len(inline) == (4 if kind == "cell" else 1), markdown
    assert {token.type for token in tokens} <= {"inline", *STRUCTURE[kind]}
    return "".join(part.content for part in parts), {part.type for part in parts}


STRUCTURE = {
    "paragraph": {"paragraph_open", "paragraph_close"},
    "item": {"paragraph_open", "paragraph_close", "bullet_list_open", "bullet_list_close", "list_item_open", "list_item_close"},
    "cell": {f"{part}_{end}" for part in ("table", "thead", "tbody", "tr", "th", "td") for end in ("open", "close")},
}


@pytest.mark.parametrize("kind", STRUCTURE)
@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_text_of_others_is_shown_as_it_is(text, kind):
    shown, parts = _shown(markdown._escape(text), kind)
    assert shown == printable(text)
    assert parts <= {"text", "text_special", "code_inline"}
    assert ("code_inline" in parts) == ("@" in text)
    assert "@s" not in markdown._escape(text)
    assert not re.search(r"(?<!\\)://|\bwww\.", markdown._escape(text))


def test_every_text_of_a_report_is_escaped(report):
    hostile = "<b>|`@someone`\n# x"
    report["notes"] = [hostile]
    report["classes"] = {hostile: next(iter(report["classes"].values()))}
    report["target"]["title"] = hostile
    report["candidates"][0] |= {"why_not": hostile, "notes": [hostile]}
    report["checks"][0] |= {"reason": hostile, "advice": hostile}
    rendered = markdown.render(report)
    assert "<b>" not in rendered.replace("\\<b>", "")
    assert "@someone" not in rendered
    assert "\n# x" not in rendered


def test_a_missing_interval_is_said(report):
    report["choice"]["drop"]["interval_pp"] = report["candidates"][0]["drop"]["interval_pp"] = None
    report["accuracy_drop_by_stage"][0]["interval_pp"] = None
    for row in report["classes"].values():
        row["interval"] = None
    rendered = markdown.render(report)
    assert rendered.count("(no interval)") == 2 + markdown.SHOWN_CLASSES
    assert "| no interval |" in rendered
