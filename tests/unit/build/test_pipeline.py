# SPDX-License-Identifier: Apache-2.0
"""The loop over the steps, on toy stages: keys, hits, records, damage, explanations."""

from __future__ import annotations

import dataclasses
import errno
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from edgekd.build import keys, pipeline
from edgekd.errors import StageError, StorageError, UnavailableError
from edgekd.plan import Plan
from edgekd.ports import Record, StageResult, Step
from edgekd.store.cache import Cache
from edgekd.store.digests import file_digest


@dataclass(frozen=True, slots=True)
class Params:
    times: int = 1
    shape: tuple[int, ...] = (1, 2)


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


@pytest.fixture
def build(recipe_dir, reporter, tmp_path):
    cache = Cache(tmp_path / "cache", reporter.log)
    cache.prepare()
    return pipeline.BuildContext(cache, recipe_dir, reporter, lambda step, completed: None)


def test_steps_run_in_order_and_their_files_are_stored(build, ran):
    completed = pipeline.run(_plan(), build)
    assert ran == ["first", "second/x"]
    assert completed["second/x"].entry.artifacts["text"].path.read_text() == "aa"
    assert not completed["second/x"].hit


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
    with pytest.raises(StorageError, match="second/x cannot write: No space left on device; free space or name another folder"):
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
