# SPDX-License-Identifier: Apache-2.0
"""Whole builds of examples/digits with the command line, one after the other in one folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from edgekd.estimate import features
from edgekd.store.cache import Cache
from edgekd.store.digests import file_digest
from tests.pipeline.files import cached_files

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "edgekd" / "report" / "report.schema.json").read_text())
SHIPPED = {"edgekd.stamp", "manifest.json", "report.json", "report.md"}


class Project:
    """A copy of the example with its own cache, built once."""

    def __init__(self, folder):
        self.folder, self.cache = folder / "digits", folder / "cache"
        self.locks = folder / "locks"
        self.locks.mkdir()
        shutil.copytree(ROOT / "examples" / "digits", self.folder, ignore=shutil.ignore_patterns("build", "__pycache__"))
        recipe = self.folder / "edgekd.toml"
        text = recipe.read_text()
        for section in ("[teacher.train]", "[distill]"):  # the steps are counted: no dry run of bfloat16, whatever the CPU
            text = text.replace(section, f'{section}\nprecision = "float32"')
        recipe.write_text(text.replace("epochs = 30", "epochs = 6").replace("epochs = 10", "epochs = 3").replace("= 6.0 #", "= 15.0 #"))
        self.text = recipe.read_text()
        profile = (ROOT / "targets" / "host.toml").read_text()
        assert "min_seconds = 2" in profile
        (self.folder / "host.toml").write_text(profile.replace("min_seconds = 2", "min_seconds = 0"))  # enough runs for a p99, and quick

    def run(self, *arguments, prefix=("-m", "edgekd")):
        environment = {**os.environ, "EDGEKD_CACHE": str(self.cache), "EDGEKD_LOCK_DIR": str(self.locks)}
        return subprocess.run(
            [sys.executable, *prefix, *arguments], cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )

    def build(self, *arguments):
        names = ["host.toml" if argument == "host" else argument for argument in arguments]
        return self.run("build", "--depfile", "build/model.d", *names)

    def recipe(self, old, new):
        assert old in self.text
        (self.folder / "edgekd.toml").write_text(self.text.replace(old, new))

    def out(self, target="host"):
        return self.folder / "build" / target

    def report(self, target="host"):
        report = json.loads((self.out(target) / "report.json").read_text())
        jsonschema.validate(report, SCHEMA)
        return report


def _steps(process):
    """Return the steps that a build ran."""
    return [line.partition(":")[0] for line in process.stderr.splitlines() if ": done in" in line]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("build"))
    project.first_build = project.build("--target", "host", "--target", "rpi4")
    return project


@pytest.fixture(autouse=True)
def _restore_files(project):
    for name in ("data.py", "models.py"):
        shutil.copyfile(ROOT / "examples" / "digits" / name, project.folder / name)
    (project.folder / "edgekd.toml").write_text(project.text)


def test_a_build_for_two_targets_shares_the_stages_and_ends_in_two_verdicts(project):
    assert project.first_build.returncode == 4, project.first_build.stderr
    steps = _steps(project.first_build)
    plan = json.loads(project.run("plan", "--json", "--target", "host.toml", "--target", "rpi4").stdout)
    assert sorted(steps) == sorted(row["step"] for row in plan["steps"])  # each once
    assert "Traceback" not in project.first_build.stderr
    assert project.first_build.stdout.startswith("digits on host: PASS\n")
    assert "digits on rpi4: INCONCLUSIVE" in project.first_build.stdout


def test_a_build_with_nothing_to_do_imports_nothing_heavy_and_runs_nothing(project):
    assert project.build("--target", "host", "--target", "rpi4").returncode == 4
    program = (
        "import sys; from edgekd import cli; code = cli.run(sys.argv[1:]);"
        "print(code, sorted({'torch', 'numpy', 'scipy', 'onnx', 'onnxruntime', 'ai_edge_litert', 'rich'} & set(sys.modules)))"
    )
    process = project.run("build", "--target", "host.toml", "--target", "rpi4", prefix=("-c", program))
    assert process.stdout.splitlines()[-1] == "4 []"
    assert process.stdout.count("; cached verdict of ") == 2
    assert process.stderr == ""


def test_the_report_is_complete_and_the_folder_is_what_the_manifest_says(project):
    project.build("--target", "host")
    report = project.report()
    assert report["outcome"] == "PASS"
    assert {path.name for path in project.out().iterdir()} == SHIPPED | {report["shipped"]}
    manifest = json.loads((project.out() / "manifest.json").read_text())
    assert manifest["outputs"][report["shipped"]]["sha256"] == file_digest(project.out() / report["shipped"])
    assert manifest["inputs"]["data.py"] == file_digest(project.folder / "data.py")
    assert [row["stage"] for row in report["accuracy_drop_by_stage"]][:2] == ["distill", "export"]
    assert len(report["candidates"]) == 6
    assert all((row["why_not"] is None) == (row["id"] == report["choice"]["id"]) for row in report["candidates"])
    assert report["choice"]["speedup"]["interval"][0] <= report["choice"]["speedup"]["x"]
    text = (project.out() / "report.md").read_text()
    assert text.startswith("# digits on host: PASS\n")
    assert "| distill |" in text


def test_a_target_that_cannot_be_measured_ships_only_if_that_is_allowed(project):
    assert project.build("--target", "rpi4").returncode == 4
    assert {path.name for path in project.out("rpi4").iterdir()} == {"report.json", "report.md"}
    assert project.build("--target", "rpi4", "--inconclusive-ok").returncode == 0
    report = project.report("rpi4")
    assert report["inconclusive_ok"]
    assert json.loads((project.out("rpi4") / "manifest.json").read_text())["inconclusive-ok"] is True
    assert (project.out("rpi4") / report["shipped"]).is_file()


def test_a_target_that_cannot_be_measured_has_estimates_which_fail_a_budget_but_pass_none(project):
    process = project.build("--target", "rpi4")
    assert process.returncode == 4
    assert "  latency estimate: about " in process.stdout
    report = project.report("rpi4")
    assert len(report["candidates"]) == 6
    for row in report["candidates"]:
        assert row["no_estimate"] is None
        assert [(item["threads"], item["tier"], item["level"]) for item in row["estimates"]] == [(1, "fitted", 0.8), (4, "fitted", 0.8)]
        assert all(
            item["band"][0] < item["ms"] < item["band"][1] and "published rows of" in item["provenance"] for item in row["estimates"]
        )
    check = next(item for item in report["checks"] if item["name"] == "max_latency_p95_ms")
    assert (check["outcome"], check["tier"], check["interval"]) == ("INCONCLUSIVE", "fitted", report["choice"]["estimates"][0]["band"])
    project.recipe("max_latency_p95_ms = 5.0", "max_latency_p95_ms = 0.000001")
    process = project.build("--target", "rpi4", "--inconclusive-ok")
    assert (process.returncode, _steps(process)) == (1, [])
    assert "80 % band is above the budget 1e-06 ms" in process.stdout
    (project.folder / "edgekd.toml").write_text(project.text)
    assert all(not row["estimates"] for row in project.report()["candidates"])  # of host, which was measured


def test_both_exporters_write_files_of_the_same_macs(project):
    by_format = {"model.onnx": set(), "model.tflite": set()}
    for _, entry, *_ in Cache(project.cache, print).entries():
        if entry is not None and entry.material["stage"] == "export":
            for name in by_format.keys() & entry.artifacts.keys():
                by_format[name].add(sum(features.read_features(entry.artifacts[name].path).macs.values()))
    assert by_format["model.onnx"] == by_format["model.tflite"]
    assert len(by_format["model.onnx"]) >= 2  # student and teacher, and those of other tests


def test_a_missed_budget_trains_nothing_fails_and_removes_the_model(project):
    assert project.build("--target", "host").returncode == 0
    project.recipe("max_size_kib = 64", "max_size_kib = 1")
    process = project.build("--target", "host")
    assert (process.returncode, _steps(process)) == (1, [])
    assert "max_size_kib: size " in process.stdout
    assert {path.name for path in project.out().iterdir()} == {"report.json", "report.md"}
    assert project.report()["shipped"] is None
    again = project.build("--target", "host")
    assert again.returncode == 1
    assert "; cached verdict of " in again.stdout
    (project.folder / "edgekd.toml").write_text(project.text)
    assert project.build("--target", "host").returncode == 0


def test_a_changed_calibration_set_runs_only_the_steps_that_read_it(project):
    project.build("--target", "host")
    data = project.folder / "data.py"
    text = data.read_text()
    data.write_text(text.replace("200", "150"))
    assert text != data.read_text()
    steps = _steps(project.build("--target", "host"))
    assert {step.split("/")[0] for step in steps} == {"inspect", "quantize", "evaluate"}
    # the dry run of a dynamic scheme reads samples to run on
    assert all("static" in step or step.startswith("quantize/dry_run/") for step in steps if step != "inspect")


def test_a_line_in_the_code_of_the_student_runs_the_steps_that_read_it(project):
    project.build("--target", "host")
    models = project.folder / "models.py"
    models.write_text(models.read_text() + "\n# a comment\n")
    explanation = project.run("plan", "--explain", "--target", "host.toml").stdout
    assert "inspect" in explanation
    assert "models.py changed" in explanation
    stages = {step.split("/")[0] for step in _steps(project.build("--target", "host"))}
    assert stages == {
        "inspect",
        "teach",
        "soft_targets",
        "distill",
        "export",
        "evaluate",
    }  # teacher and student are in one file; quantize reads equal bytes


def test_a_comment_in_the_data_code_runs_only_inspect(project):
    project.build("--target", "host")
    data = project.folder / "data.py"
    data.write_text(data.read_text() + "\n# a comment\n")
    assert _steps(project.build("--target", "host")) == ["inspect"]


def test_a_flipped_byte_in_each_kind_of_file_is_repaired(project):
    assert project.build("--target", "host").returncode == 0
    cache = Cache(project.cache, lambda _: None)
    expected = cached_files(cache)
    used = {row["step"]: row["key"] for row in project.report()["steps"]}
    entries = {key[:12]: entry for key, entry, *_ in cache.entries()}
    for step in ("inspect", "distill", "quantize/litert/static_wi8_ai8/ptq", "evaluate/teacher"):
        entry = entries[used[step]]
        path = max(entry.artifacts.values(), key=lambda item: item.size_bytes).path
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
        process = project.build("--target", "host")
        assert process.returncode == 0, process.stderr
        assert "is damaged and was removed" in process.stderr
        assert len(_steps(process)) == 1
    assert cached_files(cache) == expected
    (project.out() / project.report()["shipped"]).write_bytes(b"not the model")
    assert project.build("--target", "host").returncode == 0
    # the candidates are measured again, so another one may be the fastest
    assert file_digest(project.out() / project.report()["shipped"]) in {item for files in expected.values() for item in files.values()}


def test_until_writes_the_output_of_a_stage(project):
    process = project.build("--target", "host", "--until", "distill")
    assert process.returncode == 4
    names = {path.name for path in (project.folder / "build" / "until-distill").iterdir()}
    assert names == {"student.safetensors", "curve.json", "manifest.json"}
    assert project.build("--target", "host", "--until", "distill", "--inconclusive-ok").returncode == 0


def test_only_json_is_printed_to_stdout(project):
    process = project.build("--target", "host", "--json")
    (report,) = json.loads(process.stdout)
    jsonschema.validate(report, SCHEMA)


def test_report_shows_the_verdict_of_an_earlier_build(project):
    project.build("--target", "host")
    assert project.run("report", "build/host").returncode == 0
    assert project.run("report", "build/host", "--format", "markdown").stdout == (project.out() / "report.md").read_text()
    assert json.loads(project.run("report", "build/host", "--format", "json").stdout)["outcome"] == "PASS"
    gone = project.run("report", "build/nowhere")
    assert gone.returncode == 2
    assert "expected the folder of a target" in gone.stderr


def test_measure_works_on_model_files_alone(project):
    project.build("--target", "host")
    model = project.out() / project.report()["shipped"]
    process = project.run("measure", str(model), "--json")
    (row,) = json.loads(process.stdout)
    assert row["p50"]["ms"] > 0
    assert row["runs"] >= 300
    assert "p95 ms" in project.run("measure", str(model)).stdout
    assert project.run("measure", "data.py").returncode == 2


def test_an_output_folder_that_cannot_be_written_is_reported_before_any_step(project):
    (project.folder / "taken").write_text("")
    process = project.run("build", "--target", "host", "--out", "taken")
    assert (process.returncode, _steps(process)) == (2, [])
    assert process.stderr == "edgekd: taken/host: cannot be written: Not a directory; name another output with --out\n"


@pytest.mark.parametrize(
    "arguments", [["--target", "nope"], ["--recipe", "none.toml"], ["--until", "train"], ["--target", "host", "--target", "host"]]
)
def test_usage_mistakes_end_with_two_and_no_traceback(project, arguments):
    process = project.run("build", *arguments)
    assert process.returncode == 2
    assert "Traceback" not in process.stderr


def test_the_depfile_names_the_files_that_the_build_read(project):
    project.build("--target", "host")
    rule = (project.folder / "build" / "model.d").read_text().splitlines()[0]
    target, _, names = rule.partition(": ")
    assert target == "build/host/edgekd.stamp"
    assert {"edgekd.toml", "data.py", "models.py"} <= set(names.split())


def test_the_recipe_that_init_writes_builds_and_passes(project):
    assert project.run("init", "new").returncode == 0
    process = project.run("build", "--recipe", "new/edgekd.toml", "--target", "host.toml")
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.startswith("shapes on host: PASS\n")


def test_baselines_show_whether_distillation_helped(project):
    project.recipe("[distill]", "[distill]\nbaselines = { seeds = 2 }")
    process = project.build("--target", "host")
    assert process.returncode == 0, process.stderr
    steps = _steps(process)
    assert {step for step in steps if step.startswith("distill")} == {
        "distill/distilled/1",
        "distill/no_teacher/0",
        "distill/no_teacher/1",
        "distill/label_smoothing/0",
        "distill/label_smoothing/1",
    }  # the student that ships is not trained again
    verdict = project.report()["distillation"]
    assert [row["method"] for row in verdict["methods"]] == ["distilled", "no_teacher", "label_smoothing"]
    assert [row["losses"] for row in verdict["methods"]] == ["0.9 kl (temperature 4) + 0.1 ce", "ce", "ce (label_smoothing 0.1)"]
    assert all(len(row["accuracies"]) == 2 and row["ece"] > 0 for row in verdict["methods"])
    assert f"distillation {verdict['outcome']}: " in process.stdout
    assert "## Did distillation help?" in (project.out() / "report.md").read_text()
