# SPDX-License-Identifier: Apache-2.0
"""Comparison of an ONNX file with what it was before it was rewritten."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from edgekd.harness import runner

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np

SAMPLES = 8
ROUNDING = 1e-4  # of the range of the outputs: kernels that sum in another order stay far below (edgekd/stages/export.py)


def largest_change(before: Path, after: Path, samples: Sequence[Sequence[np.ndarray]]) -> float:
    """Return the largest difference between the outputs of two files, as a share of the range of the outputs.

    It is infinite if they differ in shape, or in what is finite.

    Args:
        before: The file before it was rewritten.
        after: The file now; it may take and return integers instead of floats.
        samples: The first ``SAMPLES`` of these are run, each a list of inputs as ``before`` takes them; random ones if there are none.
    """
    import numpy as np

    old, new = (runner.open_session("onnxruntime", path, 1) for path in (before, after))
    inputs = list(samples[:SAMPLES]) or runner.samples(old, None, SAMPLES)
    expected = np.stack([old.run(sample)[0].astype(np.float64) for sample in inputs])
    outputs = np.stack([_run(new, sample) for sample in inputs])
    is_finite = np.isfinite(expected)
    if outputs.shape != expected.shape or not np.array_equal(np.isfinite(outputs), is_finite):
        return math.inf
    if not is_finite.any():
        return 0.0
    span = float(np.ptp(expected[is_finite])) or 1.0
    return float(np.abs(outputs[is_finite] - expected[is_finite]).max()) / span


def _run(session: Any, sample: Sequence[np.ndarray]) -> np.ndarray:
    """Return the output as float64, for a file with float or integer inputs and outputs."""
    import numpy as np

    output = session.run([runner.to_input_type(np, array, item) for array, item in zip(sample, session.inputs, strict=True)])[0]
    scale, zero_point = session.outputs[0]["scale"], session.outputs[0]["zero_point"]
    values: np.ndarray = output.astype(np.float64)
    return values if scale is None else (values - zero_point) * scale
