# SPDX-License-Identifier: Apache-2.0
"""Conversion of a torch module to one float32 ONNX file; the same module gives the same bytes in any folder."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

from edgekd.capture import capture_output, one_line_errors
from edgekd.errors import StageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgekd.domain.recipe import TensorSpec

OPSET = 18  # the dynamo exporter's default; weights quantized per channel need 13
_CHANNELS_FIRST_RANK = 3  # (n, channels, positions), or more axes


def export(model: Any, inputs: Sequence[TensorSpec], path: Path, *, rewrite: bool = True) -> tuple[str, ...]:
    """Write the file, and return notes.

    The model is traced with names of inputs that mean nothing to torch, which renames an input that has the name of an operation.

    Args:
        model: The module, in eval mode.
        inputs: Its inputs.
        path: The file.
        rewrite: Whether the graph may be changed so that it is smaller and faster, with the same outputs.

    Raises:
        StageError: if the exporter refuses the model.
    """
    import torch

    names = {f"edgekd_input_{index}": spec.name for index, spec in enumerate(inputs)}
    output = "output"
    while output in names.values():
        output += "_"
    samples = tuple(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in inputs)
    notes: tuple[str, ...] = ()
    with capture_output():
        with one_line_errors("torch's ONNX exporter refuses the model"):
            proto = _trace(model, samples, [*names], output)
        if rewrite:
            proto, notes = _simplify(proto)
        _rename(proto.graph, names)
        path.write_bytes(strip(proto))
    return notes


def strip(proto: Any, metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes of a model without any metadata but this: stack traces contain paths, producer fields contain versions."""
    proto.producer_name = proto.producer_version = proto.doc_string = ""
    del proto.metadata_props[:]
    for key, value in sorted((metadata or {}).items()):
        proto.metadata_props.add(key=key, value=value)
    _strip_graph(proto.graph)
    for function in proto.functions:
        _strip_graph(function)
    return proto.SerializeToString(deterministic=True)  # type: ignore[no-any-return]  # protobuf has no types


def _strip_graph(graph: Any) -> None:
    graph.doc_string = ""
    del graph.metadata_props[:]
    parts: list[Any] = [*graph.node, *graph.value_info]
    if hasattr(graph, "initializer"):  # a function has none
        parts += [*graph.input, *graph.output, *graph.initializer]
    for part in parts:
        part.doc_string = ""
        del part.metadata_props[:]
    for inner in _inner_graphs(graph):
        _strip_graph(inner)


def _trace(model: Any, samples: tuple[Any, ...], names: list[str], output: str) -> Any:
    import torch

    if isinstance(model, torch.jit.ScriptModule):  # the dynamo exporter cannot read TorchScript; its predecessor can
        import onnx

        with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
            torch.onnx.export(model, samples, file.name, dynamo=False, input_names=names, output_names=[output], opset_version=OPSET)
            return onnx.load(file.name)
    program = torch.onnx.export(
        model, samples, dynamo=True, input_names=names, output_names=[output], opset_version=OPSET, external_data=False, verbose=False
    )
    if program is None:
        raise RuntimeError("it returned nothing")
    return program.model_proto


def _simplify(proto: Any) -> tuple[Any, tuple[str, ...]]:
    """Return the simplified model, or the model as it was with a note, if onnxsim fails or changes what it computes."""
    import onnxsim

    rewritten = type(proto)()
    rewritten.CopyFrom(proto)
    _replace_means(rewritten.graph)
    try:
        with one_line_errors("onnxsim refuses the model"):
            simplified, is_equivalent = onnxsim.simplify(rewritten)
    except StageError as error:
        return proto, (f"the ONNX file is not simplified: {error}",)
    if not is_equivalent:
        return proto, ("the ONNX file is not simplified: onnxsim changes what it computes",)
    return simplified, ()


def _rename(graph: Any, names: Mapping[str, str]) -> None:
    """Rename inputs; a value inside the graph that has the new name of an input gets another one."""
    values = _value_names(graph)
    clashes = {name: f"{name}_value" for name in names.values() if name in values}
    while any(name in values or name in names.values() for name in clashes.values()):
        clashes = {name: f"{other}_" for name, other in clashes.items()}
    _apply_names(graph, {**clashes, **names})


def _value_names(graph: Any) -> set[str]:
    names = {item.name for item in (*graph.input, *graph.initializer, *graph.output)}
    names |= {name for node in graph.node for name in (*node.input, *node.output)}
    return names.union(*map(_value_names, _inner_graphs(graph)))


def _apply_names(graph: Any, names: Mapping[str, str]) -> None:
    for item in (*graph.input, *graph.initializer, *graph.output, *graph.value_info):
        item.name = names.get(item.name, item.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for inner in _inner_graphs(graph):
        _apply_names(inner, names)


def _inner_graphs(graph: Any) -> list[Any]:
    """Return the graphs in the attributes of a graph's nodes (branches and loops)."""
    graphs = [inner for node in graph.node for attribute in node.attribute for inner in (attribute.g, *attribute.graphs)]
    return [inner for inner in graphs if inner.node]


def _replace_means(graph: Any) -> None:
    """Replace each mean over all positions by a global average pool: ONNX Runtime has an int8 kernel for it, and none for ReduceMean."""
    from onnx import TensorProto, numpy_helper

    axes_of = {
        item.name: numpy_helper.to_array(item).tolist() for item in graph.initializer if item.data_type == TensorProto.INT64 and item.dims
    }
    ranks = {item.name: len(item.type.tensor_type.shape.dim) for item in (*graph.input, *graph.value_info)}
    nodes: list[Any] = []
    for node in graph.node:
        rank = ranks.get(node.input[0], 0) if node.op_type == "ReduceMean" else 0
        axes = axes_of.get(node.input[1], []) if rank and len(node.input) > 1 else []
        is_pool = rank >= _CHANNELS_FIRST_RANK and sorted(axis % rank for axis in axes) == list(range(2, rank))
        nodes += _global_average_pool(node) if is_pool else [node]
    graph.ClearField("node")
    graph.node.extend(nodes)


def _global_average_pool(mean: Any) -> list[Any]:
    from onnx import helper

    keep_dimensions = all(attribute.i for attribute in mean.attribute if attribute.name == "keepdims")
    if keep_dimensions:
        return [helper.make_node("GlobalAveragePool", mean.input[:1], mean.output, name=mean.name)]
    pooled = f"{mean.output[0]}_pooled"
    return [
        helper.make_node("GlobalAveragePool", mean.input[:1], [pooled], name=mean.name),
        helper.make_node("Flatten", [pooled], mean.output, name=f"{mean.name}_flatten"),
    ]
