# SPDX-License-Identifier: Apache-2.0
"""Conversion of a torch module to float32 TFLite with litert-torch; inputs keep torch's layout, int64 inputs become int32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgekd.capture import capture_output, one_line_errors
from edgekd.errors import StageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgekd.domain.recipe import TensorSpec


def export(model: Any, inputs: Sequence[TensorSpec], path: Path) -> None:
    """Write the file.

    Raises:
        StageError: if the converter refuses the model.
    """
    import torch

    if isinstance(model, torch.jit.ScriptModule):
        raise StageError("litert-torch cannot convert TorchScript; save the model with torch.export.save, or as weights")
    samples = tuple(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in inputs)
    with capture_output(), one_line_errors("litert-torch refuses the model"):
        import litert_torch

        litert_torch.convert(model, samples).export(str(path))
