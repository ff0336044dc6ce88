# SPDX-License-Identifier: Apache-2.0
"""Every runtime, on real models: exported, quantized, executed; the same bytes wherever that happens."""

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
MAKE = """
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
exec(MAKE)  # noqa: S102  (the same model here and in a process of its own)
SPEC = (TensorSpec("image", (1, 1, 8, 8)),)
SAMPLES = [[np.random.default_rng(i).standard_normal((1, 1, 8, 8)).astype(np.float32)] for i in range(32)]


class Tokens(nn.Module):
    """Two inputs, one of them integers."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(20, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, ids, extra):
        return self.out(torch.tanh(self.embed(ids).mean(1) + self.mix(extra)))


class Largest(nn.Module):
    """The largest answer of each filter, joined: its reduction has axes that are an input in ONNX."""

    def __init__(self):
        super().__init__()
        self.filters = nn.ModuleList(nn.Conv2d(1, 6, size, padding=size // 2) for size in (3, 5))
        self.out = nn.Linear(12, 3)

    def forward(self, image):
        return self.out(torch.cat([torch.relu(item(image)).amax(dim=(2, 3)) for item in self.filters], dim=1))


@pytest.fixture(scope="module", params=RUNTIMES)
def made(request, tmp_path_factory):
    """Return a runtime and its float32 file of the convolutional model."""
    runtime = registry.runtime(request.param)
    path = tmp_path_factory.mktemp(request.param) / f"model.{runtime.FORMAT}"
    runtime.export(conv(), SPEC, path)  # noqa: F821  (made by MAKE)
    return runtime, path


def _answers(runtime, path, samples):
    session = runtime.open(path, 1)
    return np.concatenate([session.run(sample)[0] for sample in samples])


def test_there_are_as_many_as_are_told():
    assert RUNTIMES == ("litert", "onnxruntime")


def test_an_exported_model_answers_as_in_torch(made):
    runtime, path = made
    with torch.inference_mode():
        wanted = conv()(torch.from_numpy(np.concatenate([sample[0] for sample in SAMPLES]))).numpy()  # noqa: F821  (made by MAKE)
    assert np.abs(_answers(runtime, path, SAMPLES) - wanted).max() < 1e-5


def test_exporting_elsewhere_gives_the_same_bytes(made, tmp_path):
    runtime, path = made
    program = MAKE + f"registry.runtime('{runtime.NAME}').export(conv(), (TensorSpec('image', (1, 1, 8, 8)),), Path('m.{runtime.FORMAT}'))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert file_digest(tmp_path / f"m.{runtime.FORMAT}") == file_digest(path)
    assert (done.stdout, done.stderr) == ("", "")
    assert str(tmp_path).encode() not in (tmp_path / f"m.{runtime.FORMAT}").read_bytes()


@pytest.mark.parametrize("scheme", [STATIC_INT8, DYNAMIC_INT8])
def test_a_quantized_model_is_close_and_repeatable_and_lists_what_stays_float(made, tmp_path, scheme):
    runtime, path = made
    first, second = tmp_path / f"a.{runtime.FORMAT}", tmp_path / f"b.{runtime.FORMAT}"
    params = {"scheme": scheme, "io": "float32", **runtime.variant(scheme, ("avx2",), "x86_64")}
    told = runtime.quantize(path, first, params, SAMPLES if scheme == STATIC_INT8 else [])
    runtime.quantize(path, second, params, SAMPLES if scheme == STATIC_INT8 else [])
    assert file_digest(first) == file_digest(second) != file_digest(path)
    wanted, found = _answers(runtime, path, SAMPLES), _answers(runtime, first, SAMPLES)
    assert 0 < np.abs(found - wanted).max() < 0.1 * (wanted.max() - wanted.min())
    assert told["ops"] > 0
    assert all(item["reason"] and item["count"] > 0 for item in told["float_ops"])
    if scheme == STATIC_INT8:
        assert told["float_ops"] == []


def test_integer_inputs_and_outputs_carry_their_scale(made, tmp_path):
    runtime, path = made
    quantized = tmp_path / f"q.{runtime.FORMAT}"
    told = runtime.quantize(path, quantized, {"scheme": STATIC_INT8, "io": "int8"}, SAMPLES)
    session = runtime.open(quantized, 1)
    (edge,), (out,) = told["inputs"], told["outputs"]
    assert session.inputs[0]["dtype"] == edge["dtype"] != "float32"
    limits = np.iinfo(edge["dtype"])
    coded = [[np.clip(np.round(s[0] / edge["scale"]) + edge["zero_point"], limits.min, limits.max).astype(edge["dtype"])] for s in SAMPLES]
    found = (np.concatenate([session.run(s)[0] for s in coded]).astype(np.float32) - out["zero_point"]) * out["scale"]
    wanted = _answers(runtime, path, SAMPLES)
    assert np.abs(found - wanted).max() < 0.1 * (wanted.max() - wanted.min())


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_model_of_two_inputs_one_of_them_integers(name, tmp_path):
    runtime = registry.runtime(name)
    torch.manual_seed(0)
    model = Tokens().eval()
    path, quantized = tmp_path / f"m.{runtime.FORMAT}", tmp_path / f"q.{runtime.FORMAT}"
    runtime.export(model, (TensorSpec("ids", (1, 5), "int64"), TensorSpec("extra", (1, 4))), path)
    made = np.random.default_rng(0)
    samples = [[made.integers(0, 20, (1, 5)), made.standard_normal((1, 4)).astype(np.float32)] for _ in range(16)]
    with torch.inference_mode():
        wanted = np.concatenate([model(*map(torch.from_numpy, sample)).numpy() for sample in samples])
    assert np.abs(_answers(runtime, path, samples) - wanted).max() < 1e-5
    told = runtime.quantize(
        path, quantized, {"scheme": DYNAMIC_INT8, "io": "float32", **runtime.variant(DYNAMIC_INT8, ("avx2",), "x86_64")}, []
    )
    assert told["scheme"] == DYNAMIC_INT8
    assert np.abs(_answers(runtime, quantized, samples) - wanted).max() < 0.1


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_model_of_largest_answers_is_quantized_statically(name, tmp_path):
    runtime = registry.runtime(name)
    torch.manual_seed(0)
    model = Largest().eval()
    path, quantized = tmp_path / f"m.{runtime.FORMAT}", tmp_path / f"q.{runtime.FORMAT}"
    runtime.export(model, SPEC, path)
    runtime.quantize(
        path, quantized, {"scheme": STATIC_INT8, "io": "float32", **runtime.variant(STATIC_INT8, ("avx2",), "x86_64")}, SAMPLES
    )
    with torch.inference_mode():
        wanted = np.concatenate([model(torch.from_numpy(*sample)).numpy() for sample in SAMPLES])
    assert np.abs(_answers(runtime, quantized, SAMPLES) - wanted).max() < 0.1


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_file_that_is_no_model_is_one_clear_error(name, tmp_path):
    runtime = registry.runtime(name)
    path = tmp_path / f"m.{runtime.FORMAT}"
    path.write_bytes(b"no model")
    with pytest.raises(StageError, match=f"m.{runtime.FORMAT}: .* cannot load it"):
        runtime.open(path, 1)


def test_an_op_that_the_exporter_does_not_know_is_named(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveMaxPool2d(1)).eval()
    with pytest.raises(StageError, match=r"litert-torch refuses the model: .*adaptive_max_pool2d"):
        registry.runtime("litert").export(model, SPEC, tmp_path / "m.tflite")


def test_what_converters_say_reaches_neither_stdout_nor_stderr_and_folders_do_not_reach_the_bytes(made, tmp_path):
    runtime, path = made
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
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=tmp_path / "deep" / "er", capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert file_digest(tmp_path / "deep" / "er" / "elsewhere") == file_digest(quantized)


@pytest.mark.parametrize(
    ("name", "modules"), [("litert", ["ai_edge_litert.interpreter", "tflite_runtime"]), ("onnxruntime", ["onnxruntime"])]
)
def test_a_runtime_that_is_missing_tells_how_to_get_it(name, modules, tmp_path, monkeypatch):
    for module in modules:
        for loaded in [loaded for loaded in sys.modules if loaded == module or loaded.startswith(f"{module}.")]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setitem(sys.modules, module, None)
    extra = {"litert": "litert", "onnxruntime": "onnx"}[name]
    with pytest.raises(UnavailableError, match=rf"is not installed; run: pip install 'edgekd\[{extra}\]'"):
        registry.runtime(name).open(tmp_path / "model", 1)
