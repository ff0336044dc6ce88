# SPDX-License-Identifier: Apache-2.0
"""Torch module -> one float32 ONNX file, the same bytes for the same module wherever it is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgekd.errors import StageError
from edgekd.quiet import quiet

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgekd.domain.recipe import TensorSpec

OPSET = 18  # the dynamo exporter's own; per-channel QDQ needs 13
OUTPUT = "output"


def export(model: Any, inputs: Sequence[TensorSpec], path: Path) -> None:
    """Write the file.

    Raises:
        StageError: if the exporter or the simplifier refuses the model.
    """
    import torch

    samples = tuple(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in inputs)
    with quiet():
        try:
            program = torch.onnx.export(
                model,
                samples,
                dynamo=True,
                input_names=[spec.name for spec in inputs],
                output_names=[OUTPUT],
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
        except (torch.onnx.OnnxExporterError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            raise StageError(f"export to onnx: torch's exporter refuses the model: {_reason(error)}") from error
    if program is None:
        raise StageError("export to onnx: torch's exporter gave nothing")
    path.write_bytes(finish(program.model_proto))


def finish(proto: Any) -> bytes:
    """Return the bytes of a simplified model without traces of where it was made.

    Raises:
        StageError: if onnxsim changes what the model computes.
    """
    import onnxsim

    with quiet():
        simplified, same = onnxsim.simplify(proto)
    if not same:
        raise StageError("export to onnx: the simplified model computes something else; report it to onnxsim")
    return stripped(simplified)


def stripped(proto: Any) -> bytes:
    """Return the bytes of a model without metadata: stack traces, doc strings, names of producers."""
    proto.producer_name = proto.producer_version = proto.doc_string = ""
    del proto.metadata_props[:]
    graph = proto.graph
    graph.doc_string = ""
    del graph.metadata_props[:]
    for items in (graph.node, graph.input, graph.output, graph.value_info, graph.initializer):
        for item in items:
            item.doc_string = ""
            del item.metadata_props[:]
    return proto.SerializeToString(deterministic=True)  # type: ignore[no-any-return]  # protobuf has no types


def _reason(error: BaseException) -> str:
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"
