# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from edgekd.domain.recipe import TensorSpec
from edgekd.domain.scheme import DYNAMIC_INT8, FLOAT32, STATIC_INT8
from edgekd.errors import StageError
from edgekd.runtimes import onnxruntime as runtime
from edgekd.runtimes.onnxruntime import comparison, convert


class Pools(nn.Module):
    """Three means: over the positions of an image, of a signal, and over the rows of a matrix."""

    def __init__(self):
        super().__init__()
        self.image, self.signal, self.out = nn.Conv2d(1, 4, 3), nn.Conv1d(2, 4, 3), nn.Linear(4, 3)

    def forward(self, image, signal):
        pooled = nn.functional.adaptive_avg_pool2d(torch.relu(self.image(image)), 1).flatten(1)
        maps = self.signal(signal)
        return self.out(pooled + maps.mean(-1)) + maps.mean(1)[:, :3]


class Encoder(nn.Module):
    """Attention on token ids; a layer norm that is used twice, so that its weights are shared."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.qkv = nn.Embedding(50, 16), nn.LayerNorm(16), nn.Linear(16, 48)
        self.mix, self.out = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)), nn.Linear(16, 3)

    def forward(self, ids):
        x = self.embed(ids)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + torch.softmax(q @ k.transpose(1, 2) / 4, -1) @ v
        return self.out((x + self.mix(self.norm(x))).mean(1))


class Twice(nn.Module):
    """A layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(torch.relu(self.inner(torch.relu(self.inner(x)))))


class Gru(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.out = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.gru(x)[0][:, -1])


MODELS = {
    "pools": (Pools, (TensorSpec("image", (1, 1, 8, 8)), TensorSpec("signal", (1, 2, 9)))),
    "encoder": (Encoder, (TensorSpec("ids", (1, 10), "int64"),)),
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), (TensorSpec("x", (1, 6)),)),
    "twice": (Twice, (TensorSpec("x", (1, 6)),)),
    "gru": (Gru, (TensorSpec("x", (1, 5, 4)),)),
}


class ExportedModel:
    """A module, its float32 file, samples and their expected outputs."""

    def __init__(self, name, folder):
        torch.manual_seed(0)
        build, self.specs = MODELS[name]
        self.module, self.path = build().eval(), folder / f"{name}.onnx"
        generator = np.random.default_rng(0)
        self.samples = [
            [
                generator.standard_normal(spec.shape).astype(np.float32)
                if spec.dtype == "float32"
                else generator.integers(0, 50, spec.shape)
                for spec in self.specs
            ]
            for _ in range(48)
        ]
        runtime.export(self.module, self.specs, self.path)
        with torch.inference_mode():
            self.expected = np.concatenate([self.module(*map(torch.from_numpy, sample)).numpy() for sample in self.samples])

    def quantize(self, path, scheme, io="float32", **variant):
        return runtime.quantize(self.path, path, {"scheme": scheme, "io": io, **variant}, self.samples if scheme == STATIC_INT8 else [])

    def error(self, path):
        """Return the largest error relative to the range of the outputs."""
        session = runtime.open(path, 1)
        outputs = np.concatenate([session.run(sample)[0] for sample in self.samples])
        return np.abs(outputs - self.expected).max() / np.ptp(self.expected)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder, models = tmp_path_factory.mktemp("onnx"), {}

    def get(name):
        if name not in models:
            models[name] = ExportedModel(name, folder)
        return models[name]

    return get


def op_counts(description, key):
    return {item["op"]: item["count"] for item in description[key]}


def test_an_exported_file_has_the_recipes_names_and_no_metadata(exported):
    model = onnx.load(exported("pools").path)
    onnx.checker.check_model(model, full_check=True)
    assert [item.name for item in model.graph.input] == ["image", "signal"]
    assert [item.name for item in model.graph.output] == ["output"]
    assert model.opset_import[0].version == 18
    assert (model.producer_name, model.doc_string, len(model.metadata_props)) == ("", "", 0)
    assert not [node.name for node in model.graph.node if node.metadata_props or node.doc_string]
    assert not [item.name for item in model.graph.initializer if item.data_location == onnx.TensorProto.EXTERNAL]


def test_only_means_over_all_positions_become_pools(exported):
    model = exported("pools")
    op_types = [node.op_type for node in onnx.load(model.path).graph.node]
    assert op_types.count("GlobalAveragePool") == 2
    assert op_types.count("ReduceMean") == 1
    assert model.error(model.path) < 1e-6


@pytest.mark.parametrize("scheme", [STATIC_INT8, DYNAMIC_INT8])
@pytest.mark.parametrize("name", ["encoder", "gru", "mlp", "twice"])
def test_full_range_int8_does_not_saturate_on_any_cpu(exported, tmp_path, name, scheme):
    model, path = exported(name), tmp_path / "q.onnx"
    model.quantize(path, scheme)
    assert 1e-5 < model.error(path) < 0.02  # on x86 without VNNI it is 0.1 to 0.3 by default


