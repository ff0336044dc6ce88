# SPDX-License-Identifier: Apache-2.0
"""Schemes: the numeric format of a model, in the grammar of AI Edge Quantizer.

``static_wi8_ai8``: int8 weights, int8 activations with ranges from the calibration set.
``dynamic_wi8_afp32``: int8 weights; activations are float between ops, and quantized inside an op at run time.
``float32``: not quantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from edgekd.domain.rules import Between, NonEmpty, OneOf

FLOAT32 = "float32"
STATIC_INT8 = "static_wi8_ai8"
DYNAMIC_INT8 = "dynamic_wi8_afp32"
SCHEMES = (DYNAMIC_INT8, FLOAT32, STATIC_INT8)


@dataclass(frozen=True, slots=True)
class Quantize:
    """Which candidates are built.

    Attributes:
        schemes: Numeric formats; "auto" is all that the target allows.
        runtimes: Engines; "auto" is all that the target has.
        io: Type of inputs and outputs of statically quantized candidates.
        max_float_ops: How many ops a statically quantized candidate may keep in float.
    """

    schemes: Annotated[tuple[Annotated[str, OneOf("a scheme", SCHEMES)], ...], NonEmpty()] | Literal["auto"] = "auto"
    runtimes: Annotated[tuple[str, ...], NonEmpty()] | Literal["auto"] = "auto"
    io: Annotated[str, OneOf("an io type", ("float32", "int8"))] = "float32"
    max_float_ops: Annotated[int, Between(0)] = 0


def needs_calibration(scheme: str) -> bool:
    """Return whether activation ranges come from the calibration set."""
    return scheme.startswith("static_")


def is_integer(scheme: str) -> bool:
    """Return whether weights are stored as integers."""
    return scheme != FLOAT32
