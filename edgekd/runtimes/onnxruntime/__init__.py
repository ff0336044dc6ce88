# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime: exported with torch's dynamo exporter and onnxsim; quantized to QDQ (static), or its MatMul ops (dynamic)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgekd.domain.scheme import DYNAMIC_INT8, FLOAT32, STATIC_INT8, is_integer
from edgekd.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from edgekd.domain.artifact import Json
    from edgekd.domain.recipe import TensorSpec
    from edgekd.ports import Session

NAME = "onnxruntime"
PACKAGE = "onnxruntime"
ALTERNATIVES: tuple[str, ...] = ()
FORMAT = "onnx"
SCHEMES = (FLOAT32, STATIC_INT8, DYNAMIC_INT8)
EXPORT_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxsim")
QUANTIZE_TOOLS = ("onnxruntime", "onnx", "numpy")
_VNNI = ("avx512_vnni", "avx_vnni")


def export(model: Any, inputs: Sequence[TensorSpec], path: Path, *, rewrite: bool = True) -> tuple[str, ...]:
    """Write a float32 ONNX file, and return notes."""
    from edgekd.runtimes.onnxruntime import convert

    return convert.export(model, inputs, path, rewrite=rewrite)


def quantize(source: Path, path: Path, params: Mapping[str, Json], calibration: Sequence[Sequence[np.ndarray]]) -> Mapping[str, Json]:
    """Write a quantized ONNX file and return the content of its scheme file."""
    from edgekd.runtimes.onnxruntime import int8

    return int8.quantize(source, path, params, calibration)


def variant(scheme: str, cpu_features: Sequence[str], arch: str) -> Mapping[str, Json]:
    """Return ``reduce_range`` (weights of 7 bits) for x86 without VNNI, where sums of full-range products saturate.

    Source: onnxruntime.ai/docs/performance/model-optimizations/quantization.html, "U8S8 on AVX2"; measured on AVX2: dynamic
    schemes saturate as well.
    """
    saturates = arch == "x86_64" and not set(_VNNI) & set(cpu_features)
    return {"reduce_range": True} if is_integer(scheme) and saturates else {}


def why_unfit(scheme: str, variant: Mapping[str, Json], instruction_set: str) -> str | None:  # noqa: ARG001  (the protocol's signature)
    """Return None: :func:`open` computes int8 exactly, also on x86 without VNNI."""
    return None


def open(path: Path, threads: int) -> Session:  # noqa: A001  (the protocol's name)
    """Load an ONNX file.

    Raises:
        UnavailableError: if onnxruntime is not installed.
        StageError: if it cannot load the file.
    """
    from edgekd.runtimes.onnxruntime.session import load

    try:
        return load(path, threads)
    except ImportError as error:
        raise UnavailableError("onnxruntime is not installed; run: pip install 'edgekd[onnx]'") from error
