# SPDX-License-Identifier: Apache-2.0
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.domain.artifact import Artifact
from edgekd.domain.recipe import Entry
from edgekd.errors import RecipeError
from edgekd.kd import precision, probe, train
from edgekd.kd.data import Samples
from edgekd.kd.repeatable import repeatable

PARAMS = {"model": "m.py:student", "batch_size": 8, "optimizer": "sgd", "threads": 1, "instruction_set": "x", "epochs": 3}
INPUTS = {"train.inputs.0": "inspect:a", "train.labels": "inspect:b", "code": "inspect:c"}


def planned(wanted, *features):
    return precision.planned("distill", wanted, features, PARAMS, INPUTS)


@pytest.mark.parametrize(("wanted", "features"), [("auto", ["avx2"]), ("float32", ["avx512_bf16"])])
def test_without_instructions_or_by_wish_nothing_is_tried_and_the_key_stays(wanted, features):
    assert planned(wanted, *features) == {"params": {}, "inputs": {}, "steps": []}


def test_bfloat16_by_wish_is_not_tried():
    assert planned("bfloat16") == {"params": {"precision": "bfloat16"}, "inputs": {}, "steps": []}


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16"])
def test_a_processor_with_instructions_tries_them_once_for_all_that_is_trained(name):
    found = planned("auto", "sse2", name)
    (trial,) = found["steps"]
    assert found["inputs"] == {"precision": "distill/precision:precision.json"}
    assert trial.params["tried"] == [name]
    assert "epochs" not in trial.params  # a longer training asks for no new trial
    assert trial.inputs == {"train.inputs.0": "inspect:a", "code": "inspect:c"}


def test_a_step_trains_in_what_was_chosen(tmp_path):
    (tmp_path / "precision.json").write_text(json.dumps({"precision": "bfloat16"}))
    assert precision.of({}, {"precision": Artifact(tmp_path / "precision.json", "", 0)}) == "bfloat16"
    assert precision.of({"precision": "bfloat16"}, {}) == "bfloat16"
    assert precision.of({}, {}) == "float32"


@pytest.mark.parametrize(
    ("ratios", "expected"), [([1.5] * 9, True), ([1.5] * 8 + [0.2], True), ([1.5] * 7 + [1.0] * 2, False), ([0.0], False)]
)
def test_it_pays_if_it_is_faster_by_enough_in_all_rounds_but_one(ratios, expected):
    assert probe.pays(ratios) == expected


def job(module, **changes):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 4
    inputs = torch.randn(64, 4, generator=generator) + 3 * nn.functional.one_hot(labels, 4)
    samples = Samples((inputs,), labels)
    return train.Job(
        section="distill",
        entry=Entry("m.py", "student"),
        build=module,
        train=samples,
        validation=samples,
        objective=lambda logits, _answers, wanted, _epoch: nn.functional.cross_entropy(logits, wanted),
        settings=train.Settings(8, 16, "adamw", 0.05, 0.0, 0, 1, **changes),
    )


class Watched(nn.Module):
    def __init__(self, seen):
        super().__init__()
        self.layer, self.seen = nn.Linear(4, 4), seen

    def forward(self, inputs):
        found = self.layer(inputs)
        self.seen.add((self.training, found.dtype))
        return found


def test_a_step_runs_in_bfloat16_and_what_is_kept_and_judged_is_float32(tmp_path):
    seen = set()
    weights, curve = train.fit(job(lambda: Watched(seen), precision="bfloat16"), tmp_path, lambda *_: None)
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    assert {value.dtype for value in weights.values()} == {torch.float32}
    (tmp_path / "b").mkdir()
    _, exact = train.fit(job(lambda: nn.Sequential(nn.Linear(4, 4))), tmp_path / "b", lambda *_: None)
    assert train.best_of(curve).validation_accuracy == pytest.approx(train.best_of(exact).validation_accuracy, abs=0.03)
    assert train.best_of(curve).validation_accuracy > 0.9


def tried(folder, monkeypatch, text, ratios=None):
    (folder / "probe_user.py").write_text(text)
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32))
    if ratios is not None:
        monkeypatch.setattr(probe, "raced", lambda _: ratios)
    context = SimpleNamespace(recipe_dir=folder, out=folder, work=folder, progress=lambda *_: None)
    params = {**PARAMS, "model": "probe_user.py:student"}
    found = probe.run("distill", params, {"train.inputs.0": Artifact(folder / "x.npy", "", 0)}, context)
    return json.loads((folder / "precision.json").read_text())["precision"], found


LINEAR = "from torch import nn\ndef student():\n    return nn.Linear(4, 3)\n"
PICKY = """\
import torch
from torch import nn
class Picky(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        if y.dtype == torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        return y
def student():
    return Picky(4, 3)
"""


@pytest.fixture(autouse=True)
def _forget():
    yield
    sys.modules.pop("probe_user", None)


def test_a_trial_takes_turns_and_writes_what_was_chosen(tmp_path, monkeypatch):
    _, found = tried(tmp_path, monkeypatch, LINEAR)
    assert found.notes == (f"probe_user.py:student: bfloat16 is {found.metrics['speed']:.2f} times as fast",)
    assert found.metrics["speed"] > 0
    assert tried(tmp_path, monkeypatch, LINEAR, ratios=[2.0] * 9)[0] == "bfloat16"
    assert tried(tmp_path, monkeypatch, LINEAR, ratios=[0.9] * 9)[0] == "float32"


def test_a_network_that_cannot_run_in_bfloat16_is_trained_in_float32(tmp_path, monkeypatch):
    chosen, found = tried(tmp_path, monkeypatch, PICKY)
    assert (chosen, found.metrics["speed"]) == ("float32", 0.0)
    assert found.notes[0].startswith("warning: probe_user.py:student is trained in float32, since bfloat16 fails: ")


def test_one_that_is_asked_to_says_why_it_cannot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "probe_user.py").write_text(PICKY)
    monkeypatch.syspath_prepend(tmp_path)
    import probe_user

    with repeatable(1), pytest.raises(RecipeError, match="not implemented for 'BFloat16'"):
        train.rehearsal(job(probe_user.student, precision="bfloat16"))
