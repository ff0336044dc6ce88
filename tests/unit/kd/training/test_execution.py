# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import edgekd
from edgekd.domain.artifact import Artifact
from edgekd.domain.losses import LOSSES, TAPPED, Loss, Tap
from edgekd.domain.recipe import EntryPoint, Training
from edgekd.errors import RecipeError, UnavailableError
from edgekd.kd import losses
from edgekd.kd.data import Samples
from edgekd.kd.losses import taps
from edgekd.kd.reproducible import deterministic
from edgekd.kd.training import autotune, dry_run, execution, loop
from edgekd.kd.training.execution import ExecutionMode

PARAMS = {"model": "m.py:student", "batch_size": 8, "optimizer": "sgd", "threads": 1, "instruction_set": "x", "epochs": 3}
INPUTS = {"train.inputs.0": "inspect:a", "train.labels": "inspect:b", "code": "inspect:c"}
BFLOAT16 = ExecutionMode("bfloat16")
GPU = {"cuda": "NVIDIA T1"}


@pytest.fixture(autouse=True)
def _forget():
    yield
    sys.modules.pop("probe_user", None)


def planned(*features, here=None, monkeypatch=None, stage="distill", **wanted):
    if monkeypatch is not None:
        monkeypatch.setattr(execution, "accelerators", lambda: here or {})
    return execution.plan_execution_mode(stage, Training(1, **wanted), features, PARAMS, INPUTS)


@pytest.mark.parametrize(("precision", "features"), [("auto", ["avx2"]), ("float32", ["avx512_bf16"])])
def test_where_one_way_is_open_nothing_is_tried_and_the_key_stays(precision, features):
    assert planned(*features, precision=precision, accelerator="none") == {"params": {}, "inputs": {}, "steps": []}


def test_bfloat16_by_wish_is_not_tried():
    found = planned(precision="bfloat16", accelerator="none")
    assert found == {"params": {"precision": "bfloat16"}, "inputs": {}, "steps": []}


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16"])
def test_a_processor_with_instructions_tries_them_once_for_all_that_is_trained(name):
    found = planned("sse2", name, accelerator="none")
    (step,) = found["steps"]
    assert found["inputs"] == {"execution_mode": "distill/autotune:execution_mode.json"}
    assert step.params["tried"] == [{}, {"precision": "bfloat16"}]
    assert "epochs" not in step.params  # a longer training asks for no new trial
    assert step.inputs == {"train.inputs.0": "inspect:a", "code": "inspect:c"}


def test_an_accelerator_is_tried_beside_the_processor_or_alone_where_it_is_asked_for(monkeypatch):
    (step,) = planned("avx2", here=GPU, monkeypatch=monkeypatch)["steps"]
    cuda = {"accelerator": "cuda", "name": "NVIDIA T1"}
    assert step.params["tried"] == [{}, cuda, {"precision": "bfloat16", **cuda}]
    asked = planned("avx2", here=GPU, monkeypatch=monkeypatch, accelerator="cuda", precision="float32")
    assert asked == {"params": cuda, "inputs": {}, "steps": []}


def test_an_accelerator_that_is_not_here_is_refused(monkeypatch):
    with pytest.raises(UnavailableError, match=r"teacher.train.accelerator: 'mps', and this machine has cuda \(NVIDIA T1\); expected"):
        planned(here=GPU, monkeypatch=monkeypatch, accelerator="mps", stage="teach")
    with pytest.raises(UnavailableError, match="has none that the installed torch can use"):
        planned(monkeypatch=monkeypatch, accelerator="cuda")


