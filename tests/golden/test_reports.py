# SPDX-License-Identifier: Apache-2.0
"""Golden files of the report of a build: report.json, report.md and the plain table of the terminal."""

from __future__ import annotations

import copy
import functools
import json
import operator
import os
from pathlib import Path

import jsonschema
import pytest

from edgekd.domain.verdict import Check, Interval, Outcome, Verdict
from edgekd.report import document, markdown, text
from edgekd.store import documents
from tests import outputs

FOLDER = Path(__file__).parent
SCHEMA = json.loads(document.SCHEMA_FILE.read_text())
MACHINE = {
    "cpu_model": "Some Processor",
    "cores": 4,
    "instruction_set": "x86-64-v3",
    "kernel": "6.1.0",
    "governor": "unknown",
    "load": 0.25,
}


DISTILLATION = {
    "outcome": "HELPS",
    "seeds": 3,
    "baseline": "label_smoothing",
    "methods": [
        {
            "method": "distilled",
            "losses": "0.9 kl (temperature 2) + 0.1 ce",
            "accuracies": [0.917, 0.92, 0.914],
            "ece": 0.031,
            "nll": 0.25,
            "seconds": 180.4,
        },
        {"method": "no_teacher", "losses": "ce", "accuracies": [0.9, 0.903, 0.897], "ece": 0.021, "nll": 0.275, "seconds": 150.2},
        {
            "method": "label_smoothing",
            "losses": "ce (label_smoothing 0.3)",
            "accuracies": [0.905, 0.9, 0.907],
            "ece": 0.05,
            "nll": 0.31,
            "seconds": 151.0,
        },
    ],
    "gains": [
        {"baseline": "no_teacher", "pp": 1.7, "interval_pp": [0.6, 2.8]},
        {"baseline": "label_smoothing", "pp": 1.3, "interval_pp": [0.2, 2.4]},
    ],
    "gap_closed": 0.68,
    "flags": ["the student has reached its teacher (91.70 % of 92.50 %): a better student needs a better teacher"],
}


def _latency(runtime, p50, speedup):
    def quantile(factor):
        return {"ms": p50 * factor, "interval": [p50 * factor * 0.99, p50 * factor * 1.01]}

    return {
        "runtime": runtime,
        "runtime_version": "2.3.0",
        "threads": 1,
        "runs": 300,
        "p50": quantile(1.0),
        "p95": quantile(1.2),
        "p99": quantile(1.5),
        "first_ms": 2 * p50,
        "load_ms": 5.0,
        "peak_rss_mib": 40.5,
        "speedup": None if speedup is None else {"x": speedup, "interval": [speedup - 0.1, speedup + 0.1]},
    }


def _estimate(ms):
    return {
        "runtime": "litert",
        "threads": 1,
        "ms": ms,
        "band": [0.625 * ms, 1.6 * ms],
        "level": 0.8,
        "tier": "fitted",
        "provenance": "24 published rows of other runtimes on Some Board",
        "notes": ["3 times fewer MACs than any model of the rows"],
    }


def _candidate(scheme, size_bytes, why_not, latency):
    drop = {"float32": 0.5, "static_wi8_ai8": 0.8}[scheme]
    return {
        "id": "export/student/litert" if scheme == "float32" else f"quantize/litert/{scheme}/ptq",
        "runtime": "litert",
        "scheme": scheme,
        "rung": "ptq",
        "size_bytes": size_bytes,
        "digest": outputs.DIGEST,
        "float_ops": 1,
        "accuracy": 0.925 - drop / 100,
        "interval": [0.91, 0.93],
        "drop": {"pp": drop, "interval_pp": [drop - 0.4, drop + 0.4], "p": 0.031},
        "agreement": 0.96,
        "outcome": "PASS",
        "latency": latency,
        "estimates": [] if latency else [_estimate(4.32 if scheme == "float32" else 3.456)],
        "no_estimate": None,
        "why_not": why_not,
        "notes": ["SOFTMAX (1) stays float: no int8 kernel"] if scheme != "float32" else [],
    }


