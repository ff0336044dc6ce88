# SPDX-License-Identifier: Apache-2.0
"""The code in cache keys: a change of a module that computes a stage's bytes changes the stage's keys, and no module is forgotten."""

from __future__ import annotations

import shutil

import grimp
import pytest

from edgekd import registry
from edgekd.build import judge, keys, pipeline
from edgekd.ports import Step

# imported by stages, but without effect on their bytes; each with the reason
WITHOUT_EFFECT = {
    "errors": "messages",
    "ports": "types",
    "registry": "finds runtimes, whose own code is part of the key",
    "plan": "the candidates, whose parameters are in the key",
    "store.digests": "SHA-256 and atomic writes",
    "domain.artifact": "data; values are parameters",
    "domain.budget": "limits; no cached byte depends on them",
    "domain.candidate": "data; values are parameters",
    "domain.recipe": "data; values are parameters",
    "domain.rules": "rules of the reader",
    "domain.scheme": "names; values are parameters",
    "domain.target": "data; values are parameters",
    "domain.verdict": "data of reports",
    "config.distill_rules": "checks of recipes, used by Distiller",
}
FACTS_ONLY = {"teach", "soft_targets", "distill"}  # stages that read the facts of the machine from harness.runner, as parameters


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph("edgekd", exclude_type_checking_imports=True)


# imported to judge a verdict, but without effect on it; each with the reason
WITHOUT_EFFECT_ON_VERDICTS = {
    "": "the version is in the key",
    "errors": "messages",
    "ports": "types",
    "registry": "finds runtimes and devices, whose own code is part of the key",
    "build.keys": "keys of steps, which are in the key",
    "build.refusals": "results of steps, whose keys are in the key",
    "config": "reads recipe and profile, whose values are in the key",
    "config.distill_rules": "checks of recipes",
    "config.reader": "reads values, which are in the key",
    "config.recipe": "reads values, which are in the key",
    "store.digests": "SHA-256 and atomic writes",
    "store.locks": "locks",
}


def _imported_by(graph, stage):
    """Return the modules that a stage imports, transitively, but not through those without effect."""
    ignored = WITHOUT_EFFECT.keys() | ({"harness.runner"} if stage.NAME in FACTS_ONLY else set())
    return _imports(graph, f"edgekd.stages.{stage.NAME}", ignored)


def _imports(graph, name, ignored):
    todo, modules = {name, *graph.find_descendants(name)}, set()
    while todo:
        module = todo.pop()
        if module.removeprefix("edgekd.") not in ignored:
            modules.add(module)
            todo |= graph.find_modules_directly_imported_by(module) - modules
    return {module.removeprefix("edgekd.") for module in modules}


def _is_part_of(module, code):
    return any(module == name or module.startswith(f"{name}.") for name in (path.replace("/", ".") for path in code))


@pytest.mark.parametrize("stage", pipeline.PIPELINE, ids=lambda stage: stage.NAME)
def test_all_modules_that_a_stage_imports_are_part_of_its_keys(graph, stage):
    modules = _imported_by(graph, stage)
    assert f"stages.{stage.NAME}" in modules
    assert sorted(module for module in modules if not _is_part_of(module, stage.CODE)) == []


@pytest.mark.parametrize("stage", pipeline.PIPELINE, ids=lambda stage: stage.NAME)
def test_a_stage_names_only_code_that_exists(stage):
    assert [name for name in stage.CODE if not (keys.PACKAGE / name).is_dir() and not (keys.PACKAGE / f"{name}.py").is_file()] == []


def test_all_modules_that_judge_are_part_of_the_keys_of_verdicts(graph):
    modules = _imports(graph, "edgekd.build.judge", WITHOUT_EFFECT_ON_VERDICTS) - {"edgekd"}
    assert {"build.judge", "stages.gate", "stages.select", "stats.intervals", "report.collect"} <= modules
    assert sorted(module for module in modules if not _is_part_of(module, judge.CODE)) == []
    assert [name for name in judge.CODE if not (keys.PACKAGE / name).is_dir() and not (keys.PACKAGE / f"{name}.py").is_file()] == []


class _Params:
    runtime = None


def _digests(stage, folder, monkeypatch):
    monkeypatch.setattr(keys, "PACKAGE", folder)
    keys._source_digest.cache_clear()
    return keys.code_digest(stage, Step("s", stage.NAME, _Params()))


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(keys.PACKAGE, tmp_path / "edgekd", ignore=shutil.ignore_patterns("__pycache__"))
    yield tmp_path / "edgekd"
    keys._source_digest.cache_clear()


@pytest.mark.parametrize("stage", pipeline.PIPELINE, ids=lambda stage: stage.NAME)
def test_a_change_of_any_of_these_modules_changes_the_keys(graph, stage, copied, monkeypatch):
    before = _digests(stage, copied, monkeypatch)
    assert _digests(stage, copied, monkeypatch) == before
    for module in sorted(_imported_by(graph, stage)):
        path = copied / f"{module.replace('.', '/')}.py"
        path = path if path.is_file() else copied / module.replace(".", "/") / "__init__.py"
        text = path.read_text()
        path.write_text(f"{text}\nADDED = 1\n")
        assert _digests(stage, copied, monkeypatch) != before, module
        path.write_text(text)
    (copied / "report" / "text.py").write_text("")
    assert _digests(stage, copied, monkeypatch) == before


def test_the_runtime_of_a_step_is_part_of_its_key():
    digests = set()
    for name in registry.names("runtimes"):
        params = _Params()
        params.runtime = name
        digests.add(keys.code_digest(pipeline.STAGES["export"], Step("s", "export", params)))
    assert len(digests) == len(registry.names("runtimes")) == 2
