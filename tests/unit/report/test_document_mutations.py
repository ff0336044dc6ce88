# SPDX-License-Identifier: Apache-2.0
"""Whatever happens to the files of an output folder: `report` shows the verdict of the build or refuses, `build` believes it or not."""

from __future__ import annotations

import json
import random

import pytest

from edgekd import cli
from edgekd.report import markdown, text
from edgekd.stages import package
from edgekd.store.documents import seal
from tests import mutations, outputs

ORIGINALS = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 4}


def _check(folder, report, path, content, capsys):
    """Check both readers on a changed file, and restore it."""
    original = path.read_bytes()
    path.write_bytes(content)
    believed = package.read_previous(folder)
    code = cli.run(["report", str(folder), "--format", "json"])
    output = capsys.readouterr()
    path.write_bytes(original)
    if code == 2:
        assert believed is None
        assert output.out == ""
        assert len(output.err.splitlines()) == 1, output.err
    else:
        assert believed == report == json.loads(output.out)
        assert code == ORIGINALS[report["outcome"]]
        assert markdown.render(believed)
        assert text.render_verdict(believed, cached=True)


def _mutate(count, folder, report, capsys):
    generator = random.Random(count)
    outcomes = ("PASS", "FAIL", "INCONCLUSIVE")
    reports = {name: seal({**report, "outcome": name, "shipped": report["shipped"] if name == "PASS" else None}) for name in outcomes}
    for name, original in reports.items():
        outputs.write_output(folder / name, original)
        assert cli.run(["report", str(folder / name)]) == ORIGINALS[name]
    capsys.readouterr()
    for _ in range(count):
        name = generator.choice(outcomes)
        path = folder / name / generator.choice(["report.json", "manifest.json"] if name == "PASS" else ["report.json"])
        _check(folder / name, reports[name], path, mutations.mutate(path.read_bytes(), generator), capsys)
    for name, original in reports.items():
        assert package.read_previous(folder / name) == original


def test_300_mutations_of_reports_and_manifests_are_refused_or_change_nothing(tmp_path, report, capsys):
    _mutate(300, tmp_path, report, capsys)


@pytest.mark.long
def test_2000_mutations_of_reports_and_manifests_are_refused_or_change_nothing(tmp_path, report, capsys):
    _mutate(2000, tmp_path, report, capsys)
