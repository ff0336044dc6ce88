# SPDX-License-Identifier: Apache-2.0
import importlib.util
from types import SimpleNamespace

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
from edgekd.kd.training import dry_run, execution, trainer
from edgekd.kd.training.callbacks import Callback
from edgekd.kd.training.execution import DEFAULT_MODE, ExecutionMode, PlannedMode
from edgekd.kd.training.jobs import TrainingJob, TrainingSettings

INPUTS = {"train.inputs.0": "inspect:a", "train.labels": "inspect:b", "code": "inspect:c"}
BFLOAT16 = ExecutionMode("bfloat16")
GPU = {"cuda": "NVIDIA T1"}
CUDA = ExecutionMode(accelerator="cuda", accelerator_name="NVIDIA T1")


def plan(*features, available=None, monkeypatch=None, stage="distill", **options):
    if monkeypatch is not None:
        monkeypatch.setattr(execution, "accelerators", lambda: available or {})
    return execution.plan_execution_mode(stage, Training(1, **options), features, ("m.py:student", 1, "x"), INPUTS)


@pytest.mark.parametrize(("precision", "features"), [("auto", ["avx2"]), ("float32", ["avx512_bf16"])])
def test_where_one_mode_is_possible_there_is_no_autotune(precision, features):
    assert plan(*features, precision=precision, accelerator="none") == PlannedMode(DEFAULT_MODE)


def test_bfloat16_on_request_is_not_timed():
    assert plan(precision="bfloat16", accelerator="none") == PlannedMode(BFLOAT16)


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16"])
def test_a_cpu_with_bfloat16_instructions_times_them_once_for_all_that_is_trained(name):
    planned = plan("sse2", name, accelerator="none")
    (step,) = planned.steps
    assert planned.inputs == {"execution_mode": "distill/autotune:execution_mode.json"}
    assert step.params.modes == (DEFAULT_MODE, BFLOAT16)
    assert not hasattr(step.params, "epochs")  # a longer training needs no new timing
    assert step.inputs == {"train.inputs.0": "inspect:a", "code": "inspect:c"}


def test_an_accelerator_is_timed_beside_the_cpu_or_used_alone_on_request(monkeypatch):
    (step,) = plan("avx2", available=GPU, monkeypatch=monkeypatch).steps
    assert step.params.modes == (DEFAULT_MODE, CUDA, ExecutionMode("bfloat16", "cuda", "NVIDIA T1"))
    requested = plan("avx2", available=GPU, monkeypatch=monkeypatch, accelerator="cuda", precision="float32")
    assert requested == PlannedMode(CUDA)


def test_an_accelerator_that_this_machine_lacks_is_refused(monkeypatch):
    with pytest.raises(UnavailableError, match=r"teacher.train.accelerator: 'mps', and this machine has cuda \(NVIDIA T1\); expected"):
        plan(available=GPU, monkeypatch=monkeypatch, accelerator="mps", stage="teach")
    with pytest.raises(UnavailableError, match="has none that the installed torch can use"):
        plan(monkeypatch=monkeypatch, accelerator="cuda")


def test_accelerators_are_detected_from_files(tmp_path, monkeypatch):
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


def test_a_step_trains_in_the_mode_that_was_chosen(tmp_path):
    execution.write_execution_mode(tmp_path / "execution_mode.json", BFLOAT16)
    settings = TrainingSettings(1, 8, "sgd", 0.1, 0.0, 0, 1)
    assert settings.with_mode({"execution_mode": Artifact(tmp_path / "execution_mode.json", "", 0)}).mode == BFLOAT16
    assert settings.with_mode({}).mode == DEFAULT_MODE


def job(module, **changes):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 4
    inputs = torch.randn(64, 4, generator=generator) + 3 * nn.functional.one_hot(labels, 4)
    samples = Samples((inputs,), labels)
    return TrainingJob(
        section="distill",
        entry=EntryPoint("m.py", "student"),
        build=module,
        train=samples,
        validation=samples,
        objective=lambda logits, _teacher_logits, targets, _epoch: nn.functional.cross_entropy(logits, targets),
        settings=TrainingSettings(8, 16, "adamw", 0.05, 0.0, 0, 1, **changes),
    )


class Watched(nn.Module):
    def __init__(self, dtypes):
        super().__init__()
        self.layer, self.dtypes = nn.Linear(4, 4), dtypes

    def forward(self, inputs):
        logits = self.layer(inputs)
        self.dtypes.add((self.training, logits.dtype))
        return logits


