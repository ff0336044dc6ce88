# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest

from edgekd.errors import UsageError
from edgekd.report import document


def test_a_report_is_read_from_its_folder_or_its_file(report, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path / report["shipped"]).write_bytes(b"model")
    assert document.read(tmp_path) == document.read(tmp_path / "report.json") == report


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON; build again"),
        (b"\xff\xfe", "is not valid JSON; build again"),
        (b"[1]", "is not a report of schema 1; build again"),
        (b'{"schema": 2}', "is not a report of schema 1; build again"),
        (b'{"schema": 1, "checks": []}', "is not a complete report: accuracy_drop_by_stage, candidates, choice, .* missing; build again"),
    ],
)
def test_a_file_that_is_not_a_report_is_one_clear_error(tmp_path, content, message):
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        document.read(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_a_report_is_an_error_that_names_the_command(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="No such file or directory; expected the folder of a target, as in: edgekd report build/host"):
        document.read(tmp_path / name)


def test_a_folder_without_the_model_that_ships_is_an_error(report, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    with pytest.raises(UsageError, match=r"says that keywords\.tflite ships, but that file is missing; build again"):
        document.read(tmp_path)
    assert document.read(path) == report  # a report without its folder
    path.write_text(json.dumps({**report, "outcome": "FAIL", "shipped": None}))
    assert document.exit_code(document.read(tmp_path)) == 1


def test_every_part_of_a_report_is_required(report, tmp_path):
    for name in sorted(set(report) - {"schema"}):
        (tmp_path / "report.json").write_text(json.dumps({key: value for key, value in report.items() if key != name}))
        with pytest.raises(UsageError, match=rf"is not a complete report: {name} missing"):
            document.read(tmp_path)
