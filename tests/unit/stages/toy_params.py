# SPDX-License-Identifier: Apache-2.0
"""Parameters of the step ``inspect`` for one network with an input ``x``, in ``models.py``; tests change a field."""

from __future__ import annotations

from edgekd.domain.recipe import TensorSpec
from edgekd.stages.inspect.params import InspectParams, TeacherParams

PARAMS = InspectParams(
    splits="data.py:splits",
    max_overlap=0,
    inputs=(TensorSpec("x", (1, 4)),),
    student="models.py:net",
    task="multiclass",
    heads=(),
    teacher=TeacherParams("models.py:net", None, None, trained_here=False),
    checkpoints=(),
    teachers=(),
    assistants=(),
    sizes=(),
    tapped_losses=(),
    pseudo_labels=False,
    metric=None,
    score=None,
    augment=None,
    views=None,
)
