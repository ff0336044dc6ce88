# SPDX-License-Identifier: Apache-2.0
"""edgekd: from a teacher network to a small model with a verdict.

For a program or a notebook: ``Distiller`` (the loss of a student, in your own training loop), ``save_teacher_logits`` (writes a
teacher's logits for a recipe), ``build_recipe`` (builds a whole recipe). Each is imported when it is first used.
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
_MODULES = {"Distiller": "edgekd.kd.distiller", "build_recipe": "edgekd.api", "save_teacher_logits": "edgekd.kd.teachers.stored"}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used, so that ``import edgekd`` does not import torch."""
    if name not in _MODULES:
        raise AttributeError(f"module 'edgekd' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name]), name)