def test_accelerators_are_found_in_files(tmp_path, monkeypatch):
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    spec = SimpleNamespace(origin=str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(execution, "find_spec", lambda _: spec)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for number in range(2):
        folder = tmp_path / "proc/driver/nvidia/gpus" / f"0000:0{number}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text("Model: \t\t NVIDIA T1\nIRQ:   	 24\n")
    assert execution.accelerators(str(tmp_path)) == {}  # a torch for the processor alone
    (tmp_path / "torch" / "lib" / "libtorch_cuda.so").touch()
    assert execution.accelerators(str(tmp_path)) == GPU
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert execution.accelerators(str(tmp_path)) == {}


def test_the_torch_here_agrees_with_what_its_files_say():
    assert importlib.util.find_spec("torch") is not None
    assert ("cuda" in execution.accelerators()) == torch.cuda.is_available()


def test_a_step_trains_in_what_was_chosen(tmp_path):
    (tmp_path / "execution_mode.json").write_text(json.dumps({"precision": "bfloat16"}))
    assert execution.execution_mode_of({}, {"execution_mode": Artifact(tmp_path / "execution_mode.json", "", 0)}) == BFLOAT16
    assert execution.execution_mode_of({"precision": "bfloat16"}, {}) == BFLOAT16
    assert execution.execution_mode_of({"epochs": 3}, {}) == ExecutionMode()


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([[3.0] * 9, [2.0] * 9], 1),
        ([[3.0] * 9, [2.0] * 8 + [9.0]], 1),
        ([[3.0] * 9, [2.0] * 7 + [3.0] * 2], 0),
        ([[3.0] * 9, [2.0] * 9, [1.9] * 9], 1),
        ([[3.0] * 9, [2.9] * 9, [2.0] * 9], 2),
        ([[3.0] * 9], 0),
    ],
)
def test_a_way_is_taken_if_it_is_faster_by_enough_in_all_rounds_but_one(seconds, expected):
    tried = [ExecutionMode(), BFLOAT16, ExecutionMode(accelerator="cuda")]
    assert autotune.fastest(dict(zip(tried, seconds, strict=False))) == tried[expected]


def job(module, **changes):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 4
    inputs = torch.randn(64, 4, generator=generator) + 3 * nn.functional.one_hot(labels, 4)
    samples = Samples((inputs,), labels)
    return loop.TrainingJob(
        section="distill",
        entry=EntryPoint("m.py", "student"),
        build=module,
        train=samples,
        validation=samples,
        objective=lambda logits, _answers, wanted, _epoch: nn.functional.cross_entropy(logits, wanted),
        settings=loop.TrainingSettings(8, 16, "adamw", 0.05, 0.0, 0, 1, **changes),
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
    weights, curve = loop.fit(job(lambda: Watched(seen), mode=BFLOAT16), tmp_path, lambda *_: None)
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    assert {value.dtype for value in weights.values()} == {torch.float32}
    (tmp_path / "b").mkdir()
    _, exact = loop.fit(job(lambda: nn.Sequential(nn.Linear(4, 4))), tmp_path / "b", lambda *_: None)
    assert loop.best_epoch(curve).validation_accuracy == pytest.approx(loop.best_epoch(exact).validation_accuracy, abs=0.03)
    assert loop.best_epoch(curve).validation_accuracy > 0.9


@pytest.fixture
def _meta():
    """torch's meta device holds no numbers, and refuses tensors of another device beside its own, as an accelerator does."""
    from torch.fx.experimental import _config

    with _config.patch(meta_nonzero_assume_all_nonzero=True):
        yield


def image_job(terms, device, **changes):
    labels = torch.arange(16) % 3
    samples = Samples((torch.randn(16, 1, 8, 8),), labels, torch.randn(16, 3))
    wide = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3))
    tapped = [term for term in terms if term.kind in TAPPED]
    return loop.TrainingJob(
        section="distill",
        entry=EntryPoint("m.py", "student"),
        build=lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)),
        train=samples,
        validation=samples,
        objective=lambda logits, answers, wanted, epoch: losses.total_loss(terms, logits, answers, wanted, epoch),
        settings=loop.TrainingSettings(8, 8, "adamw", 0.05, 0.0, 0, 1, mode=ExecutionMode(accelerator=device)),
        teacher=(lambda: taps.Network("teacher", wide, EntryPoint("m.py", "teacher"))) if tapped else None,
        tapped=tapped,
        selves=sorted({term.teacher for term in terms} - {"frozen"}),
        **changes,
    )


@pytest.mark.usefixtures("_meta")
@pytest.mark.parametrize("kind", sorted(set(LOSSES) - {*TAPPED, "squared"}))
def test_every_loss_of_answers_is_computed_where_the_student_is(kind):
    with deterministic(1):
        dry_run.choose_memory_format(image_job([Loss(kind)], "meta"))


@pytest.mark.parametrize("kind", ["attention", "hint", "relation"])
def test_tapped_losses_and_adapters_are_where_the_student_is(kind):
    with deterministic(1):
        dry_run.choose_memory_format(image_job([Loss(kind, taps=(Tap("0", "0"),)), Loss("kl", teacher="ema"), Loss("ce")], "meta"))


