# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from dataclasses import asdict, replace

from edgekd.domain.losses import Loss
from edgekd.domain.recipe import Assistant, Baselines, Teacher
from edgekd.kd.data import Ensemble
from edgekd.kd.training.jobs import SearchParams, TrainingSettings
from edgekd.kd.training.search import SearchResult, Trial, TrialResult
from edgekd.stages import distill
from tests.distilling import CE, KL, entry, recipe


def test_the_step_names_all_that_changes_the_student():
    [step] = distill.steps(recipe(), [])
    assert (step.id, step.stage) == ("distill", "distill")
    assert step.params.losses == (
        Loss("kl", 0.9, temperature=2.0, standardize=False),
        Loss("ce", 0.1, label_smoothing=0.0),
    )
    assert step.params.settings == TrainingSettings(8, 16, "adamw", 0.02, 0.01, 0, 1)
    json.dumps(asdict(step.params), allow_nan=False)
    assert step.inputs == {
        "train.inputs.0": "inspect:train.inputs.0.npy",
        "train.labels": "inspect:train.labels.npy",
        "train.soft_targets": "soft_targets:train.soft_targets.safetensors",
        "validation.inputs.0": "inspect:validation.inputs.0.npy",
        "validation.labels": "inspect:validation.labels.npy",
        "validation.soft_targets": "soft_targets:validation.soft_targets.safetensors",
        "unlabelled.inputs.0": "inspect:unlabelled.inputs.0.npy",
        "unlabelled.soft_targets": "soft_targets:unlabelled.soft_targets.safetensors",
        "code": "inspect:student.code.json",
        "views.code": "inspect:views.code.json",
    }


def test_no_split_but_train_validation_and_unlabelled_is_seen():
    [step] = distill.steps(recipe(), [])
    assert not [name for name in step.inputs.values() if "evaluation" in name or "calibration" in name]


def test_baselines_are_trained_alike_but_for_the_teacher_and_the_seed():
    plain, *others = distill.steps(recipe(baselines=Baselines(seeds=2), seed=7), [])
    assert [step.id for step in others] == [
        "distill/distilled/1",
        "distill/no_teacher/0",
        "distill/no_teacher/1",
        "distill/label_smoothing/0",
        "distill/label_smoothing/1",
    ]
    assert [step.params.settings.seed for step in others] == [8, 7, 8, 7, 8]
    for step in others:
        losses = step.params.losses if "distilled" not in step.id else plain.params.losses
        settings = replace(plain.params.settings, seed=step.params.settings.seed)
        assert step.params == replace(plain.params, losses=losses, settings=settings)
        reads_teacher = any(reference.startswith("soft_targets:") for reference in step.inputs.values())
        assert reads_teacher == ("distilled" in step.id)
    assert others[-1].params.losses == (Loss("ce", label_smoothing=0.1),)


def test_the_baseline_by_pseudo_labels_follows_the_student_without_a_teacher():
    changed = recipe(baselines=Baselines(seeds=2, pseudo_labels=True), teachers=(Teacher(entry("other"), "o.safetensors"),))
    last = distill.steps(changed, [])[-1]
    assert last.id == "distill/pseudo_labels/1"
    assert [loss.kind for loss in last.params.losses] == ["ce", "hard"]
    assert {reference.partition(":")[0] for name, reference in last.inputs.items() if "soft_targets" in name} == {
        "soft_targets/pseudo_labels/1"
    }
    assert changed.soft_target_sources["soft_targets/pseudo_labels/1"].artifact == "distill/no_teacher/1:student.safetensors"
    assert (last.params.ensemble, last.params.checkpoints, last.params.teacher) == (None, 0, None)


def test_each_link_of_a_chain_learns_from_the_one_before():
    middle, small = (Assistant(entry(name)) for name in ("middle", "small"))
    changed = recipe(assistants=(middle, replace(small, epochs=3)), teachers=(Teacher(file="o.onnx", weight=0.5),))
    first, second, last = distill.steps(changed, [])
    assert [step.id for step in (first, second, last)] == ["distill/assistant/0", "distill/assistant/1", "distill"]
    assert [step.params.settings.epochs for step in (first, second, last)] == [8, 3, 8]
    assert first.params.ensemble == Ensemble((1.0, 0.5), "fixed")
    assert second.params.ensemble is last.params.ensemble is None
    sources = [
        {reference.partition(":")[0] for name, reference in step.inputs.items() if "soft_targets" in name} for step in (first, second, last)
    ]
    assert sources == [{"soft_targets", "soft_targets/teacher/0"}, {"soft_targets/assistant/0"}, {"soft_targets/assistant/1"}]
    assert first.inputs["code"] == "inspect:assistant.0.code.json"


def test_students_of_other_sizes_differ_from_the_student_in_their_module_only():
    student, wide, deep = distill.steps(recipe(sizes=(entry("wide"), entry("deep"))), [])
    assert [student.id, wide.id, deep.id] == ["distill", "distill/size/0", "distill/size/1"]
    assert student.params == distill.steps(recipe(), [])[0].params
    assert wide.params == replace(student.params, model="distill_user.py:wide")
    assert deep.inputs == {**student.inputs, "code": "inspect:size.1.code.json"}


