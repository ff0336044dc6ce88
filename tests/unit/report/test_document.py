# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest

from edgekd.errors import UsageError
from edgekd.report import document


def test_a_report_is_read_from_its_folder_or_by_its_name(told, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(told))
    (tmp_path / told["shipped"]).write_bytes(b"model")
    assert document.read(tmp_path) == document.read(tmp_path / "report.json") == told


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is no JSON; build again"),
        (b"\xff\xfe", "is no JSON; build again"),
        (b"[1]", "is no report of schema 1; build again"),
        (b'{"schema": 2}', "is no report of schema 1; build again"),
        (b'{"schema": 1, "checks": []}', "is no whole report: candidates, charges, choice, .* missing; build again"),
    ],
)
def test_what_is_no_report_is_one_clear_error(tmp_path, content, message):
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        document.read(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_a_report_is_told_with_the_command(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="No such file or directory; expected the folder of a target, as in: edgekd report build/host"):
        document.read(tmp_path / name)


def test_a_folder_whose_model_is_gone_has_not_passed(told, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(told))
    with pytest.raises(UsageError, match=r"says that keywords\.tflite ships, which is not there; build again"):
        document.read(tmp_path)
    assert document.read(path) == told  # a report that was sent alone
    path.write_text(json.dumps({**told, "outcome": "FAIL", "shipped": None}))
    assert document.exit_code(document.read(tmp_path)) == 1


def test_every_part_of_a_report_must_be_there(told, tmp_path):
    for name in sorted(set(told) - {"schema"}):
        (tmp_path / "report.json").write_text(json.dumps({key: value for key, value in told.items() if key != name}))
        with pytest.raises(UsageError, match=rf"is no whole report: {name} missing"):
            document.read(tmp_path)
