# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.domain.recipe import TensorSpec
from edgekd.domain.scheme import DYNAMIC_INT8, STATIC_INT8
from edgekd.errors import StageError
from edgekd.runtimes import litert as runtime


class Tokens(nn.Module):
    """Two inputs, one with integers; a product of activations; a cumulative sum, which has no int8 version."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(50, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, ids, extra):
        x = self.embed(ids)
        x = (torch.softmax(x @ x.transpose(1, 2), -1) @ x).mean(1) + torch.tanh(self.mix(extra))
        return self.out(torch.cumsum(x, 1))


class Signal(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv1d(2, 8, 3), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(torch.relu(self.conv(x)).mean(-1))


SIGNAL = (TensorSpec("x", (1, 2, 9)),)
TOKENS = (TensorSpec("ids", (1, 5), "int64"), TensorSpec("extra", (1, 6)))


def _samples(specs, count=48):
    generator = np.random.default_rng(0)
    return [
        [
            generator.standard_normal(spec.shape).astype(np.float32) if spec.dtype == "float32" else generator.integers(0, 50, spec.shape)
            for spec in specs
        ]
        for _ in range(count)
    ]


def _outputs(path, samples):
    session = runtime.open(path, 1)
    return np.concatenate([session.run(sample)[0] for sample in samples])


def _export(build, specs, folder):
    torch.manual_seed(0)
    module, path = build().eval(), folder / "model.tflite"
    runtime.export(module, specs, path)
    return module, path


@pytest.fixture(scope="module")
def signal(tmp_path_factory):
    return _export(Signal, SIGNAL, tmp_path_factory.mktemp("signal"))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return _export(Tokens, TOKENS, tmp_path_factory.mktemp("tokens"))


def _op_counts(description, key):
    return {item["op"]: item["count"] for item in description[key]}


def test_int64_inputs_become_int32_in_the_order_of_the_module(tokens):
    module, path = tokens
    samples = _samples(TOKENS)
    assert [(item["dtype"], item["shape"]) for item in runtime.open(path, 1).inputs] == [("int32", [1, 5]), ("float32", [1, 6])]
    with torch.inference_mode():
        expected = np.concatenate([module(*map(torch.from_numpy, sample)).numpy() for sample in samples])
    assert np.abs(_outputs(path, samples) - expected).max() < 1e-5


def test_ranges_are_the_minimum_and_maximum_over_all_samples(signal, tmp_path):
    samples = _samples(SIGNAL)
    samples[7][0][0, 0, 0] = 40.0
    description = runtime.quantize(signal[1], tmp_path / "q.tflite", {"scheme": STATIC_INT8, "io": "int8"}, samples)
    minimum, maximum = min(sample[0].min() for sample in samples), 40.0
    assert description["inputs"][0]["scale"] == pytest.approx((maximum - minimum) / 255, rel=0.01)
    assert description["calibration_samples"] == 48


@pytest.mark.parametrize(("scheme", "bound"), [(STATIC_INT8, 0.02), (DYNAMIC_INT8, 0.02)])
def test_a_quantized_signal_model_is_close(signal, tmp_path, scheme, bound):
    samples, path = _samples(SIGNAL), tmp_path / "q.tflite"
    description = runtime.quantize(signal[1], path, {"scheme": scheme, "io": "float32"}, samples if scheme == STATIC_INT8 else [])
    expected = _outputs(signal[1], samples)
    assert 1e-5 < np.abs(_outputs(path, samples) - expected).max() / np.ptp(expected) < bound
    assert (description["inputs"][0]["dtype"], description["outputs"][0]["dtype"]) == ("float32", "float32")
    assert _op_counts(description, "integer_ops").items() >= {"CONV_2D": 1, "FULLY_CONNECTED": 1}.items()
    assert _op_counts(description, "float_ops") == ({} if scheme == STATIC_INT8 else {"MEAN": 1})


def test_float_ops_are_listed_with_reasons(tokens, tmp_path):
    samples = _samples(TOKENS)
    description = runtime.quantize(tokens[1], tmp_path / "s.tflite", {"scheme": STATIC_INT8, "io": "float32"}, samples)
    assert description["float_ops"] == [{"op": "CUMSUM", "count": 1, "reason": "AI Edge Quantizer has no int8 version of it"}]
    assert description["ops"] == sum(_op_counts(description, "integer_ops").values()) + 1
    dynamic = runtime.quantize(tokens[1], tmp_path / "d.tflite", {"scheme": DYNAMIC_INT8, "io": "float32"}, [])
    assert _op_counts(dynamic, "integer_ops") == {"FULLY_CONNECTED": 2}
    reasons = {item["op"]: item["reason"] for item in dynamic["float_ops"]}
    assert reasons["BATCH_MATMUL"] == "it has no constant weights"
    assert reasons["TANH"] == "activations stay float in a dynamic scheme"


def test_token_ids_are_unchanged_with_integer_io(tokens, tmp_path):
    description = runtime.quantize(tokens[1], tmp_path / "q.tflite", {"scheme": STATIC_INT8, "io": "int8"}, _samples(TOKENS))
    assert [item["dtype"] for item in description["inputs"]] == ["int32", "int8"]
    assert [item["scale"] is None for item in description["inputs"]] == [True, False]
    assert description["outputs"][0]["dtype"] == "int8"


def test_integer_io_with_a_dynamic_scheme_is_refused(signal, tmp_path):
    with pytest.raises(StageError, match=r'float inputs and outputs; io = "int8" needs a static scheme'):
        runtime.quantize(signal[1], tmp_path / "q.tflite", {"scheme": DYNAMIC_INT8, "io": "int8"}, [])


def test_error_names_an_op_that_cannot_be_lowered(tmp_path):
    class Median(nn.Module):
        def forward(self, x):
            return x.median(2)[0]

    with pytest.raises(StageError, match=r"litert-torch refuses the model: .*aten\.median"):
        runtime.export(Median().eval(), SIGNAL, tmp_path / "m.tflite")


def test_load_error_names_an_op_without_a_kernel(tmp_path):
    class Sort(nn.Module):
        def forward(self, x):
            return x.sort(2)[0]

    runtime.export(Sort().eval(), SIGNAL, tmp_path / "m.tflite")
    with pytest.raises(StageError, match="LiteRT cannot load it: .*STABLEHLO_SORT"):
        runtime.open(tmp_path / "m.tflite", 1)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_torchscript_is_refused(signal, tmp_path):
    script = torch.jit.trace(signal[0], torch.zeros(1, 2, 9))
    with pytest.raises(StageError, match="litert-torch cannot convert TorchScript; save the model with torch.export.save"):
        runtime.export(script, SIGNAL, tmp_path / "m.tflite")


def test_quantization_does_not_depend_on_the_cpu():
    assert runtime.variant(STATIC_INT8, ("avx2",), "x86_64") == {}
    assert runtime.why_unfit(STATIC_INT8, {}, "x86-64-v3") is None
