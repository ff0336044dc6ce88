# SPDX-License-Identifier: Apache-2.0
"""Every runtime exports, quantizes and executes real models; bytes do not depend on the folder or process."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from edgekd import registry
from edgekd.domain.recipe import TensorSpec
from edgekd.domain.scheme import DYNAMIC_INT8, STATIC_INT8
from edgekd.errors import StageError, UnavailableError
from edgekd.store.digests import file_digest

RUNTIMES = registry.names("runtimes")
MODEL = """
import sys, torch
from pathlib import Path
from torch import nn
from edgekd import registry
from edgekd.domain.recipe import TensorSpec
def conv():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8),
                         nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
"""
exec(MODEL)  # noqa: S102  (the same model in this process and in another)
SPEC = (TensorSpec("image", (1, 1, 8, 8)),)
SAMPLES = [[np.random.default_rng(i).standard_normal((1, 1, 8, 8)).astype(np.float32)] for i in range(32)]


class Tokens(nn.Module):
    """Two inputs, one with integers."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(20, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, ids, extra):
        return self.out(torch.tanh(self.embed(ids).mean(1) + self.mix(extra)))


class MaxPooled(nn.Module):
    """The maximum of each filter, concatenated: the axes of ONNX's ReduceMax are an input."""

    def __init__(self):
        super().__init__()
        self.filters = nn.ModuleList(nn.Conv2d(1, 6, size, padding=size // 2) for size in (3, 5))
        self.out = nn.Linear(12, 3)

    def forward(self, image):
        return self.out(torch.cat([torch.relu(item(image)).amax(dim=(2, 3)) for item in self.filters], dim=1))


@pytest.fixture(scope="module", params=RUNTIMES)
def exported(request, tmp_path_factory):
    """Return a runtime and its float32 file of the convolutional model."""
    runtime = registry.runtime(request.param)
    path = tmp_path_factory.mktemp(request.param) / f"model.{runtime.FORMAT}"
    runtime.export(conv(), SPEC, path)  # noqa: F821  (defined by MODEL)
    return runtime, path


def _outputs(runtime, path, samples):
    session = runtime.open(path, 1)
    return np.concatenate([session.run(sample)[0] for sample in samples])


def test_runtimes_are_registered():
    assert RUNTIMES == ("litert", "onnxruntime")


def test_an_exported_model_has_the_outputs_of_torch(exported):
    runtime, path = exported
    with torch.inference_mode():
        expected = conv()(torch.from_numpy(np.concatenate([sample[0] for sample in SAMPLES]))).numpy()  # noqa: F821  (defined by MODEL)
    assert np.abs(_outputs(runtime, path, SAMPLES) - expected).max() < 1e-5


def test_an_export_in_another_folder_gives_the_same_bytes(exported, tmp_path):
    runtime, path = exported
    program = MODEL + f"registry.runtime('{runtime.NAME}').export(conv(), (TensorSpec('image', (1, 1, 8, 8)),), Path('m.{runtime.FORMAT}'))"
    process = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert file_digest(tmp_path / f"m.{runtime.FORMAT}") == file_digest(path)
    assert (process.stdout, process.stderr) == ("", "")
    assert str(tmp_path).encode() not in (tmp_path / f"m.{runtime.FORMAT}").read_bytes()


@pytest.mark.parametrize("scheme", [STATIC_INT8, DYNAMIC_INT8])
def test_quantization_is_close_and_reproducible_and_lists_float_ops(exported, tmp_path, scheme):
    runtime, path = exported
    first, second = tmp_path / f"a.{runtime.FORMAT}", tmp_path / f"b.{runtime.FORMAT}"
    params = {"scheme": scheme, "io": "float32", **runtime.variant(scheme, ("avx2",), "x86_64")}
    description = runtime.quantize(path, first, params, SAMPLES if scheme == STATIC_INT8 else [])
    runtime.quantize(path, second, params, SAMPLES if scheme == STATIC_INT8 else [])
    assert file_digest(first) == file_digest(second) != file_digest(path)
    expected, outputs = _outputs(runtime, path, SAMPLES), _outputs(runtime, first, SAMPLES)
    assert 0 < np.abs(outputs - expected).max() < 0.1 * (expected.max() - expected.min())
    assert description["ops"] > 0
    assert all(item["reason"] and item["count"] > 0 for item in description["float_ops"])
    if scheme == STATIC_INT8:
        assert description["float_ops"] == []


def test_integer_inputs_and_outputs_have_scales(exported, tmp_path):
    runtime, path = exported
    quantized = tmp_path / f"q.{runtime.FORMAT}"
    description = runtime.quantize(path, quantized, {"scheme": STATIC_INT8, "io": "int8"}, SAMPLES)
    session = runtime.open(quantized, 1)
    (tensor_in,), (tensor_out,) = description["inputs"], description["outputs"]
    assert session.inputs[0]["dtype"] == tensor_in["dtype"] != "float32"
    limits = np.iinfo(tensor_in["dtype"])
    quantized_samples = [
        [np.clip(np.round(s[0] / tensor_in["scale"]) + tensor_in["zero_point"], limits.min, limits.max).astype(tensor_in["dtype"])]
        for s in SAMPLES
    ]
    outputs = (np.concatenate([session.run(s)[0] for s in quantized_samples]).astype(np.float32) - tensor_out["zero_point"]) * tensor_out[
        "scale"
    ]
    expected = _outputs(runtime, path, SAMPLES)
    assert np.abs(outputs - expected).max() < 0.1 * (expected.max() - expected.min())


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_model_with_an_integer_and_a_float_input(name, tmp_path):
    runtime = registry.runtime(name)
    torch.manual_seed(0)
    model = Tokens().eval()
    path, quantized = tmp_path / f"m.{runtime.FORMAT}", tmp_path / f"q.{runtime.FORMAT}"
    runtime.export(model, (TensorSpec("ids", (1, 5), "int64"), TensorSpec("extra", (1, 4))), path)
    generator = np.random.default_rng(0)
    samples = [[generator.integers(0, 20, (1, 5)), generator.standard_normal((1, 4)).astype(np.float32)] for _ in range(16)]
    with torch.inference_mode():
        expected = np.concatenate([model(*map(torch.from_numpy, sample)).numpy() for sample in samples])
    assert np.abs(_outputs(runtime, path, samples) - expected).max() < 1e-5
    description = runtime.quantize(
        path, quantized, {"scheme": DYNAMIC_INT8, "io": "float32", **runtime.variant(DYNAMIC_INT8, ("avx2",), "x86_64")}, []
    )
    assert description["scheme"] == DYNAMIC_INT8
    assert np.abs(_outputs(runtime, quantized, samples) - expected).max() < 0.1


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_max_pooled_model_is_quantized_statically(name, tmp_path):
    runtime = registry.runtime(name)
    torch.manual_seed(0)
    model = MaxPooled().eval()
    path, quantized = tmp_path / f"m.{runtime.FORMAT}", tmp_path / f"q.{runtime.FORMAT}"
    runtime.export(model, SPEC, path)
    runtime.quantize(
        path, quantized, {"scheme": STATIC_INT8, "io": "float32", **runtime.variant(STATIC_INT8, ("avx2",), "x86_64")}, SAMPLES
    )
    with torch.inference_mode():
        expected = np.concatenate([model(torch.from_numpy(*sample)).numpy() for sample in SAMPLES])
    assert np.abs(_outputs(runtime, quantized, SAMPLES) - expected).max() < 0.1


@pytest.mark.parametrize("name", RUNTIMES)
def test_an_invalid_file_is_one_clear_error(name, tmp_path):
    runtime = registry.runtime(name)
    path = tmp_path / f"m.{runtime.FORMAT}"
    path.write_bytes(b"not a model")
    with pytest.raises(StageError, match=f"m.{runtime.FORMAT}: .* cannot load it"):
        runtime.open(path, 1)


def test_error_names_an_op_that_the_exporter_does_not_support(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveMaxPool2d(1)).eval()
    with pytest.raises(StageError, match=r"litert-torch refuses the model: .*adaptive_max_pool2d"):
        registry.runtime("litert").export(model, SPEC, tmp_path / "m.tflite")


def test_output_of_converters_is_captured_and_the_folder_does_not_change_the_bytes(exported, tmp_path):
    runtime, path = exported
    quantized = tmp_path / "q"
    runtime.quantize(path, quantized, {"scheme": STATIC_INT8, "io": "int8"}, SAMPLES)
    program = f"""
import sys
from pathlib import Path
import numpy as np
from edgekd import registry
runtime = registry.runtime({runtime.NAME!r})
samples = [[np.random.default_rng(i).standard_normal((1, 1, 8, 8)).astype(np.float32)] for i in range(32)]
runtime.quantize(Path(sys.argv[1]), Path("elsewhere"), {{"scheme": {STATIC_INT8!r}, "io": "int8"}}, samples)
runtime.open(Path("elsewhere"), 1)
"""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    process = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=tmp_path / "deep" / "er", capture_output=True, text=True, check=True
    )
    assert (process.stdout, process.stderr) == ("", "")
    assert file_digest(tmp_path / "deep" / "er" / "elsewhere") == file_digest(quantized)


@pytest.mark.parametrize(
    ("name", "modules"), [("litert", ["ai_edge_litert.interpreter", "tflite_runtime"]), ("onnxruntime", ["onnxruntime"])]
)
def test_error_of_a_missing_runtime_names_the_install_command(name, modules, tmp_path, monkeypatch):
    for module in modules:
        for loaded in [loaded for loaded in sys.modules if loaded == module or loaded.startswith(f"{module}.")]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setitem(sys.modules, module, None)
    extra = {"litert": "litert", "onnxruntime": "onnx"}[name]
    with pytest.raises(UnavailableError, match=rf"is not installed; run: pip install 'edgekd\[{extra}\]'"):
        registry.runtime(name).open(tmp_path / "model", 1)
