# SPDX-License-Identifier: Apache-2.0
"""Import, call and watch the user's code."""

from __future__ import annotations

from edgekd.usercode.importer import call_user_code, forget_modules, is_user_file, is_user_module, load_function

__all__ = ["call_user_code", "forget_modules", "is_user_file", "is_user_module", "load_function"]