def test_a_step_runs_in_bfloat16_and_weights_and_validation_are_float32(tmp_path):
    dtypes = set()
    weights, curve = trainer.fit(job(lambda: Watched(dtypes), mode=BFLOAT16), tmp_path, lambda *_: None)
    assert dtypes == {(True, torch.bfloat16), (False, torch.float32)}
    assert {value.dtype for value in weights.values()} == {torch.float32}
    (tmp_path / "b").mkdir()
    _, exact = trainer.fit(job(lambda: nn.Sequential(nn.Linear(4, 4))), tmp_path / "b", lambda *_: None)
    assert curve[-1].validation_accuracy == pytest.approx(exact[-1].validation_accuracy, abs=0.03)
    assert curve[-1].validation_accuracy > 0.9


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
    return TrainingJob(
        section="distill",
        entry=EntryPoint("m.py", "student"),
        build=lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)),
        train=samples,
        validation=samples,
        objective=lambda logits, teacher_logits, targets, epoch: losses.total_loss(terms, logits, teacher_logits, targets, epoch),
        settings=TrainingSettings(8, 8, "adamw", 0.05, 0.0, 0, 1, mode=ExecutionMode(accelerator=device)),
        teacher=(lambda: taps.Network("teacher", wide, EntryPoint("m.py", "teacher"))) if tapped else None,
        tapped=tapped,
        auxiliary=sorted({term.teacher for term in terms} - {"frozen"}),
        **changes,
    )


@pytest.mark.usefixtures("_meta")
@pytest.mark.parametrize("kind", sorted(set(LOSSES) - {*TAPPED, "mse_labels"}))
def test_every_loss_of_logits_is_computed_where_the_student_is(kind):
    with deterministic(1):
        dry_run.choose_memory_format(image_job([Loss(kind)], "meta"))


@pytest.mark.parametrize("kind", ["attention", "hint", "relation"])
def test_tapped_losses_and_adapters_are_where_the_student_is(kind):
    with deterministic(1):
        dry_run.choose_memory_format(image_job([Loss(kind, taps=(Tap("0", "0"),)), Loss("kl", teacher="ema"), Loss("ce")], "meta"))


def test_a_tensor_that_stays_behind_is_seen():
    right = image_job([Loss("ce")], "meta")
    wrong = TrainingJob(
        **{name: getattr(right, name) for name in TrainingJob.__slots__ if name != "objective"},
        objective=lambda logits, _teacher_logits, _targets, _epoch: (logits - torch.zeros(8, 3)).mean(),
    )
    with deterministic(1), pytest.raises(RuntimeError, match="device"):
        dry_run.choose_memory_format(wrong)


@pytest.mark.usefixtures("_meta")
@pytest.mark.parametrize("kind", ["kl", "dkd", "dist", "mse", "hint"])
def test_the_distiller_stays_where_the_student_is(kind):
    student, teacher = (nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)).to("meta") for width in (5, 8))
    batch = (torch.randn(6, 4, device="meta"), torch.zeros(6, dtype=torch.long, device="meta"))
    options = {"taps": [{"student": "0", "teacher": "0"}]} if kind == "hint" else {}
    distiller = edgekd.Distiller(student, teacher, [{"kind": kind, **options}, {"kind": "ce"}], example=batch)
    loss = distiller(batch, student(batch[0]))
    loss.backward()
    assert {item.grad.device.type for item in [*student.parameters(), *distiller.parameters()]} == {"meta"}


def test_weights_come_back_from_an_accelerator_and_training_resumes_after_a_kill(tmp_path):
    class KilledError(Exception):
        pass

    class Kill(Callback):
        def after_epoch(self, trainer):
            if len(trainer.curve) == 3:
                raise KilledError

    on_device = job(lambda: nn.Linear(4, 4), mode=ExecutionMode(accelerator="cpu:0"))  # what torch takes for another name of a device
    with pytest.raises(KilledError):
        trainer.fit(on_device, tmp_path, lambda *_: None, [Kill()])
    weights, curve = trainer.fit(on_device, tmp_path, lambda *_: None)
    (tmp_path / "whole").mkdir()
    expected, _ = trainer.fit(on_device, tmp_path / "whole", lambda *_: None)
    assert len(curve) == 8
    assert all(torch.equal(value, expected[name]) and value.device.type == "cpu" for name, value in weights.items())


class WithoutBfloat16(nn.Linear):
    def forward(self, inputs):
        logits = super().forward(inputs)
        if logits.dtype == torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        return logits


def test_a_requested_mode_that_fails_says_why():
    with deterministic(1), pytest.raises(RecipeError, match="not implemented for 'BFloat16'"):
        trainer.epoch_runner(job(lambda: WithoutBfloat16(4, 4), mode=BFLOAT16))
