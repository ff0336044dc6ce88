# SPDX-License-Identifier: Apache-2.0
"""Cached verdicts: what they depend on, and when they are believed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import edgekd
from edgekd.build import judge, keys, run
from edgekd.domain.budget import Budget
from edgekd.domain.device import ChosenDevice, DeviceSpec
from edgekd.errors import RecipeError, StageError
from edgekd.harness import runner
from edgekd.report.target_run import TargetRun
from edgekd.store import arrays
from tests import outputs, toy

GOLDEN = Path(__file__).parents[2] / "golden"


class Reporter:
    def __init__(self):
        self.lines = []

    def log(self, text):
        self.lines.append(text)


@pytest.fixture
def target_run(tmp_path):
    for name, text in (("edgekd.toml", toy.RECIPE), ("data.py", toy.DATA), ("models.py", toy.MODELS)):
        (tmp_path / name).write_text(text)
    plan = run.load_plan(tmp_path / "edgekd.toml", ["host"])
    folder = tmp_path / "build" / "host"
    return TargetRun(plan, plan.targets[0], {}, folder, tmp_path / "edgekd.toml", {}, inconclusive_ok=False, remeasure=False, started=0.0)


def _key(target_run):
    return judge._verdict_key(target_run, runner.facts())


def _with_recipe(target_run, **changes):
    recipe = dataclasses.replace(target_run.plan.recipe, **changes)
    return dataclasses.replace(target_run, plan=dataclasses.replace(target_run.plan, recipe=recipe))


def test_the_key_of_a_verdict_has_the_recipe_and_the_target(target_run):
    key = _key(target_run)
    assert _key(target_run) == key
    assert _key(_with_recipe(target_run, name="renamed")) != key
    assert _key(_with_recipe(target_run, budget=Budget(max_size_kib=1))) != key
    assert _key(dataclasses.replace(target_run, recipe=target_run.recipe.with_name("other.toml"))) != key
    assert _key(dataclasses.replace(target_run, target=dataclasses.replace(target_run.target, title="other"))) != key


def test_the_key_of_a_verdict_has_the_version_and_the_code_that_judges(target_run, monkeypatch, tmp_path):
    key = _key(target_run)
    monkeypatch.setattr(edgekd, "__version__", "0.0.1")
    assert _key(target_run) != key
    monkeypatch.undo()
    monkeypatch.setattr(keys, "source_digest", lambda roots: str(sorted(roots)))
    assert str(keys.PACKAGE / "stages" / "gate") in str(sorted(keys.PACKAGE / name for name in judge.CODE))
    assert _key(target_run) != key


def test_the_key_of_a_verdict_has_the_device_and_its_runtimes(target_run):
    spec, facts = DeviceSpec("ssh", "pi@bench"), {**runner.facts(), "cpu_model": "Raspberry Pi 4"}

    def key(facts, versions, spec=spec):
        run_on_device = dataclasses.replace(target_run, device=ChosenDevice(spec, facts, versions))
        return judge._verdict_key(run_on_device, facts)

    first = key(facts, {"onnxruntime": "1.32.0"})
    assert key({**facts, "load": 3.0, "temp_c": 70.0}, {"onnxruntime": "1.32.0"}) == first
    assert key(facts, {"onnxruntime": "1.32.0"}, DeviceSpec("ssh", "pi@another-name")) == first
    assert key(facts, {"onnxruntime": "1.31.0"}) != first
    assert key({**facts, "cpu_model": "Raspberry Pi 5"}, {"onnxruntime": "1.32.0"}) != first
    assert _key(target_run) != first


def test_accuracy_is_that_of_the_devices_instructions_only_if_it_has_them(target_run):
    here = runner.facts()["instruction_set"]
    assert judge._has_instructions(target_run, here)
    for instruction_set, expected in ((here, True), ("x86-64-v1", False)):
        device = ChosenDevice(DeviceSpec("ssh", "bench"), {**runner.facts(), "instruction_set": instruction_set}, {})
        assert judge._has_instructions(dataclasses.replace(target_run, device=device), here) is expected


def test_the_harness_gets_plain_arrays_of_the_samples_that_it_runs(tmp_path, monkeypatch):
    pictures = (np.random.default_rng(0).integers(0, 256, (200, 1, 8, 8)) / 255).astype(np.float32)
    (tmp_path / "out").mkdir()
    path = tmp_path / "evaluation.inputs.0.npy"
    np.save(path, pictures)
    monkeypatch.setattr(arrays, "MIN_BYTES", 0)
    arrays.compact(path)
    (written,) = judge._write_samples(SimpleNamespace(evaluation_inputs=lambda: [path]), tmp_path / "out")
    assert np.load(written, allow_pickle=False).tobytes() == pictures[: runner.MAX_SAMPLES].tobytes()


def test_what_cannot_be_measured_is_left_out_of_selection(target_run):
    first, *others = target_run.candidates
    failures = {(first.id, first.runtime): "measure: it aborts", ("teacher", first.runtime): "measure: it hangs"}
    target_run = dataclasses.replace(target_run, unmeasured=failures)
    assert target_run.left_out == {first.id: "measure: it aborts"}
    assert list(target_run.candidates) == others


def _judge_with_failures(target_run, monkeypatch, failures):
    """Judge up to the choice, with a device that cannot run some files."""
    names = {"read_scores": None, "_accuracy": None, "_measure": ([], failures)}
    for name, value in names.items():
        monkeypatch.setattr(judge, name, lambda *_, value=value: value)
    monkeypatch.setattr(judge.gate, "accuracy_outcome", lambda *_: None)
    return judge._judge(target_run, "key", None, Reporter())


def test_an_error_names_all_candidates_when_none_can_be_measured(target_run, monkeypatch):
    failures = {(item.id, item.runtime): f"measure: {item.id}: it aborts" for item in target_run.candidates}
    with pytest.raises(StageError) as caught:
        _judge_with_failures(target_run, monkeypatch, failures)
    assert "no candidate is left" in str(caught.value)
    assert all(reason in str(caught.value) for reason in failures.values())


def test_a_runtime_that_the_recipe_names_must_be_measured(target_run, monkeypatch):
    failures = {(item.id, item.runtime): "measure: it aborts" for item in target_run.candidates if item.runtime == "litert"}
    quantize = dataclasses.replace(target_run.plan.recipe.quantize, runtimes=("litert", "onnxruntime"))
    with pytest.raises(RecipeError, match="quantize.runtimes: 'litert' cannot be had"):
        _judge_with_failures(_with_recipe(target_run, quantize=quantize), monkeypatch, failures)


def _cached(target_run, key="key", why_not_here=None):
    reporter = Reporter()
    return judge._cached_verdict(target_run, key, why_not_here, reporter), reporter.lines


@pytest.fixture
def report():
    report = json.loads((GOLDEN / "report_pass.json").read_text())
    return outputs.with_changes(report, verdict_key="key")


def test_a_verdict_is_cached_while_its_key_and_its_files_are_unchanged(target_run, report):
    assert _cached(target_run) == (None, [])
    outputs.write_output(target_run.folder, report)
    assert _cached(target_run) == (report, [])
    assert _cached(target_run, "other") == (None, [])
    assert _cached(dataclasses.replace(target_run, remeasure=True)) == (None, [])


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("report.json", "report.json: is not a JSON object"),
        ("manifest.json", "manifest.json is missing, damaged or changed"),
        ("keywords.tflite", "its bytes are not those of the model that was judged"),
    ],
)
def test_a_damaged_file_is_reported_and_the_target_is_judged_again(target_run, report, name, problem):
    outputs.write_output(target_run.folder, report)
    (target_run.folder / name).write_bytes(b"\xff")
    verdict, lines = _cached(target_run)
    assert verdict is None
    assert problem in lines[0]
    assert lines[0].endswith("; this target is judged again")


def test_a_failure_that_was_edited_to_pass_is_not_believed(target_run, report):
    outputs.write_output(target_run.folder, outputs.with_changes(report, outcome="FAIL", shipped=None))
    path = target_run.folder / "report.json"
    assert _cached(target_run)[0]["outcome"] == "FAIL"
    path.write_text(path.read_text().replace('"FAIL"', '"PASS"'))
    verdict, lines = _cached(target_run)
    assert verdict is None
    assert "does not match its own digest" in lines[0]


def test_an_inconclusive_verdict_is_cached_only_if_nothing_can_be_measured_here(target_run, report):
    outputs.write_output(target_run.folder, outputs.with_changes(report, outcome="INCONCLUSIVE", shipped=None))
    assert _cached(target_run)[0] is None
    assert _cached(target_run, why_not_here="another machine")[0]["outcome"] == "INCONCLUSIVE"
    allowed = dataclasses.replace(target_run, inconclusive_ok=True)
    assert _cached(allowed, why_not_here="another machine")[0] is None