CLASSES = {
    str(n): {
        "samples": 100,
        "teacher": 0.95,
        "accuracy": 0.95 - 0.01 * (n % 4),
        "drop": 0.01 * (n % 4),
        "interval": [0.01 * (n % 4) - 0.02, 0.01 * (n % 4) + 0.02],
    }
    for n in range(7)
}


COST = [
    {"part": "soft_targets", "seconds": 12.5, "cpu_seconds": 12.25, "waited_seconds": 0.125, "samples": 60_000, "bytes": 1_200_000},
    {"part": "distill", "seconds": 61.04, "cpu_seconds": None, "waited_seconds": None, "samples": 550_000, "bytes": 131_072},
]


def _parts(*, measured):
    rows = [
        _candidate(
            "float32", 132_096, "too large: 129.0 KiB exceeds the budget 64 KiB", [_latency("litert", 0.5, 8.0)] if measured else []
        ),
        _candidate("static_wi8_ai8", 40_960, None, [_latency("litert", 0.25, 16.0)] if measured else []),
    ]
    selected_by = "measurement: p50 0.25 ms, the fastest of 2 settings" if measured else "size: nothing was measured, 2 candidates"
    epochs = [
        {
            "epoch": n,
            "learning_rate": 0.01 / n,
            "train_accuracy": 0.7 + 0.06 * n,
            "train_loss": 1.0 / n,
            "validation_accuracy": 0.7 + 0.05 * n,
            "validation_loss": 0.9 / n,
        }
        for n in (1, 2, 3)
    ]
    return {
        "edgekd": "1.2.3",
        "recipe": "keywords",
        "recipe_file": {"name": "edgekd.toml", "folder": ""},
        "target": {"name": "board", "title": "Some Board, 64-bit OS"},
        "choice": rows[1] | {"threads": 1, "selected_by": selected_by, "speedup": rows[1]["latency"][0]["speedup"] if measured else None},
        "candidates": rows,
        "left_out": [{"id": "quantize/litert/dynamic_wi8_afp32/ptq", "why_not": "AI Edge Quantizer refuses dynamic_wi8_afp32: no such op"}],
        "teacher": {
            "parameters": 363_498,
            "accuracy": 0.925,
            "interval": [0.919, 0.93],
            "latency": [_latency("litert", 4.0, None)] if measured else [],
        },
        "student": {"parameters": 31_338, "curve": {"epochs": epochs}},
        "accuracy_drop_by_stage": [
            {"stage": "distill", "pp": 0.5, "interval_pp": [0.1, 0.9], "p": 0.0012},
            {"stage": "export", "pp": 0.0, "interval_pp": [-0.04, 0.04], "p": 1.0},
            {"stage": "quantize", "pp": 0.3, "interval_pp": [-0.1, 0.7], "p": None},
            {"stage": "total", "pp": 0.8, "interval_pp": [0.4, 1.2], "p": 0.031},
        ],
        "distillation": DISTILLATION if measured else None,
        "cost": {"parts": COST, "break_even_inferences": 19_611 if measured else None},
        "classes": CLASSES,
        "shared_errors": {"teacher_errors": 75, "also_wrong": 0.8, "same_prediction": 0.72},
        "instruction_set": "x86-64-v3",
        "environment": {"before": MACHINE, "after": MACHINE, "seconds": 21.5} if measured else None,
        "steps": [
            {"step": "inspect", "key": "0123456789ab", "hit": True, "seconds": 1.25},
            {"step": "distill", "key": "ba9876543210", "hit": False, "seconds": 61.04},
        ],
        "tools": {"torch": "2.13.0", "onnx": "1.23.2", "litert-torch": None},
        "notes": ["evaluation has 700 samples; accuracy is known only roughly"],
        "measured_at": "2026-01-02T03:04:05+00:00",
        "verdict_key": "cd" * 32,
        "seconds": {"total": 90.5, "stages": 88.0},
    }


