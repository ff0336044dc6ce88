# SPDX-License-Identifier: Apache-2.0
"""LiteRT (and tflite-runtime): exported with litert-torch, quantized with AI Edge Quantizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgekd.domain.scheme import DYNAMIC_INT8, FLOAT32, STATIC_INT8
from edgekd.errors import StageError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from edgekd.domain.artifact import Json
    from edgekd.domain.recipe import TensorSpec
    from edgekd.ports import Session

NAME = "litert"
PACKAGE = "ai-edge-litert"
ALTERNATIVES: tuple[str, ...] = ("tflite-runtime",)  # what the harness imports instead
FORMAT = "tflite"
SCHEMES = (FLOAT32, STATIC_INT8, DYNAMIC_INT8)
EXPORT_TOOLS = ("torch", "litert-torch", "litert-converter", "jax")  # litert-torch lowers some ops with jax
QUANTIZE_TOOLS = ("ai-edge-quantizer", "ai-edge-litert", "numpy")


def export(model: Any, inputs: Sequence[TensorSpec], path: Path, *, rewrite: bool = True) -> tuple[str, ...]:  # noqa: ARG001  (the protocol's signature)
    """Write a float32 TFLite file, as litert-torch converts it, and return notes; inputs keep torch's layout, int64 becomes int32.

    Raises:
        StageError: if the converter refuses the model.
    """
    import torch

    from edgekd.capture import capture_output, one_line_errors

    if isinstance(model, torch.jit.ScriptModule):
        raise StageError("litert-torch cannot convert TorchScript; save the model with torch.export.save, or as weights")
    samples = tuple(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in inputs)
    with capture_output(), one_line_errors("litert-torch refuses the model"):
        import litert_torch

        litert_torch.convert(model, samples).export(str(path))
    return ()


def quantize(source: Path, path: Path, params: Mapping[str, Json], calibration: Sequence[Sequence[np.ndarray]]) -> Mapping[str, Json]:
    """Write a quantized TFLite file and return the content of its scheme file."""
    from edgekd.runtimes.litert import int8

    return int8.quantize(source, path, params, calibration)


def variant(scheme: str, cpu_features: Sequence[str], arch: str) -> Mapping[str, Json]:  # noqa: ARG001  (the protocol's signature)
    """Return an empty mapping: XNNPACK's int8 kernels compute the same on every CPU."""
    return {}


def why_unfit(scheme: str, variant: Mapping[str, Json], instruction_set: str) -> str | None:  # noqa: ARG001  (the protocol's signature)
    """Return None: outputs of XNNPACK's int8 kernels were bit-identical on x86 and ARM when compared."""
    return None


def open(path: Path, threads: int) -> Session:  # noqa: A001  (the protocol's name)
    """Load a TFLite file.

    Raises:
        UnavailableError: if no LiteRT is installed.
        StageError: if it cannot load the file.
    """
    from edgekd.capture import capture_output, one_line_errors
    from edgekd.harness import runner

    try:
        with capture_output(), one_line_errors(f"{path.name}: LiteRT cannot load it", ImportError):  # the XNNPACK delegate prints
            session = runner.open_session(NAME, path, threads)
    except ImportError as error:
        raise UnavailableError("LiteRT is not installed; run: pip install 'edgekd[litert]'") from error
    session.run = one_line_errors(f"{path.name}: LiteRT cannot run it")(session.run)
    return session  # type: ignore[no-any-return]  # the harness has no types
