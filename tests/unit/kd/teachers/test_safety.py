# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import warnings
import zipfile

import pytest
import torch
from torch import nn

from edgekd.errors import RecipeError
from edgekd.kd.teachers import safety
from edgekd.kd.teachers.load import load_teacher

WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
EXAMPLES = "data/sample_inputs/model.pt"
GRAPH = "models/model.json"


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.rnn = nn.GRU(4, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(self.rnn(self.embed(tokens))[0][:, -1])


class Reshaping(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2)
        self.head = nn.Linear(36, 3)
        self.register_buffer("scale", torch.ones(3), persistent=False)

    def forward(self, x, y):
        x = self.conv(x) + torch.einsum("nc,dc->nd", y, torch.ones(4, 2))[:, :, None, None]
        with torch.no_grad():
            x = x / (x.shape[0] * 2 - 1 + x.std())
        return self.head(x.reshape(x.shape[0], -1)) * self.scale + torch.tensor([1.0, 2.0, 3.0])


def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Flatten(), nn.Linear(40, 3)).eval()


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (Recurrent, (torch.ones(4, 6, dtype=torch.int64),)),
        (Reshaping, (torch.ones(4, 1, 8, 8), torch.ones(4, 2))),
        (encoder, (torch.ones(4, 5, 8),)),
    ],
)
@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")  # torch.export warns about the flat weights of a GRU
@pytest.mark.parametrize("dynamic", [True, False])
def test_ordinary_networks_are_accepted_and_run(tmp_path, make, inputs, dynamic):
    inputs = inputs if dynamic else tuple(item[:1] for item in inputs)
    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs) if dynamic else None
    module = make().eval()
    torch.export.save(torch.export.export(module, inputs, dynamic_shapes=shapes), tmp_path / "teacher.pt2")
    teacher = load_teacher(tmp_path, None, tmp_path / "teacher.pt2")
    logits = teacher([item.numpy() for item in inputs])
    torch.testing.assert_close(torch.from_numpy(logits), module(*inputs).detach(), rtol=1e-4, atol=1e-5)


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "teacher.pt2"
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(nn.Linear(4, 3), (torch.zeros(5, 4),), dynamic_shapes=shapes), path)
    return path


def rewrite(path, change, duplicates=()):
    """Write an archive again after ``change`` was called with its records: name without the root folder -> bytes."""
    with zipfile.ZipFile(path) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(records)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")  # on duplicate names
        for name in [*records, *duplicates]:
            archive.writestr(f"teacher/{name}", records[name])


def in_json(name, change):
    def change_records(records):
        content = json.loads(records[name])
        change(content)
        records[name] = json.dumps(content).encode()

    return change_records


