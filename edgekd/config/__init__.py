# SPDX-License-Identifier: Apache-2.0
"""Recipes and target profiles: TOML to domain objects, with all problems at once."""

from __future__ import annotations

from edgekd.config.devices import find_device
from edgekd.config.profiles import (
    find_target,
    is_this_machine,
    load_target,
    target_names,
    why_not_of_its_kind,
    why_not_this_machine,
)
from edgekd.config.recipe import load_recipe

__all__ = [
    "find_device",
    "find_target",
    "is_this_machine",
    "load_recipe",
    "load_target",
    "target_names",
    "why_not_of_its_kind",
    "why_not_this_machine",
]
