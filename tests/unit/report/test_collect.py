# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from types import SimpleNamespace

from edgekd.domain.recipe import Budget, Quantize, TargetOverrides
from edgekd.report import collect


def _warned(limit, samples, groups):
    metrics = {"splits": {"evaluation": {"samples": samples}}, "groups": groups}
    recipe = SimpleNamespace(overrides_for=lambda _: TargetOverrides(Budget(max_accuracy_drop_pp=limit), Quantize()))
    plan = SimpleNamespace(targets=(SimpleNamespace(name="board"),), recipe=recipe)
    return collect.provable_warnings(plan, {"inspect": SimpleNamespace(entry=SimpleNamespace(metrics=metrics))})


def test_a_budget_that_the_evaluation_set_can_prove_is_not_warned_of():
    assert _warned(2.5, 450, 450) == []
    assert _warned(None, 10, 10) == []


def test_a_budget_below_what_is_usually_proved_may_end_inconclusive():
    (line,) = _warned(1.5, 450, 450)
    assert line.startswith("board: 450 evaluation samples prove a drop of 2.07 pp")
    assert line.endswith("the budget max_accuracy_drop_pp = 1.5 may well end INCONCLUSIVE")


def test_a_budget_below_what_can_be_proved_cannot_pass():
    (line,) = _warned(0.5, 450, 450)
    assert line.endswith("cannot pass, whatever the student")


def test_few_speakers_prove_less_than_their_samples_and_only_the_samples_say_what_cannot_be():
    (line,) = _warned(5.0, 720, 6)
    assert line.startswith("board: 720 evaluation samples in 6 groups prove a drop of 17.89 pp")
    assert line.endswith("may well end INCONCLUSIVE")
    assert _warned(0.1, 720, 6)[0].endswith("cannot pass, whatever the student")


def _capacity(trained, validation, teacher, augment=None):
    metrics = {"distill": {"train_accuracy": trained, "validation_accuracy": validation}, "soft_targets": {"validation_accuracy": teacher}}
    done = {name: SimpleNamespace(entry=SimpleNamespace(metrics=found)) for name, found in metrics.items()}
    recipe = SimpleNamespace(distill=SimpleNamespace(augment=augment), sizes={})
    return collect._capacity(SimpleNamespace(done=done, plan=SimpleNamespace(recipe=recipe)))


def test_a_student_that_does_no_better_on_what_it_was_trained_on_lacks_capacity():
    assert _capacity(0.80, 0.80, 0.92).startswith("the student's capacity is the limit: 12.0 pp behind its teacher")


def test_a_student_that_overfits_or_is_near_its_teacher_does_not():
    assert _capacity(0.99, 0.80, 0.92) is None
    assert _capacity(0.91, 0.91, 0.92) is None
    assert _capacity(None, None, 0.92) is None
    assert _capacity(0.80, 0.80, None) is None
    assert _capacity(0.80, 0.80, 0.92, augment="data.py:augment") is None


def _sizes(teacher, found, limit=None):
    """Return the remark on students of other sizes: ``found`` maps names to (parameters, accuracy), the student's own first."""
    steps = {"distill" if number == 0 else f"distill/size/{number - 1}": name for number, name in enumerate(found)}
    metrics = {step: {"validation_accuracy": found[name][1]} for step, name in steps.items()}
    counts = {name: count for name, (count, _) in found.items()}
    metrics |= {
        "soft_targets": {"validation_accuracy": teacher},
        "inspect": {"student": {"parameters": counts["student"]}, "sizes": counts},
    }
    done = {name: SimpleNamespace(entry=SimpleNamespace(metrics=metric)) for name, metric in metrics.items()}
    budget = TargetOverrides(Budget(max_accuracy_drop_pp=limit), Quantize())
    recipe = SimpleNamespace(
        student=SimpleNamespace(model="student"),
        sizes={name: model for name, model in steps.items() if "/" in name},
        overrides_for=lambda _: budget,
    )
    return collect._sizes(SimpleNamespace(done=done, plan=SimpleNamespace(recipe=recipe), target=SimpleNamespace(name="board")))


def test_the_smallest_size_that_is_near_enough_is_named():
    found = {"student": (1000, 0.80), "huge": (9000, 0.919), "wide": (4000, 0.90)}
    told = _sizes(0.92, found)
    assert told.startswith(
        "sizes, on validation, where the teacher has 92.00 %: student (1,000 parameters) 80.00 %, wide (4,000 parameters)"
    )
    assert told.endswith("; the smallest within 3 pp is wide")
    assert _sizes(0.92, found, limit=1.0).endswith("; the smallest within 1 pp is huge")
    assert _sizes(0.95, found, limit=1.0).endswith("; none is within 1 pp: try larger ones")
    assert _sizes(0.92, {"student": (1000, 0.80)}) is None
    assert _sizes(None, found) is None


def test_twins_and_what_teaches_them_tell_nothing_again():
    stages = {
        "soft_targets": "soft_targets",
        "soft_targets/pseudo_labels/0": "soft_targets",
        "distill/search": "distill",
        "distill/search/label_smoothing/0": "distill",
        "distill": "distill",
        "distill/distilled/1": "distill",
        "distill/no_teacher/0": "distill",
        "distill/pseudo_labels/0": "distill",
        "export/teacher/litert": "export",
        "export/student/litert": "export",
    }
    metrics = {"train_accuracy": None, "validation_accuracy": None}
    done = {
        name: SimpleNamespace(step=SimpleNamespace(stage=stage), entry=SimpleNamespace(notes=(f"of {name}",), metrics=metrics))
        for name, stage in stages.items()
    }
    arms = {
        "distilled": ("distill", "distill/distilled/1"),
        "no_teacher": ("distill/no_teacher/0",),
        "pseudo_labels": ("distill/pseudo_labels/0",),
    }
    recipe = SimpleNamespace(arms=arms, sizes={}, distill=SimpleNamespace(augment=None, break_even_inferences=None))
    case = SimpleNamespace(done=done, plan=SimpleNamespace(recipe=recipe, targets=()))
    told = collect._notes(case, [], {"break_even_inferences": None})
    expected = ["soft_targets", "distill/search", "distill/search/label_smoothing/0", "distill", "export/teacher/litert"]
    assert told == [f"of {name}" for name in expected]