def torch_bytes(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def expression(marker):
    def change(graph):
        graph["graph_module"]["graph"]["tensor_values"]["linear"]["sizes"][0]["as_expr"]["expr_str"] = (
            f"__import__('os').mkdir({str(marker)!r}) or 1"
        )

    return change


def assert_refused(path, message):
    with pytest.raises(RecipeError, match=message) as caught:
        load_teacher(path.parent, None, path)
    assert "could run code when it is loaded, so it is refused" in str(caught.value)
    assert "\n" not in str(caught.value)


def torch_runs_payload(path, marker):
    """Return whether torch itself runs the payload: otherwise the test of the refusal would prove nothing."""
    with contextlib.suppress(Exception):  # the error does not matter, only what ran before it
        torch.export.load(path)
    return marker.exists()


def test_an_unchanged_copy_is_accepted(file):
    rewrite(file, lambda _: None)
    assert safety.check_exported_program(file) == file.read_bytes()
    assert load_teacher(file.parent, None, file)


def test_pickled_weights_are_refused(file, tmp_path):
    marker = tmp_path / "ran"

    def change(records):
        in_json(WEIGHTS, lambda table: table["config"]["weight"].update(use_pickle=True))(records)
        records["data/weights/weight_0"] = torch_bytes(Payload(marker))

    rewrite(file, change)
    assert_refused(file, "weight is a pickled object")
    assert not marker.exists()
    assert torch_runs_payload(file, marker)


def test_pickled_constants_are_refused(file, tmp_path):
    marker = tmp_path / "ran"

    def change(records):
        item = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        in_json(CONSTANTS, lambda table: table["config"].update(evil=item))(records)
        records["data/constants/opaque_obj_0"] = pickle.dumps(Payload(marker))

    rewrite(file, change)
    assert_refused(file, "opaque_obj_0")
    assert not marker.exists()
    assert torch_runs_payload(file, marker)


def test_pickled_example_inputs_are_refused(file, tmp_path):
    marker = tmp_path / "ran"
    rewrite(file, lambda records: records.update({EXAMPLES: torch_bytes(((Payload(marker),), {}))}))
    assert_refused(file, "example inputs are a pickle")
    assert not marker.exists()
    assert torch_runs_payload(file, marker)


def test_code_in_a_symbolic_size_is_refused(file, tmp_path):
    marker = tmp_path / "ran"
    rewrite(file, in_json(GRAPH, expression(marker)))
    assert_refused(file, "expr_str")
    assert not marker.exists()
    assert torch_runs_payload(file, marker)


@pytest.mark.parametrize(
    "text",
    ["s1.real", "(lambda: 1)()", "[s1 for s1 in s2]", "print(s1)", "Symbol('os', positive=True)", "Symbol(b's1')", "s1 if s2 else s3", ""],
)
def test_only_arithmetic_is_allowed_in_a_symbolic_size(text):
    assert not safety._is_arithmetic(text)


@pytest.mark.parametrize(
    "text", ["s77", "2*s0 + 1", "Mul(Integer(64), Symbol('s77', positive=True, integer=True))", "FloorDiv(s1, 2)", "-1"]
)
def test_arithmetic_is_accepted(text):
    assert safety._is_arithmetic(text)


@pytest.mark.parametrize(
    "target",
    [
        "torch.os.system",
        "torch.load",
        "_operator.call",
        "torch.ops.load_library",
        "torch.ops.mine.op.default",
        "#ext:x",
        "math.__loader__.x",
    ],
)
def test_operators_that_are_not_allowed_are_refused(file, target):
    rewrite(file, in_json(GRAPH, lambda graph: graph["graph_module"]["graph"]["nodes"][0].update(target=target)))
    assert_refused(file, target)


@pytest.mark.parametrize(
    ("kind", "context"),
    [("collections.defaultdict", '{"default_factory_module": "antigravity"}'), ("builtins.dict", '[{"__enum__": true}]')],
)
def test_trees_that_import_modules_are_refused(file, kind, context):
    spec = json.dumps([1, {"type": kind, "context": context, "children_spec": []}])
    rewrite(file, in_json(GRAPH, lambda graph: graph["graph_module"]["module_call_graph"][0]["signature"].update(in_spec=spec)))
    assert_refused(file, "in_spec")


@pytest.mark.parametrize("name", ["data/aotinductor/model/x.so", "data/weights/model.pt", "models/other.json", "serialized_state_dict.pt"])
def test_records_that_a_network_does_not_need_are_refused(file, name):
    rewrite(file, lambda records: records.update({name: b"x"}))
    assert_refused(file, name)


def test_two_records_with_the_same_name_are_refused(file):
    rewrite(file, lambda _: None, duplicates=[GRAPH])
    assert_refused(file, GRAPH)


def test_names_that_are_code_are_refused(file):
    rewrite(file, in_json(GRAPH, lambda graph: graph["graph_module"]["graph"]["nodes"][0].update(name="x\nimport os")))
    assert_refused(file, "import os")


def test_guards_are_never_evaluated(file, tmp_path):
    marker = tmp_path / "ran"
    rewrite(file, in_json(GRAPH, lambda graph: graph.update(guards_code=[f"__import__('os').mkdir({str(marker)!r})"])))
    logits = load_teacher(tmp_path, None, file)([torch.ones(3, 4).numpy()])
    assert logits.shape == (3, 3)
    assert not marker.exists()


def test_the_older_format_is_refused(tmp_path):
    path = tmp_path / "teacher.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", "8.1")
        archive.writestr("serialized_state_dict.pt", torch_bytes({}))
    with pytest.raises(RecipeError, match=r"torch.export.save of torch 2.9 or later"):
        safety.check_exported_program(path)


@pytest.mark.parametrize("record", [(GRAPH, b"[1"), (GRAPH, b"3"), (WEIGHTS, b"{}"), (WEIGHTS, b'{"config": {"w": 3}}'), (EXAMPLES, b"")])
def test_malformed_tables_are_refused(file, record):
    rewrite(file, lambda records: records.update([record]))
    with pytest.raises(RecipeError, match=r"teacher\.pt2"):
        load_teacher(file.parent, None, file)


@pytest.mark.parametrize("name", [GRAPH, WEIGHTS, CONSTANTS, EXAMPLES])
def test_missing_tables_are_refused(file, name):
    rewrite(file, lambda records: records.pop(name))
    with pytest.raises(RecipeError, match=r"teacher\.pt2"):
        load_teacher(file.parent, None, file)