def _size(limit):
    reason = None if limit >= 40 else f"size 40 KiB exceeds {limit} KiB"
    return Check("max_size_kib", Outcome.PASS if reason is None else Outcome.FAIL, float(limit), "KiB", 40.0, None, reason)


DROP = Check("max_accuracy_drop_pp", Outcome.PASS, 1.5, "pp", 0.8, Interval(0.4, 1.2))
LATENCY = Check("max_latency_p95_ms", Outcome.PASS, 5.0, "ms", 0.3, Interval(0.297, 0.303))
UNMEASURED = Check(
    "max_latency_p95_ms",
    Outcome.INCONCLUSIVE,
    5.0,
    "ms",
    value=3.456,
    interval=Interval(2.16, 5.5296, 0.8),
    reason="not measured, as board is reached by ssh, and no device was named; the estimate's 80 % band includes the budget 5 ms, "
    "but an estimate passes nothing",
    advice="run this build on a Some Board, or accept that with --inconclusive-ok",
    tier="fitted",
)
SPEEDUP = Check("min_speedup_x", Outcome.PASS, 2.0, "x", 16.0, Interval(15.9, 16.1))
MEMORY = Check("limit.memory_mib", Outcome.PASS, 24_105.0, "MiB", 40.5)


def _document(outcome):
    checks = {"pass": (DROP, LATENCY, SPEEDUP, _size(64), MEMORY), "fail": (DROP, LATENCY, _size(32)), "inconclusive": (DROP, UNMEASURED)}
    shipped = {"shipped": None if outcome == "fail" else "keywords.tflite", "inconclusive_ok": outcome == "inconclusive"}
    return document.with_verdict({**_parts(measured=outcome != "inconclusive"), **shipped}, Verdict("board", checks[outcome]))


@pytest.fixture(params=["pass", "fail", "inconclusive"])
def outcome(request):
    return request.param


def _is_golden(name, text):
    path = FOLDER / name
    if os.environ.get("EDGEKD_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def test_the_json_is_the_golden_file(outcome):
    _is_golden(f"report_{outcome}.json", documents.as_json(_document(outcome)).decode())


def test_the_markdown_is_the_golden_file(outcome):
    _is_golden(f"report_{outcome}.md", markdown.render(_document(outcome)))


def test_the_plain_text_is_the_golden_file(outcome):
    _is_golden(f"report_{outcome}.txt", text.render_verdict(_document(outcome), cached=False))


def test_reports_follow_the_schema(outcome):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.Draft202012Validator(SCHEMA).validate(_document(outcome))


def test_the_three_outcomes_have_three_exit_codes():
    assert [document.exit_code(_document(name)) for name in ("pass", "fail", "inconclusive")] == [0, 1, 4]


def test_the_schema_refuses_unknown_and_missing_keys(outcome):
    report = _document(outcome)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    for path in ((), ("choice",), ("teacher",), ("candidates", 0), ("checks", 0), ("steps", 0), ("candidates", 0, "drop")):
        extended, shortened = copy.deepcopy(report), copy.deepcopy(report)
        functools.reduce(operator.getitem, path, extended)["unknown"] = 1
        assert not validator.is_valid(extended), path
        part = functools.reduce(operator.getitem, path, shortened)
        part.pop(min(part))
        assert not validator.is_valid(shortened), path
    assert not validator.is_valid({**report, "outcome": "MAYBE"})


def test_a_report_read_back_renders_the_same(outcome, tmp_path):
    report = _document(outcome)
    outputs.write_output(tmp_path, report)
    read_report = document.read(tmp_path / "report.json")
    assert markdown.render(read_report) == markdown.render(report)
    assert text.render_verdict(read_report, cached=False) == text.render_verdict(report, cached=False)
