# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime: exported with torch's dynamo exporter and onnxsim, quantized as QDQ (static) or per MatMul (dynamic)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgekd.domain.scheme import DYNAMIC_INT8, FLOAT32, STATIC_INT8, is_integer
from edgekd.errors import StageError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from edgekd.domain.artifact import Json
    from edgekd.domain.recipe import TensorSpec
    from edgekd.ports import Session

NAME = "onnxruntime"
PACKAGE = "onnxruntime"
FORMAT = "onnx"
SCHEMES = (FLOAT32, STATIC_INT8, DYNAMIC_INT8)
EXPORT_TOOLS = ("torch", "onnx", "onnxscript", "onnxsim")
QUANTIZE_TOOLS = ("onnxruntime", "onnx", "numpy")
_VNNI = ("avx512_vnni", "avx_vnni")


def export(model: Any, inputs: Sequence[TensorSpec], path: Path) -> None:
    """Write a float32 ONNX file."""
    from edgekd.runtimes.onnxruntime.convert import export as write

    write(model, inputs, path)


def quantize(source: Path, path: Path, params: Mapping[str, Json], calibration: Sequence[Sequence[np.ndarray]]) -> Mapping[str, Json]:
    """Write a quantized ONNX file and return its scheme file's content."""
    from edgekd.runtimes.onnxruntime.int8 import quantize as write

    return write(source, path, params, calibration)


def variant(scheme: str, cpu_features: Sequence[str], arch: str) -> Mapping[str, Json]:
    """Return ``reduce_range`` for x86 without VNNI, where products of full-range weights saturate.

    Source: onnxruntime.ai/docs/performance/model-optimizations/quantization.html, "U8S8 on AVX2".
    """
    saturates = arch == "x86_64" and not set(_VNNI) & set(cpu_features)
    return {"reduce_range": True} if is_integer(scheme) and saturates else {}


def why_unfit(scheme: str, variant: Mapping[str, Json], instruction_set: str) -> str | None:
    """Return why outputs computed here do not stand for the target's: full-range int8 saturates on x86 without VNNI."""
    saturates = instruction_set.startswith("x86-64") and "vnni" not in instruction_set
    if is_integer(scheme) and saturates and not variant.get("reduce_range"):
        return f"int8 in onnxruntime saturates on {instruction_set}, where it was evaluated, and not on the target"
    return None


def open(path: Path, threads: int) -> Session:  # noqa: A001  (the protocol's word)
    """Load an ONNX file.

    Raises:
        UnavailableError: if onnxruntime is not installed.
        StageError: if it cannot load the file.
    """
    from edgekd.harness import runner

    try:
        return runner.open_session(NAME, path, threads)  # type: ignore[no-any-return]  # the harness has no types
    except ImportError as error:
        raise UnavailableError("onnxruntime is not installed; run: pip install 'edgekd[onnx]'") from error
    except Exception as error:
        raise StageError(f"{path.name}: onnxruntime cannot load it: {str(error).splitlines()[0]}") from error