def test_a_reduced_range_has_weights_of_seven_bits(exported, tmp_path):
    model = exported("mlp")
    for variant, bits, top in (({}, 8, 127), ({"reduce_range": True}, 7, 64)):
        description = model.quantize(tmp_path / "q.onnx", STATIC_INT8, **variant)
        weights = [numpy_helper.to_array(item) for item in onnx.load(tmp_path / "q.onnx").graph.initializer if len(item.dims) == 2]
        assert (len(weights), description["weight_bits"]) == (2, bits)
        assert max(np.abs(item.astype(int)).max() for item in weights) == top
        assert model.error(tmp_path / "q.onnx") < 0.02


def test_ops_that_run_in_float_are_listed_with_reasons(exported, tmp_path):
    description = exported("encoder").quantize(tmp_path / "q.onnx", STATIC_INT8)
    reasons = {item["op"]: item["reason"] for item in description["float_ops"]}
    assert op_counts(description, "float_ops") == {"Div": 2, "Erf": 1, "LayerNormalization": 2, "ReduceMean": 1}
    assert reasons["LayerNormalization"] == "onnxruntime has no int8 kernel for it in this graph"  # it is quantized in the file
    assert reasons["Erf"] == "onnxruntime's quantizer has no int8 version of it"
    assert op_counts(description, "integer_ops") == {"Add": 3, "Gemm": 4, "MatMul": 2, "Mul": 2, "Softmax": 1}
    assert description["ops"] == 6 + 12


def test_ops_with_int8_weights_are_listed_for_a_dynamic_model(exported, tmp_path):
    description = exported("encoder").quantize(tmp_path / "q.onnx", DYNAMIC_INT8)
    reasons = {item["op"]: item["reason"] for item in description["float_ops"]}
    assert op_counts(description, "integer_ops") == {"MatMul": 4}
    assert op_counts(description, "float_ops")["MatMul"] == 2
    assert reasons["MatMul"] == "it has no constant weights"
    assert reasons["Softmax"] == "activations stay float in a dynamic scheme"
    pools = exported("pools").quantize(tmp_path / "p.onnx", DYNAMIC_INT8)
    assert "many times slower" in next(item["reason"] for item in pools["float_ops"] if item["op"] == "Conv")


def test_pools_and_additions_are_int8_in_a_static_model(exported, tmp_path):
    description = exported("pools").quantize(tmp_path / "q.onnx", STATIC_INT8)
    assert op_counts(description, "integer_ops") == {"Add": 2, "Conv": 2, "Gemm": 1, "GlobalAveragePool": 2}
    assert op_counts(description, "float_ops") == {"ReduceMean": 1}


def test_scales_of_integer_io_are_in_the_file_and_token_ids_are_unchanged(exported, tmp_path):
    description = exported("pools").quantize(tmp_path / "p.onnx", STATIC_INT8, io="int8")
    session = runtime.open(tmp_path / "p.onnx", 1)
    assert [(item["name"], item["dtype"]) for item in description["inputs"]] == [("image", "uint8"), ("signal", "uint8")]
    assert [item["scale"] for item in session.inputs] == [item["scale"] for item in description["inputs"]]
    assert [item["zero_point"] for item in session.outputs] == [item["zero_point"] for item in description["outputs"]]
    assert 0 < description["outputs"][0]["scale"] < 1
    ids = exported("encoder").quantize(tmp_path / "e.onnx", STATIC_INT8, io="int8")
    assert ids["inputs"] == [{"name": "ids", "dtype": "int64", "scale": None, "zero_point": None}]
    assert ids["outputs"][0]["dtype"] == "uint8"


def test_impossible_integer_io_is_refused(exported, tmp_path):
    with pytest.raises(StageError, match="'x' stays float: the op that reads it is not quantized; use quantize.io"):
        exported("gru").quantize(tmp_path / "q.onnx", STATIC_INT8, io="int8")
    with pytest.raises(StageError, match=r'float inputs and outputs; io = "int8" needs a static scheme'):
        exported("mlp").quantize(tmp_path / "q.onnx", DYNAMIC_INT8, io="int8")


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_a_torchscript_module_is_exported(exported, tmp_path):
    model = exported("mlp")
    script = torch.jit.trace(model.module, torch.from_numpy(model.samples[0][0]))
    runtime.export(script, model.specs, tmp_path / "t.onnx")
    assert model.error(tmp_path / "t.onnx") < 1e-6


