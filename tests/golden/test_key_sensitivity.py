# SPDX-License-Identifier: Apache-2.0
"""Which stages run again when a field changes: the cache's documentation, kept as a golden table.

Every field of the recipe and of the target is changed in turn; the first column lists the stages whose own steps change. Stages that
depend on these run again if the bytes of their inputs change (``then``).
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from edgekd.build import pipeline
from edgekd.domain import budget, losses, scheme
from edgekd.domain import recipe as tables
from edgekd.domain import target as profile
from edgekd.kd.training import execution
from edgekd.plan import resolve

GOLDEN = Path(__file__).parent / "key_sensitivity.txt"

RECIPE = tables.Recipe(
    schema=1,
    name="toy",
    data=tables.Data(tables.EntryPoint("data.py", "splits")),
    teacher=tables.Teacher(
        tables.EntryPoint("models.py", "teacher"),
        train=tables.Training(epochs=2, augment=tables.EntryPoint("data.py", "augment"), threads=1),
    ),
    student=tables.Student(tables.EntryPoint("models.py", "student"), (tables.TensorSpec("image", (1, 1, 8, 8)),)),
    distill=tables.Distill(
        3,
        losses=(losses.Loss("kl", 0.9, temperature=4.0, standardize=False), losses.Loss("ce", 0.1, label_smoothing=0.0)),
        threads=1,
        augment=tables.EntryPoint("data.py", "augment"),
        views=4,
    ),
    budget=budget.Budget(
        max_accuracy_drop_pp=1.0,
        min_accuracy_pct=90.0,
        max_class_drop_pp=5.0,
        max_latency_p50_ms=1.0,
        max_latency_p95_ms=1.0,
        max_latency_p99_ms=1.0,
        min_speedup_x=2.0,
        max_peak_rss_mib=50.0,
        max_size_kib=64.0,
    ),
)
TARGET = profile.Target(
    schema=1,
    name="board",
    title="A board",
    cpu=profile.Cpu("armv8-a", "cortex-a72", 4, 1800, ("asimd",)),
    limits=profile.Limits(1024, 1024),
    runtimes=(profile.RuntimeEntry("litert", "ai-edge-litert", (1, 4)), profile.RuntimeEntry("onnxruntime", "onnxruntime", (1,))),
    schemes=("float32", "static_wi8_ai8", "dynamic_wi8_afp32"),
    device=profile.DeviceEntry(("ssh",), "aarch64"),
    protocol=profile.Protocol(20, 300, 10),
)
OTHER = {
    "student.inputs[0].dtype": "int64",
    "quantize.schemes": ("static_wi8_ai8",),
    "quantize.runtimes": ("litert",),
    "quantize.io": "int8",
    "evaluate.metric": tables.EntryPoint("metrics.py", "f1"),
    "evaluate.score": tables.EntryPoint("metrics.py", "score"),
    "teacher.weights": "teacher.safetensors",
    "teacher.file": "teacher.onnx",
    "teacher.trusted": True,
    "teacher.train.optimizer": "sgd",
    "distill.optimizer": "sgd",
    "distill.losses": (losses.Loss("ce"),),
    "distill.losses[0].standardize": True,
    "distill.baselines": tables.Baselines(seeds=2, pseudo_labels=True),
    "distill.losses[0].epochs": (1, 2),
    "distill.losses[1].epochs": (1, 2),
    "distill.losses[0].teacher": "ema",
    "distill.losses[1].teacher": "ema",
    "distill.teachers": (tables.Teacher(tables.EntryPoint("models.py", "other"), "other.safetensors"),),
    "distill.assistants": (tables.Assistant(tables.EntryPoint("models.py", "middle")),),
    "distill.precision": "bfloat16",  # on any CPU other than "auto"
    "teacher.train.precision": "bfloat16",
    "distill.accelerator": "none",
    "distill.break_even_inferences": 1_000_000,
    "distill.max_minutes": 30.0,
    "distill.mixup": 1.0,
    "teacher.train.accelerator": "none",
    "distill.ships": "best",
    "distill.sizes": (tables.EntryPoint("models.py", "wide"),),
    "distill.teacher_weighting": "confidence",
    "teacher.checkpoints": ("early.safetensors",),
    "teacher.train.checkpoints": 1,
    "cpu.isa": "x86-64",
    "cpu.lacks": ("avx2",),
    "device.arch": "x86_64",
    "device.kinds": ("adb",),
    "runtimes[0].version": "==2.3.*",
    "runtimes[1].version": "==1.32.*",
    "runtimes[0].delegate": "xnnpack",
    "runtimes[1].delegate": "xnnpack",
    "device.qemu_cpu": "cortex-a72",
    "protocol.governor": "performance",
    "protocol.max_temp_c": 75,
    "schemes": ("float32",),
    "runtimes": (profile.RuntimeEntry("litert", "ai-edge-litert", (1, 4)),),
    "target": {"board": tables.TargetOverrides(budget.Budget(max_size_kib=1.0), scheme.Quantize())},
}
# fields with one value only, that need another field to change too, or that are options of another kind of loss
SKIPPED = {"schema", "runtimes[0].name", "runtimes[1].name", "distill.losses[0].kind", "distill.losses[1].kind"} | {
    f"distill.losses[{index}].{field.name}"
    for index, loss in enumerate(RECIPE.distill.losses)
    for field in dataclasses.fields(loss)
    if field.name not in {"kind", "weight", "epochs", "teacher", *losses.LOSSES[loss.kind]}
}


def _leaves(value, path=""):
    """Yield (path, value) for every field, down to those that are not dataclasses."""
    if dataclasses.is_dataclass(value) and not isinstance(value, tables.EntryPoint):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name), f"{path}.{field.name}" if path else field.name)
    elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        if path in OTHER:
            yield path, value
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def _replace(value, path, new):
    head, _, rest = path.partition(".")
    name, _, index = head.partition("[")
    old = getattr(value, name)
    if index:
        position = int(index.rstrip("]"))
        changed = (*old[:position], _replace(old[position], rest, new), *old[position + 1 :])
    else:
        changed = _replace(old, rest, new) if rest else new
    return dataclasses.replace(value, **{name: changed})


def _another(path, old):
    if path in OTHER:
        return OTHER[path]
    if isinstance(old, tables.EntryPoint):
        return tables.EntryPoint("other.py", old.function)
    if isinstance(old, bool) or old is None:
        raise AssertionError(f"{path} needs a value in OTHER")
    if isinstance(old, int | float):
        return old * 2 + 1
    if isinstance(old, str):
        return old + "x"
    if isinstance(old, tuple) and old and isinstance(old[0], int):
        return (*old[:-1], old[-1] + 1)
    return (*old, "x")


def _steps(recipe, target):
    return {step.id: step for step in resolve(recipe, [target], pipeline.PIPELINE).steps}


def _changed_stages(before, after):
    """Return the stages whose steps change, and the stages that depend on these."""
    stages = [stage.NAME for stage in pipeline.PIPELINE]
    changed = {step.stage for step_id, step in after.items() if before.get(step_id) != step}
    changed |= {step.stage for step_id, step in before.items() if step_id not in after}
    affected = set(changed)
    for _ in stages:
        affected |= {
            step.stage for step in after.values() if any(after[ref.partition(":")[0]].stage in affected for ref in step.inputs.values())
        }
    return [name for name in stages if name in changed], [name for name in stages if name in affected - changed]


def _table():
    before = _steps(RECIPE, TARGET)
    rows = []
    for what, document in (("recipe", RECIPE), ("target", TARGET)):
        for path, old in _leaves(document):
            if path in SKIPPED:
                continue
            other = _replace(document, path, _another(path, old))
            after = _steps(other, TARGET) if what == "recipe" else _steps(RECIPE, other)
            changed, later = _changed_stages(before, after)
            rows.append(f"{what}: {path:<34} {' '.join(changed) or '-':<40} {'then ' + ' '.join(later) if later else ''}".rstrip())
    return "\n".join(rows) + "\n"


@pytest.fixture(autouse=True)
def _accelerated(monkeypatch):
    """Pretend that the machine has an accelerator, on any machine."""
    monkeypatch.setattr(execution, "accelerators", lambda: {"cuda": "NVIDIA T1"})


def test_the_stages_that_run_again_match_the_golden_table():
    table = _table()
    if os.environ.get("EDGEKD_GOLDEN"):
        GOLDEN.write_text(table)
    assert table == GOLDEN.read_text()


def test_no_stage_runs_again_for_a_budget_or_a_limit():
    rows = [row for row in _table().splitlines() if row.split()[1].startswith(("budget.", "limits.", "protocol."))]
    assert len(rows) == 9 + 2 + 5
    assert all(row.split()[2] == "-" for row in rows)


@pytest.mark.parametrize("path", ["distill.losses[0].temperature", "distill.losses[0].weight", "distill.epochs", "distill.seed"])
def test_soft_targets_are_not_computed_again_for_other_options_of_distillation(path):
    row = next(row for row in _table().splitlines() if row.split()[1] == path)
    assert row.split()[2] == "distill"
    assert "soft_targets" not in row
