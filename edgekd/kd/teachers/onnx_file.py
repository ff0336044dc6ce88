# SPDX-License-Identifier: Apache-2.0
"""Read an ONNX file as the only file of its model.

An ONNX file may name other files that hold its weights ("external data"). ONNX Runtime reads them from the current folder if it gets
the model's bytes, and no digest of the model would contain them, so they are refused.

Source: github.com/onnx/onnx/blob/main/docs/ExternalData.md.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from edgekd.errors import RecipeError, printable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


_TYPED_DATA = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
_MIN_ELEMENT_BITS, _MAX_ELEMENT_BITS = 2, 64  # int2, and a value of double_data


def read_onnx(path: Path) -> bytes:
    """Return the bytes of an ONNX file.

    Raises:
        RecipeError: if it is not an ONNX model, has external data, or declares more data than it has.
    """
    import onnx

    content = path.read_bytes()
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:
        raise RecipeError(f"{path.name}: is not a readable ONNX file; export it again, or copy it again if it was copied") from error
    if not model.graph.output:
        raise RecipeError(f"{path.name}: is not an ONNX model: it has no output; export it again")
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            locations = [entry.value for entry in tensor.external_data if entry.key == "location"]
            merged = f"{path.stem}_merged.onnx"
            raise RecipeError(
                f"{path.name}: has external data: '{printable(tensor.name, 100)}' is in '{printable(' '.join(locations), 100)}'; expected "
                "one file with all weights; merge them in the folder of the recipe and name that file: "
                f"python -c \"import onnx; onnx.save(onnx.load('{path.name}'), '{merged}')\""
            )
        if (problem := _size_problem(tensor)) is not None:
            raise RecipeError(f"{path.name}: '{printable(tensor.name, 100)}' {problem}; export it again")
    return content


def _size_problem(tensor: Any) -> str | None:
    """Return how the declared size of a tensor differs from the bytes it holds, or None; native code would allocate what is declared."""
    count = math.prod(tensor.dims)
    if any(size < 0 for size in tensor.dims):
        return f"has the shape {list(tensor.dims)}"
    values = sum(len(getattr(tensor, name)) for name in _TYPED_DATA)
    stored = 8 * len(tensor.raw_data) + _MAX_ELEMENT_BITS * values
    return f"has the shape {list(tensor.dims)} and only {stored // 8} bytes" if _MIN_ELEMENT_BITS * count > stored else None


def _tensors(model: Any) -> Iterator[Any]:
    """Yield all tensors of a model: weights, and constants in the attributes of nodes, also in inner graphs and functions."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _node_tensors(node)


def _graph_tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            yield from _graph_tensors(inner)
