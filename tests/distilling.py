# SPDX-License-Identifier: Apache-2.0
"""A recipe of a small student, for tests of the stage ``distill``."""

from __future__ import annotations

from edgekd.domain.losses import Loss
from edgekd.domain.recipe import Data, Distill, EntryPoint, Recipe, Student, Teacher, TensorSpec

KL = Loss("kl", 0.9, temperature=2.0)
CE = Loss("ce", 0.1)


def entry(function):
    return EntryPoint("distill_user.py", function)


def recipe(function="student", **changes):
    return Recipe(
        schema=1,
        name="t",
        data=Data(entry("splits")),
        teacher=Teacher(entry("teacher"), "w.safetensors"),
        student=Student(entry(function), (TensorSpec("x", (1, 4)),)),
        distill=Distill(
            **{"epochs": 8, "losses": (KL, CE), "batch_size": 16, "learning_rate": 0.02, "threads": 1, "precision": "float32", **changes}
        ),
    )