def test_a_tensor_that_stays_behind_is_seen():
    lost = image_job([Loss("ce")], "meta")
    wrong = loop.TrainingJob(
        **{name: getattr(lost, name) for name in loop.TrainingJob.__slots__ if name != "objective"},
        objective=lambda logits, _answers, _wanted, _epoch: (logits - torch.zeros(8, 3)).mean(),
    )
    with deterministic(1), pytest.raises(RuntimeError, match="device"):
        dry_run.choose_memory_format(wrong)


@pytest.mark.usefixtures("_meta")
@pytest.mark.parametrize("kind", ["kl", "dkd", "dist", "mse", "hint"])
def test_the_distiller_stays_where_the_student_is(kind):
    student, teacher = (nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)).to("meta") for width in (5, 8))
    batch = (torch.randn(6, 4, device="meta"), torch.zeros(6, dtype=torch.long, device="meta"))
    own = {"taps": [{"student": "0", "teacher": "0"}]} if kind == "hint" else {}
    distiller = edgekd.Distiller(student, teacher, [{"kind": kind, **own}, {"kind": "ce"}], example=batch)
    loss = distiller(batch, student(batch[0]))
    loss.backward()
    assert {item.grad.device.type for item in [*student.parameters(), *distiller.parameters()]} == {"meta"}


def test_weights_come_back_from_an_accelerator_and_go_on_after_a_kill(tmp_path):
    class KilledError(Exception):
        pass

    def kill(line, _):
        if line.epoch == 3:
            raise KilledError

    given = job(lambda: nn.Linear(4, 4), mode=ExecutionMode(accelerator="cpu:0"))  # what torch takes for another name of a device
    with pytest.raises(KilledError):
        loop.fit(given, tmp_path, lambda *_: None, kill)
    weights, curve = loop.fit(given, tmp_path, lambda *_: None)
    (tmp_path / "whole").mkdir()
    expected, _ = loop.fit(given, tmp_path / "whole", lambda *_: None)
    assert len(curve) == 8
    assert all(torch.equal(value, expected[name]) and value.device.type == "cpu" for name, value in weights.items())


def tried(folder, text, *others):
    (folder / "probe_user.py").write_text(text)
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32))
    context = SimpleNamespace(recipe_dir=folder, out=folder, work=folder, progress=lambda *_: None)
    params = {**PARAMS, "model": "probe_user.py:student", "tried": [{}, *(mode.to_dict() for mode in others)]}
    found = autotune.choose_execution_mode("distill", params, {"train.inputs.0": Artifact(folder / "x.npy", "", 0)}, context)
    return ExecutionMode(**json.loads((folder / "execution_mode.json").read_text())), found


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


def test_a_trial_takes_turns_and_writes_what_was_chosen(tmp_path, monkeypatch):
    _, found = tried(tmp_path, LINEAR, BFLOAT16, ExecutionMode(accelerator="cpu:0", name="it"))
    assert set(found.metrics["speeds"]) == {"bfloat16", "float32 on cpu:0 (it)"}
    assert min(found.metrics["speeds"].values()) > 0
    (note,) = found.notes
    assert note.startswith("probe_user.py:student: bfloat16 is ")
    assert " times as fast as float32; it is trained in " in note
    for fast, expected in ((2.0, BFLOAT16), (0.9, ExecutionMode())):
        monkeypatch.setattr(
            autotune, "time_interleaved", lambda blocks, fast=fast: {mode: [1 / (fast if mode == BFLOAT16 else 1)] * 9 for mode in blocks}
        )
        assert tried(tmp_path, LINEAR, BFLOAT16)[0] == expected


@pytest.mark.parametrize(
    ("text", "mode", "why"),
    [(PICKY, BFLOAT16, "not implemented for 'BFloat16'"), (LINEAR, ExecutionMode(accelerator="cuda", name="T1"), "CUDA|NVIDIA")],
)
def test_a_way_that_fails_is_left_out_with_a_warning(tmp_path, text, mode, why):
    if mode.accelerator == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    chosen, found = tried(tmp_path, text, mode)
    assert (chosen, found.metrics["speeds"]) == (ExecutionMode(), {})
    (note,) = found.notes
    assert note.startswith(f"warning: probe_user.py:student is not trained in {mode}, which fails: ")
    assert any(part in note for part in why.split("|"))


def test_one_that_is_asked_to_says_why_it_cannot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "probe_user.py").write_text(PICKY)
    monkeypatch.syspath_prepend(tmp_path)
    import probe_user

    with deterministic(1), pytest.raises(RecipeError, match="not implemented for 'BFloat16'"):
        loop.epoch_runner(job(probe_user.student, mode=BFLOAT16))
