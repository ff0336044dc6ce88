# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from dataclasses import replace

from edgekd.domain.losses import Loss
from edgekd.domain.recipe import Assistant, Baselines, Teacher
from edgekd.stages import distill
from tests.distilling import CE, KL, entry, recipe


def test_the_step_names_all_that_changes_the_student():
    [step] = distill.steps(recipe(), [])
    assert (step.id, step.stage) == ("distill", "distill")
    assert step.params["losses"] == [
        {"kind": "kl", "weight": 0.9, "temperature": 2.0, "standardize": False},
        {"kind": "ce", "weight": 0.1, "label_smoothing": 0.0},
    ]
    assert json.loads(json.dumps(step.params)) == step.params
    assert {"model", "epochs", "optimizer", "learning_rate", "weight_decay", "batch_size", "seed", "threads", "instruction_set"} <= set(
        step.params
    )
    assert step.inputs == {
        "train.inputs.0": "inspect:train.inputs.0.npy",
        "train.labels": "inspect:train.labels.npy",
        "train.outputs": "soft_targets:train.outputs.safetensors",
        "validation.inputs.0": "inspect:validation.inputs.0.npy",
        "validation.labels": "inspect:validation.labels.npy",
        "validation.outputs": "soft_targets:validation.outputs.safetensors",
        "unlabelled.inputs.0": "inspect:unlabelled.inputs.0.npy",
        "unlabelled.outputs": "soft_targets:unlabelled.outputs.safetensors",
        "code": "inspect:student.code.json",
        "views.code": "inspect:views.code.json",
    }


def test_no_split_but_train_validation_and_unlabelled_is_seen():
    [step] = distill.steps(recipe(), [])
    assert not [name for name in step.inputs.values() if "evaluation" in name or "calibration" in name]


def test_twins_are_trained_alike_but_for_the_teacher_and_the_seed():
    plain, *others = distill.steps(recipe(baselines=Baselines(seeds=2), seed=7), [])
    assert [step.id for step in others] == [
        "distill/distilled/1",
        "distill/no_teacher/0",
        "distill/no_teacher/1",
        "distill/label_smoothing/0",
        "distill/label_smoothing/1",
    ]
    assert [step.params["seed"] for step in others] == [8, 7, 8, 7, 8]
    for step in others:
        same = plain.params.keys() - ({"seed"} if "distilled" in step.id else {"seed", "losses"})
        assert all(step.params[name] == plain.params[name] for name in same)
        reads_teacher = any(reference.startswith("soft_targets:") for reference in step.inputs.values())
        assert reads_teacher == ("distilled" in step.id)
    assert others[-1].params["losses"] == [{"kind": "ce", "weight": 1.0, "label_smoothing": 0.1}]


def test_a_twin_by_pseudo_labels_follows_the_student_that_was_trained_alone():
    given = recipe(baselines=Baselines(seeds=2, pseudo_labels=True), teachers=(Teacher(entry("other"), "o.safetensors"),))
    last = distill.steps(given, [])[-1]
    assert last.id == "distill/pseudo_labels/1"
    assert [loss["kind"] for loss in last.params["losses"]] == ["ce", "hard"]
    assert {reference.partition(":")[0] for name, reference in last.inputs.items() if "outputs" in name} == {"soft_targets/pseudo_labels/1"}
    assert given.soft_target_sources["soft_targets/pseudo_labels/1"].artifact == "distill/no_teacher/1:student.safetensors"
    assert not {"ensemble", "checkpoints", "teacher"} & last.params.keys()


def test_each_link_of_a_chain_is_taught_by_the_one_before():
    middle, small = (Assistant(entry(name)) for name in ("middle", "small"))
    given = recipe(assistants=(middle, replace(small, epochs=3)), teachers=(Teacher(file="o.onnx", weight=0.5),))
    first, second, last = distill.steps(given, [])
    assert [step.id for step in (first, second, last)] == ["distill/assistant/0", "distill/assistant/1", "distill"]
    assert [step.params["epochs"] for step in (first, second, last)] == [8, 3, 8]
    assert first.params["ensemble"] == {"weights": [1.0, 0.5], "weighting": "fixed"}
    assert "ensemble" not in second.params.keys() | last.params.keys()
    taught = [
        {reference.partition(":")[0] for name, reference in step.inputs.items() if "outputs" in name} for step in (first, second, last)
    ]
    assert taught == [{"soft_targets", "soft_targets/teacher/0"}, {"soft_targets/assistant/0"}, {"soft_targets/assistant/1"}]
    assert first.inputs["code"] == "inspect:assistant.0.code.json"


def test_students_of_other_sizes_differ_from_the_student_in_their_module_only():
    student, wide, deep = distill.steps(recipe(sizes=(entry("wide"), entry("deep"))), [])
    assert [student.id, wide.id, deep.id] == ["distill", "distill/size/0", "distill/size/1"]
    assert student.params == distill.steps(recipe(), [])[0].params
    assert wide.params == {**student.params, "model": "distill_user.py:wide"}
    assert deep.inputs == {**student.inputs, "code": "inspect:size.1.code.json"}


def test_all_that_is_distilled_is_in_the_precision_that_was_tried_once(monkeypatch):
    facts = distill.runner.facts()
    monkeypatch.setattr(distill.runner, "facts", lambda: {**facts, "features": ["avx512_bf16"]})
    given = recipe(
        precision="auto", sizes=(entry("wide"),), assistants=(Assistant(entry("middle")),), baselines=Baselines(seeds=2, pseudo_labels=True)
    )
    trial, *others = distill.steps(given, [])
    assert trial.id == "distill/autotune"
    assert [step.inputs["execution_mode"] for step in others] == ["distill/autotune:execution_mode.json"] * 10
    monkeypatch.setattr(distill.runner, "facts", lambda: {**facts, "features": ["avx2"]})
    assert all("execution_mode" not in step.inputs.keys() | step.params.keys() for step in distill.steps(given, []))
    asked = distill.steps(replace(given, distill=replace(given.distill, precision="bfloat16")), [])
    assert {step.params["precision"] for step in asked} == {"bfloat16"}


def test_what_is_left_open_is_searched_once_for_all_seeds_and_for_the_twins_too():
    given = recipe(losses=(Loss("kl", temperature="auto"), CE), baselines=Baselines(seeds=2, pseudo_labels=True), search_share=0.5)
    steps = distill.steps(given, [])
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
    searching = [step for step in steps if "search_share" in step.params]
    assert [step.id for step in searching] == ["distill/search", "distill/search/label_smoothing/0", "distill/search/pseudo_labels/0"]
    assert [loss for loss in searching[2].params["losses"] if "auto" in loss.values()] == [{"kind": "hard", "weight": "auto"}]
    assert {step.params["search_share"] for step in searching} == {0.5}
    assert all("optuna" in step.tools for step in searching)


def test_a_twin_of_a_student_that_learns_from_labels_only_reads_no_unlabelled_samples():
    for losses, reads in (((KL, CE), True), ((Loss("dkd"), CE), False)):
        twin = distill.steps(recipe(losses=losses, baselines=Baselines(seeds=2)), [])[-1]
        assert any(name.startswith("unlabelled") for name in twin.inputs) == reads
