# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from edgekd.domain.artifact import Artifact
from edgekd.errors import UsageError
from edgekd.report import document
from edgekd.stages import package
from edgekd.store.digests import file_digest
from edgekd.store.documents import seal
from tests import outputs

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="module")
def report():
    return json.loads((GOLDEN / "report_pass.json").read_text())


def test_a_shipped_folder_holds_what_the_manifest_says(tmp_path, report):
    out = tmp_path / "out"
    outputs.ship(out, report)
    assert sorted(path.name for path in out.iterdir()) == ["edgekd.stamp", "manifest.json", "report.json", "report.md", "toy.tflite"]
    assert package.read_previous(out)["shipped"] == "toy.tflite"


def test_an_output_is_rewritten_only_when_its_bytes_change_but_the_stamp_always(tmp_path, report):
    out = tmp_path / "out"
    outputs.ship(out, report)
    for path in out.iterdir():
        os.utime(path, (1, 1))
    outputs.ship(out, report)
    rewritten = {path.name for path in out.iterdir() if path.stat().st_mtime > 1}
    assert rewritten == {"edgekd.stamp"}
    outputs.ship(out, report, b"other")
    assert (out / "toy.tflite").read_bytes() == b"other"


def test_withholding_removes_what_an_earlier_build_shipped(tmp_path, report):
    out = tmp_path / "out"
    outputs.ship(out, report)
    outputs.withhold(out, report)
    assert sorted(path.name for path in out.iterdir()) == ["report.json", "report.md"]
    assert package.read_previous(out)["outcome"] == "FAIL"


def test_a_model_in_another_format_replaces_the_last_one(tmp_path, report):
    out = tmp_path / "out"
    outputs.ship(out, report)
    outputs.ship(out, report, name="toy.onnx")
    assert not (out / "toy.tflite").exists()


@pytest.mark.parametrize("action", [outputs.ship, outputs.withhold])
@pytest.mark.parametrize("manifest", ["sound", "damaged", "missing", "edited"])
def test_files_of_others_are_never_removed(tmp_path, report, action, manifest):
    out = tmp_path / "out"
    outputs.ship(out, report)
    for name in ("mine.onnx", "mine.tflite", "notes.txt", ".toy.tflite.x", ".mine.onnx.12"):
        (out / name).write_bytes(b"mine")
    path = out / "manifest.json"
    if manifest == "damaged":
        path.write_bytes(path.read_bytes()[:-9])
    elif manifest == "missing":
        path.unlink()
    elif manifest == "edited":
        path.write_text(path.read_text().replace("toy.tflite", "mine.onnx"))
    package.remove_leftovers(out)
    action(out, report)
    assert {(out / name).read_bytes() for name in ("mine.onnx", "mine.tflite", "notes.txt", ".toy.tflite.x", ".mine.onnx.12")} == {b"mine"}
    assert package.read_previous(out) is not None  # a file of others is no reason to build again


def test_temporary_files_of_killed_builds_are_removed(tmp_path, report):
    out = tmp_path / "out"
    outputs.ship(out, report)
    before = sorted(out.iterdir())
    for name in (".report.json.123", ".manifest.json.4", ".toy.tflite.99", ".edgekd.stamp.1", ".report.md.7"):
        (out / name).write_bytes(b"half")
    package.remove_leftovers(out)
    assert sorted(out.iterdir()) == before


@pytest.mark.parametrize("name", ["toy.tflite", "manifest.json", "report.json", "edgekd.stamp"])
def test_a_folder_that_was_changed_is_not_trusted(tmp_path, report, name):
    out = tmp_path / "out"
    outputs.ship(out, report)
    (out / name).unlink()
    assert package.read_previous(out) is None
    outputs.ship(out, report)
    if name.endswith(("tflite", "json")):
        (out / name).write_bytes(b"\xff{")
        assert package.read_previous(out) is None


