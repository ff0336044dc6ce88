# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import subprocess

import pytest

from edgekd.digests import file_digest
from edgekd.errors import UsageError
from edgekd.stages import package

REPORT = {"schema": 1, "outcome": "PASS", "shipped": "toy.tflite"}


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(b"model")
    return path


def _ship(folder, model, name="toy.tflite", text="# toy"):
    manifest = {"outputs": {name: {"sha256": file_digest(model)}}}
    folder.mkdir(exist_ok=True)
    package.ship(folder, model, name, manifest, {**REPORT, "shipped": name}, text)


def test_a_shipped_folder_holds_what_the_manifest_says(tmp_path, model):
    out = tmp_path / "out"
    _ship(out, model)
    assert sorted(path.name for path in out.iterdir()) == ["edgekd.stamp", "manifest.json", "report.json", "report.md", "toy.tflite"]
    assert package.read_previous(out)["shipped"] == "toy.tflite"


def test_an_output_is_rewritten_only_when_its_bytes_change_and_the_stamp_moves_always(tmp_path, model):
    out = tmp_path / "out"
    _ship(out, model)
    for path in out.iterdir():
        os.utime(path, (1, 1))
    _ship(out, model)
    moved = {path.name for path in out.iterdir() if path.stat().st_mtime > 1}
    assert moved == {"edgekd.stamp"}
    model.write_bytes(b"other")
    _ship(out, model)
    assert (out / "toy.tflite").read_bytes() == b"other"


def test_withholding_takes_away_what_an_earlier_build_shipped(tmp_path, model):
    out = tmp_path / "out"
    _ship(out, model)
    package.withhold(out, {"schema": 1, "outcome": "FAIL", "shipped": None}, "# failed")
    assert sorted(path.name for path in out.iterdir()) == ["report.json", "report.md"]
    assert package.read_previous(out)["outcome"] == "FAIL"


def test_another_format_takes_the_place_of_the_last(tmp_path, model):
    out = tmp_path / "out"
    _ship(out, model)
    _ship(out, model, "toy.onnx")
    assert not (out / "toy.tflite").exists()


@pytest.mark.parametrize("name", ["toy.tflite", "manifest.json", "report.json", "edgekd.stamp"])
def test_a_folder_that_was_touched_is_not_believed(tmp_path, model, name):
    out = tmp_path / "out"
    _ship(out, model)
    (out / name).unlink()
    assert package.read_previous(out) is None
    _ship(out, model)
    if name.endswith(("tflite", "json")):
        (out / name).write_bytes(b"\xff{")
        assert package.read_previous(out) is None


@pytest.mark.parametrize("what", ["a file", "below a file"])
def test_an_output_that_cannot_be_written_is_one_clear_error(tmp_path, what):
    (tmp_path / "file").write_bytes(b"")
    folder = tmp_path / "file" if what == "a file" else tmp_path / "file" / "below"
    with pytest.raises(UsageError, match="cannot be written: .*--out"):
        package.check_writable(folder)


def test_a_depfile_is_what_make_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["data.py", "with space.py", "dollar$.csv", "hash#.txt"]
    for name in names:
        (tmp_path / name).write_text("")
    (tmp_path / "out").mkdir()
    package.write_depfile(tmp_path / "d.d", [tmp_path / "out" / "edgekd.stamp"], [tmp_path / name for name in [*names, "gone.py"]])
    (tmp_path / "Makefile").write_text("all: out/edgekd.stamp\nout/edgekd.stamp:\n\t@touch $@ && echo built\ninclude d.d\n")
    run = lambda: subprocess.run(["make", "-s"], capture_output=True, text=True, check=False)  # noqa: E731  (once more and once more)
    assert "built" in run().stdout  # a prerequisite that is gone is no error
    (tmp_path / "gone.py").write_text("")
    os.utime(tmp_path / "gone.py", (1, 1))
    run()
    for name in names:
        assert "built" not in run().stdout
        os.utime(tmp_path / name, (2**32, 2**32))
        assert "built" in run().stdout, name
        os.utime(tmp_path / name, (1, 1))
        run()


def test_a_name_that_make_cannot_hold_is_refused(tmp_path):
    with pytest.raises(UsageError, match="line break"):
        package.write_depfile(tmp_path / "d.d", [tmp_path / "stamp"], [tmp_path / "a\nb"])


def test_reports_are_json_without_nan():
    assert json.loads(package.as_json({"a": [1, None]})) == {"a": [1, None]}
    with pytest.raises(ValueError, match="JSON"):
        package.as_json({"a": float("nan")})