def test_error_names_an_op_without_an_onnx_version(tmp_path):
    class Median(nn.Module):
        def forward(self, x):
            return x.median(1)[0]

    with pytest.raises(StageError, match=r"torch's ONNX exporter refuses the model: .*aten\.median"):
        runtime.export(Median().eval(), (TensorSpec("x", (1, 6)),), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


class TwoInputs(nn.Module):
    """An op, a layer and a loop-free branch on two inputs, of which one has another type."""

    def __init__(self):
        super().__init__()
        self.linear, self.embedding = nn.Linear(6, 3), nn.Embedding(10, 3)

    def forward(self, a, b):
        return self.linear(a).relu() + self.embedding(b).sum(1)


NAMES = [
    "linear",
    "cat",
    "relu",
    "embedding",
    "self",
    "args",
    "kwargs",
    "input",
    "output",
    "output_",
    "0",
    "1a",
    "x y",
    "größe",
    "名",
    "class",
]
NAMES += [
    "None",
    "return",
    "lambda",
    "forward",
    "onnx::Gemm_0",
    "edgekd_input_0",
    "edgekd_input_1",
    "linear.weight",
    "val_0",
    "a/b:0",
    "x" * 500,
]


@pytest.mark.parametrize("name", ["linear", "output"])
def test_an_input_may_have_the_name_of_an_operation_or_of_the_output(name, tmp_path):
    _check_names(TwoInputs().eval(), tmp_path / "m.onnx", name, "b", export=True)


def test_a_change_of_the_outputs_is_measured_as_a_share_of_their_range(tmp_path):
    torch.manual_seed(0)
    model, specs = nn.Linear(6, 3).eval(), (TensorSpec("x", (1, 6)),)
    runtime.export(model, specs, tmp_path / "a.onnx")
    with torch.no_grad():
        model.bias += torch.tensor([1.0, 0, 0])
    runtime.export(model, specs, tmp_path / "b.onnx")
    samples = [[np.zeros((1, 6), np.float32)], [np.ones((1, 6), np.float32)]]
    span = np.ptp([runtime.open(tmp_path / "a.onnx", 1).run(sample)[0] for sample in samples])
    assert comparison.largest_change(tmp_path / "a.onnx", tmp_path / "a.onnx", samples) == 0
    assert comparison.largest_change(tmp_path / "a.onnx", tmp_path / "b.onnx", samples) == pytest.approx(1 / span, rel=1e-5)


def test_integer_io_that_changes_the_outputs_is_refused(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "largest_change", lambda *_: 0.5)
    with pytest.raises(StageError, match=r'its outputs change by 50 % when .* removed from the graph; use quantize.io = "float32"'):
        exported("mlp").quantize(tmp_path / "q.onnx", STATIC_INT8, io="int8")


def test_optimizations_that_change_the_outputs_are_left_out_with_a_note(exported, tmp_path, monkeypatch):
    changes = iter([0.25, 0.0])
    monkeypatch.setattr(comparison, "largest_change", lambda *_: next(changes))
    scheme = exported("mlp").quantize(tmp_path / "q.onnx", STATIC_INT8)
    assert scheme["notes"] == ["quantized without ONNX Runtime's optimizations, which change the outputs by 25 %"]


def test_an_input_may_have_any_name(tmp_path):
    module = TwoInputs().eval()
    runtime.export(module, (TensorSpec("a", (1, 6)), TensorSpec("b", (1, 4), "int64")), tmp_path / "m.onnx")
    graph = onnx.load(str(tmp_path / "m.onnx")).graph
    values = {name for node in graph.node for name in (*node.input, *node.output)} - {"a", "b", "output"}
    assert len(values) >= 4
    for name in (*NAMES, *values):
        _check_names(module, tmp_path / "m.onnx", name, "other")


def _check_names(module, path, *names, export=False):
    """Check that a model has inputs of these names and returns what the module returns."""
    specs = (TensorSpec(names[0], (1, 6)), TensorSpec(names[1], (1, 4), "int64"))
    if export:
        runtime.export(module, specs, path)
        model = onnx.load(str(path))
    else:
        model = onnx.load(str(path))
        convert._rename(model.graph, dict(zip(("a", "b"), names, strict=True)))
    assert [item.name for item in model.graph.input] == list(names)
    onnx.checker.check_model(model)
    a, b = torch.randn(1, 6), torch.randint(0, 10, (1, 4))
    renamed = path.with_name("renamed.onnx")
    renamed.write_bytes(model.SerializeToString())
    (output,) = runtime.open(renamed, 1).run([a.numpy(), b.numpy()])
    assert np.allclose(output, module(a, b).detach().numpy(), atol=1e-5)


def test_a_rewrite_that_changes_the_outputs_is_undone_with_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr("onnxsim.simplify", lambda proto: (proto, False))
    notes = runtime.export(nn.Linear(6, 3).eval(), (TensorSpec("x", (1, 6)),), tmp_path / "m.onnx")
    assert notes == ("the ONNX file is not simplified: onnxsim changes what it computes",)
    assert runtime.open(tmp_path / "m.onnx", 1).run([np.zeros((1, 6), np.float32)])[0].shape == (1, 3)


@pytest.mark.parametrize("scheme", [STATIC_INT8, DYNAMIC_INT8])
def test_the_range_is_reduced_only_for_x86_without_vnni(scheme):
    assert runtime.variant(scheme, ("avx2",), "x86_64") == {"reduce_range": True}
    assert runtime.variant(scheme, ("avx2", "avx_vnni"), "x86_64") == {}
    assert runtime.variant(scheme, ("avx512f", "avx512_vnni"), "x86_64") == {}
    assert runtime.variant(scheme, ("asimd",), "aarch64") == {}
    assert runtime.variant(FLOAT32, ("avx2",), "x86_64") == {}
