# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os

import pytest

from edgekd.errors import UsageError
from edgekd.report import document
from tests import outputs


def test_a_report_is_read_from_its_folder_or_its_file(report, tmp_path):
    outputs.write_output(tmp_path, report)
    assert document.read(tmp_path) == document.read(tmp_path / "report.json") == report


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not a JSON object; build again"),
        (b"\xff\xfe", "is not a JSON object; build again"),
        (b"[1]", "is not a JSON object; build again"),
        (b'{"schema": 2}', "is not a report of schema 1; build again"),
        (b'{"schema": true}', "is not a report of schema 1; build again"),
        (b'{"schema": 1, "checks": []}', "is not a complete report: accuracy_drop_by_stage, candidates, choice, .* missing; build again"),
    ],
)
def test_a_file_that_is_not_a_report_is_one_clear_error(tmp_path, content, message):
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        document.read(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "empty", "pipe"])
def test_a_folder_without_a_report_is_an_error_that_names_the_command(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "report.json")
    problem = "Not a regular file" if name == "pipe" else "No such file or directory"
    with pytest.raises(UsageError, match=f"{problem}; expected the folder of a target, as in: edgekd report build/host"):
        document.read(tmp_path / name)


def test_an_edited_report_is_refused(report, tmp_path):
    outputs.withhold(tmp_path, report)
    path = tmp_path / "report.json"
    path.write_text(path.read_text().replace('"FAIL"', '"PASS"'))
    with pytest.raises(UsageError, match="was changed after it was written"):
        document.read(tmp_path)


def test_a_report_that_is_sealed_but_not_as_the_schema_says_is_refused(report, tmp_path):
    for changes in ({"classes": {"0": {}}}, {"seconds": 3}, {"checks": [{}]}, {"outcome": "MAYBE"}, {"more": 1}, {"inconclusive_ok": 1}):
        (tmp_path / "report.json").write_text(json.dumps(outputs.with_changes(report, **changes)))
        with pytest.raises(UsageError, match="is not a report of this version of edgekd: .*; build again"):
            document.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda folder: (folder / "keywords.tflite").unlink(), "that file is missing"),
        (lambda folder: (folder / "keywords.tflite").write_bytes(b"other"), "its bytes are not those of the model that was judged"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing, damaged or changed"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"{}"), "manifest.json is missing, damaged or changed"),
    ],
)
def test_a_folder_without_the_model_that_ships_is_an_error(report, tmp_path, change, problem):
    outputs.write_output(tmp_path, report)
    change(tmp_path)
    for path in (tmp_path, tmp_path / "report.json"):
        with pytest.raises(UsageError, match=rf"says that keywords\.tflite ships, but {problem}; build again"):
            document.read(path)


def test_the_manifest_of_another_build_is_refused(report, tmp_path):
    outputs.write_output(tmp_path, report)
    other = tmp_path / "other"
    outputs.write_output(other, outputs.with_changes(report, verdict_key="other"))
    (other / "manifest.json").rename(tmp_path / "manifest.json")
    with pytest.raises(UsageError, match="manifest.json is that of another build"):
        document.read(tmp_path)


@pytest.mark.parametrize(("outcome", "shipped"), [("PASS", None), ("FAIL", "keywords.tflite"), ("PASS", "../keywords.tflite")])
def test_what_ships_agrees_with_the_verdict(report, tmp_path, outcome, shipped):
    outputs.write_output(tmp_path, report)
    (tmp_path / "report.json").write_text(json.dumps(outputs.with_changes(report, outcome=outcome, shipped=shipped)))
    with pytest.raises(UsageError, match="ships, but the verdict is"):
        document.read(tmp_path)


def test_the_outcome_is_the_exit_code(report, tmp_path):
    outputs.withhold(tmp_path, report)
    assert document.exit_code(document.read(tmp_path)) == 1


def test_every_part_of_a_report_is_required(report, tmp_path):
    for name in sorted(set(report) - {"schema"}):
        (tmp_path / "report.json").write_text(json.dumps({key: value for key, value in report.items() if key != name}))
        with pytest.raises(UsageError, match=rf"is not a complete report: {name} missing"):
            document.read(tmp_path)


def test_a_document_has_no_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    document._home.cache_clear()
    content = {"/home/someone/x": ["in '/home/someone/a.onnx'", "/home/someone", "/home/someone2/a", 1, None, "\x1b"]}
    assert document.plain_document(content) == {"~/x": ["in '~/a.onnx'", "~", "/home/someone2/a", 1, None, "\\x1b"]}
    monkeypatch.undo()
    document._home.cache_clear()
