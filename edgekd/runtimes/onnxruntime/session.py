# SPDX-License-Identifier: Apache-2.0
"""Sessions with exact int8 arithmetic on every CPU, so that outputs computed on this machine equal the target's.

By default ONNX Runtime multiplies uint8 by int8 with VPMADDUBSW on an x86 without VNNI; that instruction adds pairs of products in
16 bits and saturates, which ARM and VNNI do not. The option ``session.x64quantprecision`` converts such weights to uint8 at load time:
slower and exact. It is used for outputs only; latency is measured without it, as the model ships.

Source: github.com/microsoft/onnxruntime/pull/12088.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.capture import capture_output, one_line_errors
from edgekd.errors import StageError
from edgekd.harness import runner
from edgekd.runtimes.onnxruntime import comparison

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgekd.ports import Session

EXACT_INT8 = {"session.x64quantprecision": "1"}


def load(path: Path, threads: int) -> Session:
    """Return a session.

    Raises:
        ImportError: if onnxruntime is not installed.
        StageError: if it cannot load the file.
    """
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    with capture_output(), one_line_errors(f"{path.name}: onnxruntime cannot load it", ImportError):
        try:
            session: Any = _open(path, threads, EXACT_INT8)
        except errors.Fail:
            content = _copy_shared_weights(path)
            if content is None:
                raise
            session = _open_copy(path, content, threads)
    session.run = one_line_errors(f"{path.name}: onnxruntime cannot run it")(session.run)
    return session  # type: ignore[no-any-return]  # the harness has no types


def _open(path: Path, threads: int, options: Mapping[str, str]) -> Session:
    return runner.open_session("onnxruntime", path, threads, options)  # type: ignore[no-any-return]  # the harness has no types


def _open_copy(path: Path, content: bytes, threads: int) -> Session:
    """Return a session of a file with copied weights, which must compute the same.

    Raises:
        StageError: if it does not.
    """
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        Path(file.name).write_bytes(content)
        change = comparison.largest_change(path, Path(file.name), [])
        if change > comparison.ROUNDING:
            raise StageError(
                f"{path.name}: onnxruntime cannot load it: with copies of shared weights its outputs change by {100 * change:.3g} %"
            )
        return _open(Path(file.name), threads, EXACT_INT8)


def _copy_shared_weights(path: Path) -> bytes | None:
    """Return the model with one copy of each int8 tensor for each op that reads it, or None if none is shared.

    ONNX Runtime 1.32 fails on shared ones with this option: "attempt to replace the existing tensor".
    """
    import onnx

    model = onnx.load(str(path))
    graph = model.graph
    weights = {item.name: item for item in graph.initializer if item.data_type == onnx.TensorProto.INT8}
    _copy_dequantizers(graph, weights)
    read: set[str] = set()
    copies = 0
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name in weights and name in read:
                copies += 1
                node.input[position] = f"{name}_copy_{copies}"
                graph.initializer.add().CopyFrom(weights[name])
                graph.initializer[-1].name = node.input[position]
            read.add(name)
    return model.SerializeToString() if copies else None


def _copy_dequantizers(graph: Any, weights: dict[str, Any]) -> None:
    """Add a DequantizeLinear for each further op that reads a dequantized weight."""
    dequantizers = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in weights}
    copies: list[Any] = []
    read: set[str] = set()
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name in dequantizers and name in read:
                copy = type(node)()
                copy.CopyFrom(dequantizers[name])
                copy.name, copy.output[0] = f"{copy.name}_copy_{len(copies)}", f"{name}_copy_{len(copies)}"
                node.input[position] = copy.output[0]
                copies.append(copy)
            read.add(name)
    nodes = [*copies, *graph.node]
    graph.ClearField("node")
    graph.node.extend(nodes)
