# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from edgekd.errors import UsageError
from edgekd.stages import package
from edgekd.store.digests import file_digest

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


def test_an_output_is_rewritten_only_when_its_bytes_change_but_the_stamp_always(tmp_path, model):
    out = tmp_path / "out"
    _ship(out, model)
    for path in out.iterdir():
        os.utime(path, (1, 1))
    _ship(out, model)
    rewritten = {path.name for path in out.iterdir() if path.stat().st_mtime > 1}
    assert rewritten == {"edgekd.stamp"}
    model.write_bytes(b"other")
    _ship(out, model)
    assert (out / "toy.tflite").read_bytes() == b"other"


def test_withholding_removes_what_an_earlier_build_shipped(tmp_path, model):
    out = tmp_path / "out"
    _ship(out, model)
    package.withhold(out, {"schema": 1, "outcome": "FAIL", "shipped": None}, "# failed")
    assert sorted(path.name for path in out.iterdir()) == ["report.json", "report.md"]
    assert package.read_previous(out)["outcome"] == "FAIL"


def test_a_model_in_another_format_replaces_the_last_one(tmp_path, model):
    out = tmp_path / "out"
    _ship(out, model)
    _ship(out, model, "toy.onnx")
    assert not (out / "toy.tflite").exists()


@pytest.mark.parametrize("name", ["toy.tflite", "manifest.json", "report.json", "edgekd.stamp"])
def test_a_folder_that_was_changed_is_not_trusted(tmp_path, model, name):
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
    run = lambda: subprocess.run(["make", "-s"], capture_output=True, text=True, check=False)  # noqa: E731  (called several times)
    assert "built" in run().stdout  # a missing prerequisite is not an error
    (tmp_path / "gone.py").write_text("")
    os.utime(tmp_path / "gone.py", (1, 1))
    run()
    for name in names:
        assert "built" not in run().stdout
        os.utime(tmp_path / name, (2**32, 2**32))
        assert "built" in run().stdout, name
        os.utime(tmp_path / name, (1, 1))
        run()


def test_a_name_that_make_cannot_read_is_refused(tmp_path):
    with pytest.raises(UsageError, match="line break"):
        package.write_depfile(tmp_path / "d.d", [tmp_path / "stamp"], [tmp_path / "a\nb"])
    for name in ("a;b", "a|b", "a\tb", "a\\b", "a\\", "copy(1)", "a&"):
        with pytest.raises(UsageError, match="cannot be written in a depfile; rename it, or build without --depfile"):
            package.write_depfile(tmp_path / "d.d", [tmp_path / "stamp"], [tmp_path / "recipe", tmp_path / name])
    assert not (tmp_path / "d.d").exists()


AWKWARD = (
    "day=1/x=2.csv",
    "=x",
    "50%.csv",
    "copy(1).csv",
    "~root",
    "d[1].csv",
    "a*b",
    "a?b",
    "a{b,c}",
    "$(x).csv",
    "a:b",
    os.fsdecode(b"\xff.csv"),
    "'\"`",
    "a&b",
)


@pytest.mark.parametrize("name", [*AWKWARD, "all # of=it $%:"], ids=ascii)
def test_make_finds_a_file_with_an_awkward_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    for decoy in (path, tmp_path / "d1.csv", tmp_path / "aXb"):  # which a pattern would match
        decoy.write_text("")
        os.utime(decoy, (1, 1))
    (tmp_path / "out").mkdir()
    package.write_depfile(tmp_path / "d.d", [tmp_path / "out" / "edgekd.stamp"], [path, tmp_path / "gone.py"])
    (tmp_path / "Makefile").write_text("all: out/edgekd.stamp\nout/edgekd.stamp:\n\t@touch $@ && echo built\ninclude d.d\n")

    def built():
        return b"built" in subprocess.run(["make", "-s"], capture_output=True, check=True).stdout

    assert built()
    (tmp_path / "gone.py").write_text("")
    os.utime(tmp_path / "gone.py", (1, 1))
    assert not built()
    os.utime(tmp_path / "aXb", (2**32, 2**32))
    os.utime(tmp_path / "d1.csv", (2**32, 2**32))
    assert not built()
    os.utime(path, (2**32, 2**32))
    assert built()
    path.unlink()
    assert built()  # a missing file counts as changed, and is not an error


