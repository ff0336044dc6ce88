# SPDX-License-Identifier: Apache-2.0
"""edgekd: from a teacher network to a small model with a verdict."""

from __future__ import annotations

__version__ = "0.1.0"
