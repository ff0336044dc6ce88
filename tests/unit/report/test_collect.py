# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from types import SimpleNamespace

from edgekd.domain.budget import Budget
from edgekd.domain.recipe import TargetOverrides
from edgekd.domain.scheme import Quantize
from edgekd.report import collect


def test_a_metric_that_is_undefined_without_some_samples_is_noted():
    def note(*undefined):
        metrics = {f"evaluate/{number}": {"accuracy": 0.5, "undefined": count, "parts": 100} for number, count in enumerate(undefined)}
        completed = {name: SimpleNamespace(entry=SimpleNamespace(metrics=metric)) for name, metric in metrics.items()}
        return collect._undefined_note(SimpleNamespace(completed=completed))

    assert note(0, 0) is note() is None
    assert note(0, 2, 1).startswith("the metric is undefined without 2 of 100 parts of the evaluation set")


def _capacity_note(train, validation, teacher, augment=None):
    metrics = {"distill": {"train_accuracy": train, "validation_accuracy": validation}, "soft_targets": {"validation_accuracy": teacher}}
    completed = {name: SimpleNamespace(entry=SimpleNamespace(metrics=metric)) for name, metric in metrics.items()}
    recipe = SimpleNamespace(distill=SimpleNamespace(augment=augment), sizes={})
    return collect._capacity_note(SimpleNamespace(completed=completed, plan=SimpleNamespace(recipe=recipe)))


def test_a_student_that_does_not_overfit_and_is_below_its_teacher_lacks_capacity():
    assert _capacity_note(0.80, 0.80, 0.92).startswith(
        "the student's capacity is the limit: its validation accuracy is 12.0 pp below the teacher's"
    )


def test_a_student_that_overfits_or_is_near_its_teacher_does_not_lack_capacity():
    assert _capacity_note(0.99, 0.80, 0.92) is None
    assert _capacity_note(0.91, 0.91, 0.92) is None
    assert _capacity_note(None, None, 0.92) is None
    assert _capacity_note(0.80, 0.80, None) is None
    assert _capacity_note(0.80, 0.80, 0.92, augment="data.py:augment") is None


def _sizes_note(teacher, students, limit=None):
    """Return the note on students of other sizes: ``students`` maps names to (parameters, accuracy), the student's own first."""
    steps = {"distill" if number == 0 else f"distill/size/{number - 1}": name for number, name in enumerate(students)}
    metrics = {step: {"validation_accuracy": students[name][1]} for step, name in steps.items()}
    counts = {name: count for name, (count, _) in students.items()}
    metrics |= {
        "soft_targets": {"validation_accuracy": teacher},
        "inspect": {"student": {"parameters": counts["student"]}, "sizes": counts},
    }
    completed = {name: SimpleNamespace(entry=SimpleNamespace(metrics=metric)) for name, metric in metrics.items()}
    budget = TargetOverrides(Budget(max_accuracy_drop_pp=limit), Quantize())
    recipe = SimpleNamespace(
        student=SimpleNamespace(model="student"),
        sizes={name: model for name, model in steps.items() if "/" in name},
        overrides_for=lambda _: budget,
    )
    return collect._sizes_note(
        SimpleNamespace(completed=completed, plan=SimpleNamespace(recipe=recipe), target=SimpleNamespace(name="board"))
    )


def test_the_smallest_size_that_is_close_enough_is_named():
    students = {"student": (1000, 0.80), "huge": (9000, 0.919), "wide": (4000, 0.90)}
    note = _sizes_note(0.92, students)
    assert note.startswith(
        "sizes, on validation, where the teacher has 92.00 %: student (1,000 parameters) 80.00 %, wide (4,000 parameters)"
    )
    assert note.endswith("; the smallest within 3 pp is wide")
    assert _sizes_note(0.92, students, limit=1.0).endswith("; the smallest within 1 pp is huge")
    assert _sizes_note(0.95, students, limit=1.0).endswith("; none is within 1 pp: try larger ones")
    assert _sizes_note(0.92, {"student": (1000, 0.80)}) is None
    assert _sizes_note(None, students) is None


def test_the_notes_of_baselines_and_their_soft_targets_are_not_repeated():
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
    completed = {
        name: SimpleNamespace(
            step=SimpleNamespace(stage=stage, params=SimpleNamespace(runtime="litert")),
            entry=SimpleNamespace(notes=(f"of {name}",), metrics=metrics),
            why_not="no such op" if name == "export/teacher/litert" else None,
        )
        for name, stage in stages.items()
    }
    methods = {
        "distilled": ("distill", "distill/distilled/1"),
        "no_teacher": ("distill/no_teacher/0",),
        "pseudo_labels": ("distill/pseudo_labels/0",),
    }
    recipe = SimpleNamespace(methods=methods, sizes={}, distill=SimpleNamespace(augment=None, break_even_inferences=None))
    target_run = SimpleNamespace(completed=completed, plan=SimpleNamespace(recipe=recipe, targets=()), unmeasured={})
    notes = collect._notes(target_run, [], {"break_even_inferences": None, "parts": []})
    expected = ["soft_targets", "distill/search", "distill/search/label_smoothing/0", "distill"]
    assert notes[:-1] == [f"of {name}" for name in expected]
    assert notes[-1] == "the teacher has no litert model, so the speed-up against it is unknown there: no such op"
