# SPDX-License-Identifier: Apache-2.0
"""A session whose int8 arithmetic is exact on every processor, so that outputs computed here stand for the target's.

By default ONNX Runtime multiplies uint8 by int8 with VPMADDUBSW on an x86 without VNNI; that adds pairs of products in 16
bits and saturates, where ARM and VNNI do not. Its option ``session.x64quantprecision`` turns such weights into uint8 when
they are loaded: slower, and exact. It is for outputs, not for times: those are measured as the model ships.

Source: github.com/microsoft/onnxruntime/pull/12088.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.capture import capture_output
from edgekd.errors import StageError
from edgekd.harness import runner

if TYPE_CHECKING:
    from edgekd.ports import Session

EXACT = {"session.x64quantprecision": "1"}


def load(path: Path, threads: int) -> Session:
    """Return a session.

    Raises:
        ImportError: if onnxruntime is not installed.
        StageError: if it cannot load the file.
    """
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    refusals = (
        errors.EPFail,
        errors.Fail,
        errors.InvalidArgument,
        errors.InvalidGraph,
        errors.InvalidProtobuf,
        errors.NoModel,
        errors.NoSuchFile,
        errors.NotImplemented,
        errors.RuntimeException,
    )
    with capture_output():
        try:
            return _opened(path, threads)
        except refusals as error:
            first = error
        try:
            copy = _unshared(path) if isinstance(first, errors.Fail) else None
            if copy is not None:
                return _from_bytes(copy, threads)
        except refusals as error:
            first = error
    raise StageError(f"{path.name}: onnxruntime cannot load it: {str(first).splitlines()[0]}") from first


def _opened(path: Path, threads: int) -> Session:
    return runner.open_session("onnxruntime", path, threads, EXACT)  # type: ignore[no-any-return]  # the harness has no types


def _from_bytes(content: bytes, threads: int) -> Session:
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        Path(file.name).write_bytes(content)
        return _opened(Path(file.name), threads)


def _unshared(path: Path) -> bytes | None:
    """Return the model with a copy of each int8 tensor for each op that reads it, or None if none is shared.

    ONNX Runtime 1.32 stops at shared ones: "attempt to replace the existing tensor".
    """
    import onnx

    model = onnx.load(str(path))
    graph = model.graph
    weights = {item.name: item for item in graph.initializer if item.data_type == onnx.TensorProto.INT8}
    _copy_dequantizers(graph, weights)
    seen: set[str] = set()
    copies = 0
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name in weights and name in seen:
                copies += 1
                node.input[position] = f"{name}_copy_{copies}"
                graph.initializer.add().CopyFrom(weights[name])
                graph.initializer[-1].name = node.input[position]
            seen.add(name)
    return model.SerializeToString() if copies else None


def _copy_dequantizers(graph: Any, weights: dict[str, Any]) -> None:
    """Give each reader of a dequantized weight a DequantizeLinear of its own."""
    makers = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in weights}
    added: list[Any] = []
    seen: set[str] = set()
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name in makers and name in seen:
                copy = type(node)()
                copy.CopyFrom(makers[name])
                copy.name, copy.output[0] = f"{copy.name}_copy_{len(added)}", f"{name}_copy_{len(added)}"
                node.input[position] = copy.output[0]
                added.append(copy)
            seen.add(name)
    nodes = [*added, *graph.node]
    kept = type(graph)()
    kept.node.extend(nodes)
    graph.ClearField("node")
    graph.node.extend(kept.node)
