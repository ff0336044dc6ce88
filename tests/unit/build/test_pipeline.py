# SPDX-License-Identifier: Apache-2.0
"""The step loop on toy stages: keys, hits, records, damage, explanations."""

from __future__ import annotations

import errno
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from edgekd.build import keys, pipeline
from edgekd.store.cache import Cache
from edgekd.store.digests import file_digest
from edgekd.errors import StageError, StorageError, UnavailableError
from edgekd.plan import Plan
from edgekd.ports import Record, StageResult, Step


class Reporter:
    def __init__(self):
        self.said = []

    def log(self, text):
        self.said.append(text)

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
def stages(monkeypatch, ran, tmp_path):
    """Two stages: ``first`` reads data.txt (recorded), ``second`` doubles what ``first`` wrote."""
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
        (context.out / "text").write_text(inputs["text"].path.read_text() * int(step.params["times"]))
        return StageResult(metrics={"times": step.params["times"]})

    known = {"first": SimpleNamespace(NAME="first", CODE=(), run=first), "second": SimpleNamespace(NAME="second", CODE=(), run=second)}
    monkeypatch.setattr(pipeline, "STAGES", known)
    return recipe_dir


def _plan(times=2, tools=()):
    steps = (Step("first", "first", {}), Step("second/x", "second", {"times": times, "shape": (1, 2)}, {"text": "first:text"}, tools))
    return Plan(SimpleNamespace(), (), steps, {})


@pytest.fixture
def site(stages, reporter, tmp_path):
    cache = Cache(tmp_path / "cache", reporter.say)
    cache.prepare()
    return pipeline.BuildContext(cache, stages, reporter, lambda step, done: None)


def test_steps_run_in_order_and_their_files_are_kept(site, ran):
    done = pipeline.run(_plan(), site, None)
    assert ran == ["first", "second/x"]
    assert done["second/x"].entry.artifacts["text"].path.read_text() == "aa"
    assert not done["second/x"].hit


def test_a_second_run_takes_all_from_the_cache(site, ran):
    pipeline.run(_plan(), site, None)
    done = pipeline.run(_plan(), site, None)
    assert ran == ["first", "second/x"]
    assert all(item.hit for item in done.values())


def test_a_changed_parameter_runs_only_its_stage_and_is_explained(site, ran, reporter):
    pipeline.run(_plan(2), site, None)
    explained = keys.explain(_plan(3), pipeline.STAGES, site.cache, site.recipe_dir)
    assert [(item.step.id, item.outcome, item.reason) for item in explained][1] == ("second/x", "miss", "params.times 2 -> 3")
    pipeline.run(_plan(3), site, None)
    assert ran == ["first", "second/x", "second/x"]
    assert "second/x: params.times 2 -> 3" in reporter.said


def test_a_changed_file_that_gives_the_same_bytes_runs_only_what_read_it(site, ran):
    pipeline.run(_plan(), site, None)
    (site.recipe_dir / "data.txt").write_text("a\n")
    assert keys.explain(_plan(), pipeline.STAGES, site.cache, site.recipe_dir)[0].reason == "data.txt changed"
    pipeline.run(_plan(), site, None)
    assert ran == ["first", "second/x", "first"]


def test_a_changed_file_that_gives_other_bytes_runs_what_follows(site, ran):
    pipeline.run(_plan(), site, None)
    (site.recipe_dir / "data.txt").write_text("b")
    done = pipeline.run(_plan(), site, None)
    assert ran == ["first", "second/x"] * 2
    assert done["second/x"].entry.artifacts["text"].path.read_text() == "bb"
    (site.recipe_dir / "data.txt").write_text("a")
    pipeline.run(_plan(), site, None)
    assert len(ran) == 4  # going back is a hit


def test_explain_runs_nothing_and_names_what_must_come_first(site, ran):
    explained = keys.explain(_plan(), pipeline.STAGES, site.cache, site.recipe_dir)
    assert [(item.outcome, item.reason) for item in explained] == [("miss", "never run here"), ("after", "first")]
    assert ran == []


@pytest.mark.parametrize("name", ["text", "entry.json"])
@pytest.mark.parametrize("step", ["first", "second/x"])
def test_a_flipped_byte_is_noticed_and_only_that_step_runs_again(site, ran, reporter, step, name):
    folder = pipeline.run(_plan(), site, None)[step].entry.artifacts["text"].path.parent
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    done = pipeline.run(_plan(), site, None)
    assert ran == ["first", "second/x", step]
    assert done["second/x"].entry.artifacts["text"].path.read_text() == "aa"
    assert any("is damaged" in text for text in reporter.said)


def test_damage_that_the_times_do_not_show_is_noticed_when_the_bytes_are_used(site, ran, monkeypatch):
    path = pipeline.run(_plan(), site, None)["first"].entry.artifacts["text"].path
    right = file_digest(path)
    path.write_text("z")
    monkeypatch.setattr(type(site.cache), "digest_of", lambda self, path: right)
    done = pipeline.run(_plan(3), site, None)
    assert ran == ["first", "second/x", "first", "second/x"]
    assert done["second/x"].entry.artifacts["text"].path.read_text() == "aaa"


def test_until_stops_after_a_stage(site, ran):
    assert set(pipeline.run(_plan(), site, "first")) == {"first"}
    assert ran == ["first"]


def test_a_missing_tool_is_named_with_the_extra_that_brings_it(site):
    with pytest.raises(UnavailableError, match=r"second/x needs no-such-package.*pip install 'edgekd\[build\]'"):
        pipeline.run(_plan(tools=("no-such-package",)), site, None)


def test_a_full_disk_is_one_clear_error_and_leaves_no_entry(site, monkeypatch):
    def full(step, inputs, context):
        (context.out / "half").write_bytes(b"x")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pipeline.STAGES["second"], "run", full)
    with pytest.raises(StorageError, match="second/x cannot write: No space left on device; free space or name another folder"):
        pipeline.run(_plan(), site, None)
    assert [entry.material["stage"] for _, entry, *_ in site.cache.entries()] == ["first"]


def test_a_stage_that_fails_leaves_no_entry_and_keeps_its_partial_work(site, monkeypatch):
    def failing(step, inputs, context):
        (context.work / "checkpoint").write_bytes(b"x")
        raise StageError("second: it failed")

    monkeypatch.setattr(pipeline.STAGES["second"], "run", failing)
    with pytest.raises(StageError, match="it failed"):
        pipeline.run(_plan(), site, None)
    assert list((site.cache.root / "work").glob("*/checkpoint"))
    assert len(list(site.cache.entries())) == 1


def test_warnings_come_before_a_step_that_must_run(site, ran):
    seen = []
    pipeline.run(
        _plan(),
        pipeline.BuildContext(site.cache, site.recipe_dir, site.reporter, lambda step, done: seen.append((step.id, list(done), list(ran)))),
        None,
    )
    assert seen == [("first", [], []), ("second/x", ["first"], ["first"])]