def test_a_cached_verdict_restores_the_summary(tmp_path, report):
    out = tmp_path / "out"
    outputs.ship(out, report)
    summary = (out / "report.md").read_text()
    (out / "report.md").write_text(summary.replace("PASS", "FAIL"))
    package.confirm(out, summary)
    assert (out / "report.md").read_text() == summary


def test_why_a_report_is_not_trusted_is_reported(tmp_path, report):
    out = tmp_path / "out"
    outputs.withhold(out, report)
    path, lines = out / "report.json", []
    path.write_text(path.read_text().replace('"FAIL"', '"PASS"'))
    assert package.read_previous(out, lines.append) is None
    (line,) = lines
    assert line == (
        f"warning: {path}: was changed after it was written: its content does not match its own digest; this target is judged again"
    )


def test_the_files_of_a_stage_replace_those_of_the_last_build_and_no_others(tmp_path):
    def artifact(name):
        path = tmp_path / name
        path.write_bytes(name.encode())
        return Artifact(path, file_digest(path), len(name))

    out = tmp_path / "until-export"
    recipe = {"recipe": "toy", "recipe_file": {"name": "edgekd.toml", "folder": ""}}
    package.copy_stage(out, {"litert/model.tflite": artifact("a"), "onnx/model.onnx": artifact("b")}, recipe)
    (out / "litert" / "mine").write_bytes(b"mine")
    package.copy_stage(out, {"litert/model.tflite": artifact("c")}, recipe)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == [
        "litert/mine",
        "litert/model.tflite",
        "manifest.json",
    ]
    assert (out / "litert" / "model.tflite").read_bytes() == b"c"


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
    with suppress(UsageError):
        shipped = document.read(out)["shipped"]
        assert [path.name for path in models] == ([shipped] if shipped else [])


EARLIER_BUILDS = {"nothing": None, "a pass": "toy.tflite", "another format": "toy.onnx", "a failure": ""}


@pytest.mark.parametrize("earlier", EARLIER_BUILDS)
@pytest.mark.parametrize("action", ["ship", "ship the same", "withhold"])
def test_whenever_it_is_killed_every_model_in_the_folder_is_described_by_the_manifest(tmp_path, monkeypatch, report, earlier, action):
    old, new = b"old model", b"old model" if action == "ship the same" else b"new model"
    later = {**report, "verdict_key": "later"}
    for moment in range(20):
        out = tmp_path / f"out{moment}"
        if EARLIER_BUILDS[earlier]:
            outputs.ship(out, report, old, EARLIER_BUILDS[earlier])
        elif earlier == "a failure":
            outputs.withhold(out, report)
        out.mkdir(exist_ok=True)
        with _killed_after(moment, monkeypatch) as finished:
            if action == "withhold":
                outputs.withhold(out, later, "INCONCLUSIVE")
            else:
                outputs.ship(out, later, new)
        _assert_consistent(out)
        outputs.ship(out, later, new)
        assert package.read_previous(out)["shipped"] == "toy.tflite"
        if finished:
            break
    assert 3 <= moment < 19


@pytest.mark.parametrize("manifest", [{}, [], {"outputs": {}}, {"outputs": {"toy.tflite": 3}}, {"outputs": {"other": {"sha256": "x"}}}])
def test_a_manifest_that_does_not_name_the_model_is_not_trusted(tmp_path, report, manifest):
    out = tmp_path / "out"
    outputs.ship(out, report)
    for content in (manifest, manifest and seal(manifest)):
        (out / "manifest.json").write_text(json.dumps(content))
        assert package.read_previous(out) is None


def test_a_report_that_is_not_valid_json_changes_nothing(tmp_path, report):
    out = tmp_path / "out"
    outputs.ship(out, report)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for change in (
        lambda report: package.withhold(out, report, "#"),
        lambda report: package.ship(out, out / "toy.tflite", "toy.tflite", {}, report, "#"),
    ):
        with pytest.raises(ValueError, match="JSON"):
            change({"schema": 1, "x": float("inf")})
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
