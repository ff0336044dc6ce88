# SPDX-License-Identifier: Apache-2.0
"""The loop over the steps, on toy stages: keys, hits, records, damage, explanations."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from edgekd.build import keys, pipeline, refusals
from edgekd.domain.candidate import Candidate
from edgekd.domain.scheme import Quantize
from edgekd.errors import OutOfMemoryError, RecipeError, StageError, StorageError, UnavailableError
from edgekd.plan import Plan, left_out
from edgekd.ports import Record, StageResult, Step
from edgekd.store.cache import Cache
from edgekd.store.digests import file_digest
from tests.processes import ThisProcess


@dataclass(frozen=True, slots=True)
class Params:
    times: int = 1
    shape: tuple[int, ...] = (1, 2)
    runtime: str | None = None


class Reporter:
    def __init__(self):
        self.lines = []

    def log(self, text):
        self.lines.append(text)

    @contextmanager
    def step(self, name):
        yield lambda share, text: None


@pytest.fixture
def reporter():
    return Reporter()


@pytest.fixture
def ran():
    return []


@pytest.fixture
def recipe_dir(monkeypatch, ran, tmp_path):
    """Return the folder of a recipe with two stages: ``first`` reads data.txt (recorded), ``second`` repeats the output of ``first``."""
    recipe_dir = tmp_path / "recipe"
    recipe_dir.mkdir()
    (recipe_dir / "data.txt").write_text("a")

    def first(step, inputs, context):
        ran.append(step.id)
        text = (context.recipe_dir / "data.txt").read_text()
        (context.out / "text").write_text(text.strip())
        return StageResult(record=Record(files={"data.txt": file_digest(context.recipe_dir / "data.txt")}))

    def second(step, inputs, context):
        ran.append(step.id)
        (context.out / "text").write_text(inputs["text"].path.read_text() * int(step.params.times))
        return StageResult(metrics={"times": step.params.times})

    stages = {"first": SimpleNamespace(NAME="first", CODE=(), run=first), "second": SimpleNamespace(NAME="second", CODE=(), run=second)}
    monkeypatch.setattr(pipeline, "STAGES", stages)
    return recipe_dir


def _plan(times=2, tools=()):
    steps = (Step("first", "first", Params()), Step("second/x", "second", Params(times), {"text": "first:text"}, tools))
    return Plan(SimpleNamespace(), (), steps, {})


def _plan_with_candidates(*runtimes, requested="auto"):
    """Return a plan with a candidate for each runtime: a file that the stage ``second`` writes and ``third`` reads."""
    recipe = SimpleNamespace(overrides_for=lambda name: SimpleNamespace(quantize=Quantize(runtimes=requested)))
    steps, candidates = [Step("first", "first", Params())], []
    for name in runtimes:
        step = f"export/student/{name}"
        steps.append(Step(step, "second", Params(runtime=name), {"text": "first:text"}))
        steps.append(Step(f"evaluate/{step}", "second", Params(2, runtime=name), {"text": f"{step}:text"}))
        candidates.append(Candidate(step, name, "float32", "ptq", step, f"evaluate/{step}", (1,), {}))
    return Plan(recipe, (SimpleNamespace(name="board"),), tuple(steps), {"board": tuple(candidates)})


@pytest.fixture
def build(recipe_dir, reporter, tmp_path):
    cache = Cache(tmp_path / "cache", reporter.log)
    cache.prepare()
    return pipeline.BuildContext(cache, recipe_dir, reporter, lambda step, completed: None, ThisProcess(), ThisProcess())


def test_steps_run_in_order_and_their_files_are_stored(build, ran):
    completed = pipeline.run(_plan(), build)
    assert ran == ["first", "second/x"]
    assert completed["second/x"].entry.artifacts["text"].path.read_text() == "aa"
    assert not completed["second/x"].hit


def test_the_processor_time_of_a_step_and_its_children_is_stored(build, monkeypatch):
    def work(step, inputs, context):
        deadline = time.process_time() + 0.2
        while time.process_time() < deadline:
            pass
        subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.2: pass"], check=True)
        time.sleep(0.3)
        (context.out / "text").write_text("")
        return StageResult(metrics={"times": 1})

    monkeypatch.setattr(pipeline.STAGES["second"], "run", work)
    entry = pipeline.run(_plan(), build)["second/x"].entry
    assert entry.metrics["times"] == 1
    assert 0.35 < entry.metrics["cpu_seconds"] < entry.seconds - 0.25
    assert 0 <= entry.metrics["waited_seconds"] < entry.seconds


def test_threads_that_wait_for_a_core_are_counted():
    """Two processes share one core: each has half of it, and waits as long."""
    code = "import os, time\nos.sched_setaffinity(0, [{core}])\nwhile True: pass"
    core = min(os.sched_getaffinity(0))
    with subprocess.Popen([sys.executable, "-c", code.format(core=core)]) as other:
        before, affinity = pipeline.processor_seconds(), os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, [core])
            deadline = time.process_time() + 0.3
            while time.process_time() < deadline:
                pass
        finally:
            os.sched_setaffinity(0, affinity)
            other.kill()
    after = pipeline.processor_seconds()
    if after[1] is None:
        pytest.skip("this kernel keeps no account of waiting threads")
    assert after[1] - before[1] > 0.1


def test_a_second_run_takes_all_from_the_cache(build, ran):
    pipeline.run(_plan(), build)
    completed = pipeline.run(_plan(), build)
    assert ran == ["first", "second/x"]
    assert all(item.hit for item in completed.values())


def test_a_changed_parameter_runs_only_its_stage_and_is_explained(build, ran, reporter):
    pipeline.run(_plan(2), build)
    explanations = keys.explain(_plan(3), pipeline.STAGES, build.cache, build.recipe_dir)
    assert [(item.step.id, item.outcome, item.reason) for item in explanations][1] == ("second/x", "miss", "params.times 2 -> 3")
    pipeline.run(_plan(3), build)
    assert ran == ["first", "second/x", "second/x"]
    assert "second/x: params.times 2 -> 3" in reporter.lines


def test_a_changed_file_that_gives_the_same_bytes_runs_only_the_stage_that_read_it(build, ran):
    pipeline.run(_plan(), build)
    (build.recipe_dir / "data.txt").write_text("a\n")
    assert keys.explain(_plan(), pipeline.STAGES, build.cache, build.recipe_dir)[0].reason == "data.txt changed"
    pipeline.run(_plan(), build)
    assert ran == ["first", "second/x", "first"]


def test_a_changed_file_that_gives_other_bytes_runs_the_stages_that_follow(build, ran):
    pipeline.run(_plan(), build)
    (build.recipe_dir / "data.txt").write_text("b")
    completed = pipeline.run(_plan(), build)
    assert ran == ["first", "second/x"] * 2
    assert completed["second/x"].entry.artifacts["text"].path.read_text() == "bb"
    (build.recipe_dir / "data.txt").write_text("a")
    pipeline.run(_plan(), build)
    assert len(ran) == 4  # a hit: this content was built before


def test_explain_runs_nothing_and_names_the_steps_that_must_run_first(build, ran):
    explanations = keys.explain(_plan(), pipeline.STAGES, build.cache, build.recipe_dir)
    assert [(item.outcome, item.reason) for item in explanations] == [("miss", "never run here"), ("after", "first")]
    assert ran == []


@pytest.mark.parametrize("name", ["text", "entry.json"])
@pytest.mark.parametrize("step", ["first", "second/x"])
def test_a_flipped_byte_is_noticed_and_only_that_step_runs_again(build, ran, reporter, step, name):
    folder = pipeline.run(_plan(), build)[step].entry.artifacts["text"].path.parent
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    completed = pipeline.run(_plan(), build)
    assert ran == ["first", "second/x", step]
    assert completed["second/x"].entry.artifacts["text"].path.read_text() == "aa"
    assert any("is damaged" in text for text in reporter.lines)


def test_damage_with_unchanged_times_is_noticed_when_the_bytes_are_used(build, ran, monkeypatch):
    path = pipeline.run(_plan(), build)["first"].entry.artifacts["text"].path
    undamaged = file_digest(path)
    path.write_text("z")
    monkeypatch.setattr(type(build.cache), "digest_of", lambda self, path: undamaged)
    completed = pipeline.run(_plan(3), build)
    assert ran == ["first", "second/x", "first", "second/x"]
    assert completed["second/x"].entry.artifacts["text"].path.read_text() == "aaa"


def test_until_stops_after_a_stage(build, ran):
    assert set(pipeline.run(_plan(), build, "first")) == {"first"}
    assert ran == ["first"]


def test_a_missing_tool_is_named_with_the_extra_that_installs_it(build):
    with pytest.raises(UnavailableError, match=r"second/x needs no-such-package.*pip install 'edgekd\[build\]'"):
        pipeline.run(_plan(tools=("no-such-package",)), build)


def test_a_full_disk_is_one_clear_error_and_leaves_no_entry(build, monkeypatch):
    def full(step, inputs, context):
        (context.out / "half").write_bytes(b"x")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pipeline.STAGES["second"], "run", full)
    with pytest.raises(
        StorageError, match="second/x cannot read or write its files: No space left on device; free space or name another folder"
    ):
        pipeline.run(_plan(), build)
    assert [entry.material["stage"] for _, entry, *_ in build.cache.entries()] == ["first"]


def test_a_stage_that_fails_leaves_no_entry_and_keeps_its_partial_work(build, monkeypatch):
    def failing(step, inputs, context):
        (context.work / "checkpoint").write_bytes(b"x")
        raise StageError("second: it failed")

    monkeypatch.setattr(pipeline.STAGES["second"], "run", failing)
    with pytest.raises(StageError, match="it failed"):
        pipeline.run(_plan(), build)
    assert list((build.cache.root / "work").glob("*/checkpoint"))
    assert len(list(build.cache.entries())) == 1


def test_warnings_come_before_a_step_that_must_run(build, ran):
    calls = []

    def before_step(step, completed):
        calls.append((step.id, list(completed), list(ran)))

    pipeline.run(_plan(), dataclasses.replace(build, before_step=before_step))
    assert calls == [("first", [], []), ("second/x", ["first"], ["first"])]


@pytest.fixture
def refusing(monkeypatch, ran):
    """Let the stage ``second`` refuse all that concerns the runtimes in the set that is returned."""
    refused = set()

    def second(step, inputs, context):
        ran.append(step.id)
        (context.out / "text").write_text(inputs["text"].path.read_text())
        if step.params.runtime in refused:
            raise StageError(f"{step.id}: no such op")
        return StageResult()

    monkeypatch.setattr(pipeline.STAGES["second"], "run", second)
    return refused


def test_a_refused_candidate_is_left_out_with_the_reason_and_the_others_go_on(build, ran, reporter, refusing):
    refusing.add("litert")
    plan = _plan_with_candidates("litert", "onnxruntime")
    completed = pipeline.run(plan, build)
    assert ran == ["first", "export/student/litert", "export/student/onnxruntime", "evaluate/export/student/onnxruntime"]
    assert left_out(plan.candidates["board"], completed) == {"export/student/litert": "no such op"}
    assert "warning: export/student/litert is left out: no such op" in reporter.lines
    artifacts = completed["export/student/litert"].entry.artifacts
    assert {name: item.path.read_text() for name, item in artifacts.items()} == {"why_not.txt": "no such op\n"}


def test_a_refusal_is_cached_and_explained(build, ran, refusing):
    refusing.add("litert")
    plan = _plan_with_candidates("litert", "onnxruntime")
    pipeline.run(plan, build)
    ran.clear()
    pipeline.run(plan, build)
    assert ran == []
    outcomes = {item.step.id: item for item in keys.explain(plan, pipeline.STAGES, build.cache, build.recipe_dir)}
    assert outcomes["export/student/litert"].outcome == "hit"
    assert outcomes["evaluate/export/student/litert"].outcome == "left out"
    assert outcomes["evaluate/export/student/litert"].reason == "export/student/litert: no such op"


def test_an_error_names_all_reasons_when_no_candidate_is_left(build, refusing):
    refusing.update(("litert", "onnxruntime"))
    both = "export/student/litert: no such op; export/student/onnxruntime: no such op"
    with pytest.raises(StageError, match=f"target board: no candidate is left: {both}; change the model"):
        pipeline.run(_plan_with_candidates("litert", "onnxruntime"), build)


def test_a_runtime_that_the_recipe_names_cannot_be_left_out(build, refusing):
    refusing.add("litert")
    with pytest.raises(
        RecipeError, match="quantize.runtimes: 'litert' cannot be had: export/student/litert: no such op; change the model, "
    ):
        pipeline.run(_plan_with_candidates("litert", "onnxruntime", requested=("litert", "onnxruntime")), build)


def test_a_step_that_ran_out_of_memory_is_left_out_and_tried_again(build, ran, monkeypatch):
    refused = {"litert"}

    def second(step, inputs, context):
        ran.append(step.id)
        (context.out / "text").write_text("")
        if step.params.runtime in refused:
            raise OutOfMemoryError("there is not enough memory")
        return StageResult()

    monkeypatch.setattr(pipeline.STAGES["second"], "run", second)
    plan = _plan_with_candidates("litert", "onnxruntime")
    completed = pipeline.run(plan, build)
    assert left_out(plan.candidates["board"], completed) == {"export/student/litert": "there is not enough memory"}
    refused.clear()
    ran.clear()
    again = pipeline.run(plan, build)
    assert ran == ["export/student/litert", "evaluate/export/student/litert"]
    assert again["export/student/litert"].entry.key != completed["export/student/litert"].entry.key


def test_only_steps_of_runtimes_have_a_time_limit():
    steps = [Step("distill", "distill", Params()), Step("export/dry_run/litert", "export", Params(runtime="litert"))]
    assert [refusals.max_silence_s(step) for step in steps] == [None, 600.0]
    assert refusals.max_silence_s(Step("export/student/litert", "export", Params(runtime="litert"))) == 3600.0


def test_an_error_that_nothing_expects_is_a_failure_of_its_step(monkeypatch, tmp_path):
    monkeypatch.setitem(pipeline.STAGES, "distill", SimpleNamespace(NAME="distill", run={}.pop))
    step = Step("distill", "distill", None, {})
    with pytest.raises(
        StageError, match=r"^distill: TypeError: pop expected .* \(at build/pipeline\.py:\d+\); check what .* or report this$"
    ):
        pipeline.run_stage(step, {}, tmp_path, tmp_path, tmp_path, b"", lambda share, text: None)
