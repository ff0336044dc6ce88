# SPDX-License-Identifier: Apache-2.0
"""Import, call and watch the user's code."""

from __future__ import annotations

from edgekd.usercode.importer import (
    call_user_code,
    describe_user_error,
    forget_modules,
    in_recipe_dir,
    is_user_file,
    is_user_module,
    load_function,
    quieten_libraries,
)
from edgekd.usercode.running import note_running, read_running, running
from edgekd.usercode.settings import protect_streams
from edgekd.usercode.settings import undone as undone_settings

__all__ = [
    "call_user_code",
    "describe_user_error",
    "forget_modules",
    "in_recipe_dir",
    "is_user_file",
    "is_user_module",
    "load_function",
    "note_running",
    "protect_streams",
    "quieten_libraries",
    "read_running",
    "running",
    "undone_settings",
]