def test_all_students_are_trained_in_the_mode_that_autotune_chose_once(monkeypatch):
    facts = distill.runner.facts()
    monkeypatch.setattr(distill.runner, "facts", lambda: {**facts, "features": ["avx512_bf16"]})
    changed = recipe(
        precision="auto", sizes=(entry("wide"),), assistants=(Assistant(entry("middle")),), baselines=Baselines(seeds=2, pseudo_labels=True)
    )
    autotune, *others = distill.steps(changed, [])
    assert autotune.id == "distill/autotune"
    assert [step.inputs["execution_mode"] for step in others] == ["distill/autotune:execution_mode.json"] * 10
    monkeypatch.setattr(distill.runner, "facts", lambda: {**facts, "features": ["avx2"]})
    assert all("execution_mode" not in step.inputs for step in distill.steps(changed, []))
    requested = distill.steps(replace(changed, distill=replace(changed.distill, precision="bfloat16")), [])
    assert {step.params.settings.mode.precision for step in requested} == {"bfloat16"}


def test_what_is_auto_is_searched_once_for_all_seeds_and_for_the_baselines_too():
    changed = recipe(losses=(Loss("kl", temperature="auto"), CE), baselines=Baselines(seeds=2, pseudo_labels=True), search_share=0.5)
    steps = distill.steps(changed, [])
    assert [step.id for step in steps] == [
        "distill/search",
        "distill",
        "distill/distilled/1",
        "distill/no_teacher/0",
        "distill/no_teacher/1",
        "distill/search/label_smoothing/0",
        "distill/label_smoothing/0",
        "distill/label_smoothing/1",
        "distill/search/pseudo_labels/0",
        "distill/pseudo_labels/0",
        "distill/pseudo_labels/1",
    ]
    assert {step.id: step.inputs["chosen"] for step in steps if "chosen" in step.inputs} == {
        "distill": "distill/search:chosen.json",
        "distill/distilled/1": "distill/search:chosen.json",
        "distill/label_smoothing/0": "distill/search/label_smoothing/0:chosen.json",
        "distill/label_smoothing/1": "distill/search/label_smoothing/0:chosen.json",
        "distill/pseudo_labels/0": "distill/search/pseudo_labels/0:chosen.json",
        "distill/pseudo_labels/1": "distill/search/pseudo_labels/0:chosen.json",
    }
    assert {step.id: step.inputs["trained"] for step in steps if "trained" in step.inputs} == {
        "distill": "distill/search:trained.safetensors"
    }
    searching = [step for step in steps if isinstance(step.params, SearchParams)]
    assert [step.id for step in searching] == ["distill/search", "distill/search/label_smoothing/0", "distill/search/pseudo_labels/0"]
    assert [loss for loss in searching[2].params.student.losses if loss.has_auto] == [Loss("hard", "auto")]
    assert {step.params.share for step in searching} == {0.5}
    assert [step.params.labels_only for step in searching] == [True, False, False]


def _result(choices, scores, epochs=20):
    return TrialResult(Trial(choices, epochs), scores)


def test_notes_say_what_a_search_chose_by_how_much_and_how_sure_that_is():
    params = SearchParams(distill.steps(recipe(losses=(Loss("kl", temperature="auto"), CE)), [])[-1].params, 3.0, labels_only=True)
    params = replace(params, student=replace(params.student, losses=(Loss("kl", temperature="auto"), CE)))
    labels, kl = _result({"label_smoothing": 0.1}, (1.0,) * 100), _result({"0.temperature": 2.0}, (1.0,) * 90 + (0.0,) * 10)
    first = _result({"0.temperature": 2.0}, kl.scores, epochs=6)
    assert distill._search_notes("distill/search", params, SearchResult([first, kl, labels], [labels], [kl], is_weak=True), 46) == [
        "distill/search: 2 settings were tried in trials of 6 and 20 epochs (46 in all); chosen: labels only, label smoothing 0.1",
        "distill/search: second best: temperature of kl = 2.0, by 10.00 points [5.52, 17.44] on validation",
        'distill/search: labels alone are as good as the teacher: nothing is distilled (distill.ships = "distilled" distills)',
        "warning: distill/search: the choice is weak: not all settings were tried; raise distill.search_share or distill.epochs",
    ]
    only = distill._search_notes(
        "distill/search", params, SearchResult([_result({}, (1.0,))], [_result({}, (1.0,))], [], is_weak=False), 20
    )
    assert only == ["distill/search: 1 settings were tried in trials of 20 epochs (20 in all); chosen: the losses of the recipe"]


def test_a_student_without_a_teacher_is_tried_where_something_is_searched_or_the_recipe_asks():
    searched, fixed = (Loss("kl", temperature="auto"), CE), (KL, CE)
    for losses, ships, expected in (
        (searched, None, [True]),
        (searched, "best", [True]),
        (searched, "distilled", [False]),
        (fixed, None, []),
        (fixed, "best", [True]),
        (fixed, "distilled", []),
        ((Loss("ce", label_smoothing="auto"),), None, [False]),
    ):
        steps = distill.steps(recipe(losses=losses, ships=ships), [])
        assert [step.params.labels_only for step in steps if isinstance(step.params, SearchParams)] == expected


def test_a_baseline_of_a_student_that_learns_from_labels_only_reads_no_unlabelled_samples():
    for losses, reads in (((KL, CE), True), ((Loss("dkd"), CE), False)):
        baseline = distill.steps(recipe(losses=losses, baselines=Baselines(seeds=2)), [])[-1]
        assert any(name.startswith("unlabelled") for name in baseline.inputs) == reads