class Killed(BaseException):
    """Raised where a real process would be killed."""


@contextmanager
def _killed_after(changes, monkeypatch):
    """Allow a number of file changes, then raise Killed; yield a list that is filled if the code finished."""
    remaining, finished = [changes], []

    def limited(function):
        def change(*arguments, **options):
            if not remaining[0]:
                raise Killed
            remaining[0] -= 1
            return function(*arguments, **options)

        return change

    with monkeypatch.context() as patch:
        patch.setattr(package, "write_atomically", limited(package.write_atomically))
        patch.setattr(Path, "unlink", limited(Path.unlink))
        with suppress(Killed):
            yield finished
            finished.append(True)


def _assert_consistent(out):
    models = [path for path in out.iterdir() if path.suffix in {".onnx", ".tflite"}]
    for model in models:
        assert json.loads((out / "manifest.json").read_text())["outputs"][model.name]["sha256"] == file_digest(model)
        assert json.loads((out / "report.json").read_text())["shipped"] == model.name
    if (out / "edgekd.stamp").exists():
        assert len(models) == 1
        assert package.read_previous(out) is not None


EARLIER_BUILDS = {"nothing": None, "a pass": "toy.tflite", "another format": "toy.onnx", "a failure": ""}


@pytest.mark.parametrize("earlier", EARLIER_BUILDS)
@pytest.mark.parametrize("action", ["ship", "ship the same", "withhold"])
def test_whenever_it_is_killed_every_model_in_the_folder_is_described_by_the_manifest(tmp_path, monkeypatch, earlier, action):
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"old model")
    new.write_bytes(b"old model" if action == "ship the same" else b"new model")
    for moment in range(20):
        out = tmp_path / f"out{moment}"
        out.mkdir()
        if EARLIER_BUILDS[earlier]:
            _ship(out, old, EARLIER_BUILDS[earlier])
        elif earlier == "a failure":
            package.withhold(out, {"schema": 1, "outcome": "FAIL", "shipped": None}, "# failed")
        with _killed_after(moment, monkeypatch) as finished:
            if action == "withhold":
                package.withhold(out, {"schema": 1, "outcome": "INCONCLUSIVE", "shipped": None}, "# later")
            else:
                _ship(out, new, text="# later")
        _assert_consistent(out)
        _ship(out, new)
        assert package.read_previous(out)["shipped"] == "toy.tflite"
        if finished:
            break
    assert 3 <= moment < 19


@pytest.mark.parametrize("manifest", [{}, [], {"outputs": {}}, {"outputs": {"toy.tflite": 3}}, {"outputs": {"other": {"sha256": "x"}}}])
def test_a_manifest_that_does_not_name_the_model_is_not_trusted(tmp_path, model, manifest):
    out = tmp_path / "out"
    _ship(out, model)
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert package.read_previous(out) is None


def test_a_second_model_in_the_folder_is_not_trusted(tmp_path, model):
    out = tmp_path / "out"
    _ship(out, model)
    (out / "other.onnx").write_bytes(b"from elsewhere")
    assert package.read_previous(out) is None


def test_a_report_that_is_not_valid_json_changes_nothing(tmp_path, model):
    out = tmp_path / "out"
    _ship(out, model)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for change in (
        lambda report: package.withhold(out, report, "#"),
        lambda report: package.ship(out, model, "toy.tflite", {}, report, "#"),
    ):
        with pytest.raises(ValueError, match="JSON"):
            change({"schema": 1, "x": float("inf")})
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_reports_are_json_without_nan():
    assert json.loads(package.as_json({"a": [1, None]})) == {"a": [1, None]}
    with pytest.raises(ValueError, match="JSON"):
        package.as_json({"a": float("nan")})
