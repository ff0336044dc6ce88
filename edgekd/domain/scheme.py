# SPDX-License-Identifier: Apache-2.0
"""Schemes: the numeric format of a model, by one grammar.

``static_wi8_ai8``: weights int8, activations int8 with ranges fixed by the calibration set.
``dynamic_wi8_afp32``: weights int8, activations float at the edges of each op, quantized at run time.
``float32``: not quantized.

The grammar is that of AI Edge Quantizer.
"""

from __future__ import annotations

FLOAT32 = "float32"
STATIC_INT8 = "static_wi8_ai8"
DYNAMIC_INT8 = "dynamic_wi8_afp32"
SCHEMES = (DYNAMIC_INT8, FLOAT32, STATIC_INT8)


def needs_calibration(scheme: str) -> bool:
    """Return whether activation ranges come from the calibration set."""
    return scheme.startswith("static_")


def is_integer(scheme: str) -> bool:
    """Return whether weights are stored as integers."""
    return scheme != FLOAT32
