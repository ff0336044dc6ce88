# SPDX-License-Identifier: Apache-2.0
"""edgekd: from a teacher network to a small model with a verdict.

What the command line does, for a program or a notebook: ``Distiller`` (the loss of a student in a loop of one's own),
``save_teacher_logits`` (a teacher's answers for a recipe), ``build_recipe`` (a whole recipe). Each is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgekd.api import build_recipe
    from edgekd.kd.distiller import Distiller
    from edgekd.kd.teachers.stored import save_teacher_logits

__version__ = "0.1.0"
__all__ = ["Distiller", "__version__", "build_recipe", "save_teacher_logits"]
_HOMES = {"Distiller": "edgekd.kd.distiller", "build_recipe": "edgekd.api", "save_teacher_logits": "edgekd.kd.teachers.stored"}


def __getattr__(name: str) -> object:
    """Import what is asked for, so that ``import edgekd`` needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'edgekd' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
