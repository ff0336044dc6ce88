# SPDX-License-Identifier: Apache-2.0
"""Whole builds of examples/digits by the command line, one after the other in one folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from edgekd.store.cache import Cache
from edgekd.store.digests import file_digest
from tests.pipeline.files import cached_files

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "edgekd" / "report" / "report.schema.json").read_text())
SHIPPED = {"edgekd.stamp", "manifest.json", "report.json", "report.md"}


class Site:
    """A copy of the example with a cache of its own, built once."""

    def __init__(self, folder):
        self.folder, self.cache = folder / "digits", folder / "cache"
        self.locks = folder / "locks"
        self.locks.mkdir()
        shutil.copytree(ROOT / "examples" / "digits", self.folder, ignore=shutil.ignore_patterns("build", "__pycache__"))
        recipe = self.folder / "edgekd.toml"
        text = recipe.read_text()
        for section in ("[teacher.train]", "[distill]"):  # the steps are counted: no trial of bfloat16, whatever the processor
            text = text.replace(section, f'{section}\nprecision = "float32"')
        recipe.write_text(text.replace("epochs = 30", "epochs = 6").replace("epochs = 10", "epochs = 3").replace("= 6.0 #", "= 15.0 #"))
        self.text = recipe.read_text()
        profile = (ROOT / "targets" / "host.toml").read_text()
        assert "min_seconds = 2" in profile
        (self.folder / "host.toml").write_text(profile.replace("min_seconds = 2", "min_seconds = 0"))  # enough for a p99, and quick

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
        found = json.loads((self.out(target) / "report.json").read_text())
        jsonschema.validate(found, SCHEMA)
        return found


def _ran(done):
    return [line.partition(":")[0] for line in done.stderr.splitlines() if ": done in" in line]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    made = Site(tmp_path_factory.mktemp("build"))
    made.first = made.build("--target", "host", "--target", "rpi4")
    return made


@pytest.fixture(autouse=True)
def _all_as_it_was(site):
    for name in ("data.py", "models.py"):
        shutil.copyfile(ROOT / "examples" / "digits" / name, site.folder / name)
    (site.folder / "edgekd.toml").write_text(site.text)


def test_a_build_for_two_targets_shares_the_stages_and_ends_in_two_verdicts(site):
    assert site.first.returncode == 4, site.first.stderr
    ran = _ran(site.first)
    assert len(ran) == len(set(ran)) == 24
    assert "Traceback" not in site.first.stderr
    assert site.first.stdout.startswith("digits on host: PASS\n")
    assert "digits on rpi4: INCONCLUSIVE" in site.first.stdout


def test_a_build_with_nothing_to_do_imports_nothing_heavy_and_runs_nothing(site):
    assert site.build("--target", "host", "--target", "rpi4").returncode == 4
    program = (
        "import sys; from edgekd import cli; code = cli.run(sys.argv[1:]);"
        "print(code, sorted({'torch', 'numpy', 'scipy', 'onnx', 'onnxruntime', 'ai_edge_litert', 'rich'} & set(sys.modules)))"
    )
    done = site.run("build", "--target", "host.toml", "--target", "rpi4", prefix=("-c", program))
    assert done.stdout.splitlines()[-1] == "4 []"
    assert done.stdout.count(" stands\n") == 2
    assert done.stderr == ""


def test_the_report_tells_all_and_the_folder_holds_what_the_manifest_says(site):
    site.build("--target", "host")
    told = site.report()
    assert told["outcome"] == "PASS"
    assert {path.name for path in site.out().iterdir()} == SHIPPED | {told["shipped"]}
    manifest = json.loads((site.out() / "manifest.json").read_text())
    assert manifest["outputs"][told["shipped"]]["sha256"] == file_digest(site.out() / told["shipped"])
    assert manifest["inputs"]["data.py"] == file_digest(site.folder / "data.py")
    assert [row["stage"] for row in told["charges"]][:2] == ["distill", "export"]
    assert len(told["candidates"]) == 6
    assert all((row["why_not"] is None) == (row["id"] == told["choice"]["id"]) for row in told["candidates"])
    assert told["choice"]["speedup"]["interval"][0] <= told["choice"]["speedup"]["x"]
    text = (site.out() / "report.md").read_text()
    assert text.startswith("# digits on host: PASS\n")
    assert "| distill |" in text


def test_a_target_that_is_not_here_ships_only_when_that_is_allowed(site):
    assert site.build("--target", "rpi4").returncode == 4
    assert {path.name for path in site.out("rpi4").iterdir()} == {"report.json", "report.md"}
    assert site.build("--target", "rpi4", "--inconclusive-ok").returncode == 0
    told = site.report("rpi4")
    assert told["inconclusive_ok"]
    assert json.loads((site.out("rpi4") / "manifest.json").read_text())["inconclusive-ok"] is True
    assert (site.out("rpi4") / told["shipped"]).is_file()


def test_a_missed_budget_trains_nothing_fails_and_takes_the_model_away(site):
    assert site.build("--target", "host").returncode == 0
    site.recipe("max_size_kib = 64", "max_size_kib = 1")
    done = site.build("--target", "host")
    assert (done.returncode, _ran(done)) == (1, [])
    assert "max_size_kib: size " in done.stdout
    assert {path.name for path in site.out().iterdir()} == {"report.json", "report.md"}
    assert site.report()["shipped"] is None
    again = site.build("--target", "host")
    assert again.returncode == 1
    assert " stands\n" in again.stdout
    (site.folder / "edgekd.toml").write_text(site.text)
    assert site.build("--target", "host").returncode == 0


def test_a_changed_calibration_set_runs_only_what_reads_it(site):
    site.build("--target", "host")
    data = site.folder / "data.py"
    text = data.read_text()
    data.write_text(text.replace("200", "150"))
    assert text != data.read_text()
    ran = _ran(site.build("--target", "host"))
    assert {step.split("/")[0] for step in ran} == {"inspect", "quantize", "evaluate"}
    assert all("static" in step for step in ran if step != "inspect")


def test_a_line_in_the_students_code_runs_what_reads_it(site):
    site.build("--target", "host")
    models = site.folder / "models.py"
    models.write_text(models.read_text() + "\n# a remark\n")
    told = site.run("plan", "--explain", "--target", "host.toml").stdout
    assert "inspect" in told
    assert "models.py changed" in told
    ran = {step.split("/")[0] for step in _ran(site.build("--target", "host"))}
    assert ran == {
        "inspect",
        "teach",
        "soft_targets",
        "distill",
        "export",
        "evaluate",
    }  # teacher and student share the file; quantize read equal bytes


def test_a_comment_in_the_data_code_runs_only_inspect(site):
    site.build("--target", "host")
    data = site.folder / "data.py"
    data.write_text(data.read_text() + "\n# a remark\n")
    assert _ran(site.build("--target", "host")) == ["inspect"]


def test_a_flipped_byte_in_each_kind_of_file_is_mended(site):
    assert site.build("--target", "host").returncode == 0
    cache = Cache(site.cache, lambda _: None)
    wanted = cached_files(cache)
    used = {row["step"]: row["key"] for row in site.report()["steps"]}
    entries = {key[:12]: entry for key, entry, *_ in cache.entries()}
    for step in ("inspect", "distill", "quantize/litert/static_wi8_ai8/ptq", "evaluate/teacher"):
        entry = entries[used[step]]
        path = max(entry.artifacts.values(), key=lambda item: item.size_bytes).path
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
        done = site.build("--target", "host")
        assert done.returncode == 0, done.stderr
        assert "is damaged and was removed" in done.stderr
        assert len(_ran(done)) == 1
    assert cached_files(cache) == wanted
    (site.out() / site.report()["shipped"]).write_bytes(b"not the model")
    assert site.build("--target", "host").returncode == 0
    # which candidate is the fastest is measured anew, so it may be another one
    assert file_digest(site.out() / site.report()["shipped"]) in {item for files in wanted.values() for item in files.values()}


def test_until_writes_what_a_stage_made(site):
    done = site.build("--target", "host", "--until", "distill")
    assert done.returncode == 4
    assert {path.name for path in (site.folder / "build" / "until-distill").iterdir()} == {"student.safetensors", "curve.json"}
    assert site.build("--target", "host", "--until", "distill", "--inconclusive-ok").returncode == 0


def test_json_is_all_that_stands_on_stdout(site):
    done = site.build("--target", "host", "--json")
    (told,) = json.loads(done.stdout)
    jsonschema.validate(told, SCHEMA)


def test_report_tells_the_verdict_again(site):
    site.build("--target", "host")
    assert site.run("report", "build/host").returncode == 0
    assert site.run("report", "build/host", "--format", "markdown").stdout == (site.out() / "report.md").read_text()
    assert json.loads(site.run("report", "build/host", "--format", "json").stdout)["outcome"] == "PASS"
    gone = site.run("report", "build/nowhere")
    assert gone.returncode == 2
    assert "expected the folder of a target" in gone.stderr


def test_measure_works_on_model_files_alone(site):
    site.build("--target", "host")
    model = site.out() / site.report()["shipped"]
    done = site.run("measure", str(model), "--json")
    (row,) = json.loads(done.stdout)
    assert row["p50"]["ms"] > 0
    assert row["runs"] >= 300
    assert "p95 ms" in site.run("measure", str(model)).stdout
    assert site.run("measure", "data.py").returncode == 2


def test_an_output_folder_that_cannot_be_written_is_told_before_any_work(site):
    (site.folder / "taken").write_text("")
    done = site.run("build", "--target", "host", "--out", "taken")
    assert (done.returncode, _ran(done)) == (2, [])
    assert done.stderr == "edgekd: taken/host: cannot be written: Not a directory; name another output with --out\n"


@pytest.mark.parametrize(
    "arguments", [["--target", "nope"], ["--recipe", "none.toml"], ["--until", "train"], ["--target", "host", "--target", "host"]]
)
def test_usage_mistakes_end_with_two_and_no_traceback(site, arguments):
    done = site.run("build", *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_the_depfile_names_what_the_build_read(site):
    site.build("--target", "host")
    rule = (site.folder / "build" / "model.d").read_text().splitlines()[0]
    target, _, names = rule.partition(": ")
    assert target == "build/host/edgekd.stamp"
    assert {"edgekd.toml", "data.py", "models.py"} <= set(names.split())


def test_what_init_writes_builds_and_passes(site):
    assert site.run("init", "new").returncode == 0
    done = site.run("build", "--recipe", "new/edgekd.toml", "--target", "host.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("shapes on host: PASS\n")


def test_twins_say_whether_distillation_helped(site):
    site.recipe("[distill]", "[distill]\nbaselines = { seeds = 2 }")
    done = site.build("--target", "host")
    assert done.returncode == 0, done.stderr
    ran = _ran(done)
    assert {step for step in ran if step.startswith("distill")} == {
        "distill/distilled/1",
        "distill/no_teacher/0",
        "distill/no_teacher/1",
        "distill/label_smoothing/0",
        "distill/label_smoothing/1",
    }  # the student that ships is not trained again
    found = site.report()["distillation"]
    assert [row["arm"] for row in found["arms"]] == ["distilled", "no_teacher", "label_smoothing"]
    assert all(len(row["accuracies"]) == 2 and row["ece"] > 0 for row in found["arms"])
    assert f"distillation {found['outcome']}: " in done.stdout
    assert "## Did distillation help?" in (site.out() / "report.md").read_text()
