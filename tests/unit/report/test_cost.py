# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from edgekd.report import cost

STEPS = {  # seconds, samples, bytes
    "inspect": ("inspect", 9.0, 0, 900),
    "teach": ("teach", 8.0, 800, 80),
    "soft_targets": ("soft_targets", 4.0, 400, 40),
    "soft_targets/pseudo_labels/0": ("soft_targets", 0.5, 50, 5),
    "distill/search": ("distill", 2.0, 20, 2),
    "distill/search/label_smoothing/0": ("distill", 0.25, 30, 3),
    "distill": ("distill", 1.0, 100, 10),
    "distill/autotune": ("distill", 0.125, 0, 1),
    "distill/size/0": ("distill", 3.0, 300, 30),
    "distill/distilled/1": ("distill", 16.0, 1600, 160),
    "distill/no_teacher/0": ("distill", 32.0, 3200, 320),
    "evaluate/distill/no_teacher/0": ("evaluate", 64.0, 0, 640),
}


def _target_run(limit=None):
    completed = {}
    for name, (stage, seconds, samples, size) in STEPS.items():
        entry = SimpleNamespace(
            seconds=seconds,
            metrics={"cpu_seconds": 1.5 * seconds, "waited_seconds": seconds / 4, **({"samples": samples} if samples else {})},
            artifacts={"file": SimpleNamespace(size_bytes=size)},
        )
        completed[name] = SimpleNamespace(step=SimpleNamespace(stage=stage), entry=entry)
    recipe = SimpleNamespace(distill=SimpleNamespace(break_even_inferences=limit))
    return SimpleNamespace(completed=completed, plan=SimpleNamespace(recipe=recipe))


def _measurement(subject, ns):
    return SimpleNamespace(subject=subject, runtime="litert", threads=1, samples_ns=lambda: np.full(9, ns))


def test_each_step_counts_in_its_part_of_the_cost():
    costs = cost.training_cost(_target_run(), None, [])
    rows = {row["part"]: (row["seconds"], row["samples"], row["bytes"]) for row in costs["parts"]}
    assert rows == {
        "teach": (8.0, 800, 80),
        "soft_targets": (4.0, 400, 40),
        "search": (2.0, 20, 2),
        "distill": (1.125, 100, 11),
        "sizes": (3.0, 300, 30),
        "baselines": (48.75, 4880, 488),
    }
    assert costs["break_even_inferences"] is None
    assert [(row["cpu_seconds"], row["waited_seconds"]) for row in costs["parts"][:3]] == [(12.0, 2.0), (6.0, 1.0), (3.0, 0.5)]


def test_processor_time_is_unknown_where_that_of_one_step_is():
    target_run = _target_run()
    del target_run.completed["distill/autotune"].entry.metrics["cpu_seconds"]
    rows = {row["part"]: row for row in cost.training_cost(target_run, None, [])["parts"]}
    assert (rows["distill"]["cpu_seconds"], rows["distill"]["waited_seconds"]) == (None, 0.281)
    assert cost.busy_note({"parts": [rows["distill"]]}) is None


@pytest.mark.parametrize(
    ("seconds", "cpu", "waited", "is_busy"),
    [
        (100.0, 99.0, 0.2, False),  # one thread, quiet
        (100.0, 180.0, 5.0, False),  # two threads
        (200.0, 100.0, 95.0, True),  # one thread, and two other processes on its cores
        (200.0, 190.0, 100.0, True),  # two threads beside one busy process: no core of this one is idle, and the time is twice as long
        (0.4, 0.1, 0.3, False),  # too short to matter
        (200.0, 100.0, None, True),  # the kernel keeps no account
        (100.0, 180.0, None, False),
    ],
)
def test_a_busy_machine_is_noted_with_its_part_of_the_cost(seconds, cpu, waited, is_busy):
    row = {"part": "distill", "seconds": seconds, "cpu_seconds": cpu, "waited_seconds": waited}
    note = cost.busy_note({"parts": [{**row, "part": "teach", "seconds": 10.0, "cpu_seconds": 10.0, "waited_seconds": 0.0}, row]})
    assert (note is not None) == is_busy
    if note is not None:
        expected = f"distill {seconds:.0f} s, with {cpu:.0f} s of CPU time and {waited or 100.0:.0f} s in which threads waited for a core"
        assert note == f"the machine was busy, so training took longer than it needs: {expected}"


@pytest.mark.parametrize(("student_ns", "expected"), [(1_000_000, 66_875), (2_000_000, None)])
def test_training_breaks_even_after_as_many_inferences_as_save_its_time(student_ns, expected):
    student = _measurement("student", student_ns)
    assert cost.training_cost(_target_run(), student, [_measurement("teacher", 2_000_000), student])["break_even_inferences"] == expected


def test_training_that_breaks_even_later_than_the_recipe_allows_is_noted():
    assert cost.break_even_note(_target_run(), {"break_even_inferences": None}) is None
    assert cost.break_even_note(_target_run(1000), {"break_even_inferences": 1000}) is None
    assert "takes 1,001 inferences as measured; distill.break_even_inferences = 1,000" in cost.break_even_note(
        _target_run(1000), {"break_even_inferences": 1001}
    )
    assert "is unknown without a latency" in cost.break_even_note(_target_run(1000), {"break_even_inferences": None})
