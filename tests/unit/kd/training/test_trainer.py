# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError, StageError
from edgekd.kd import losses, modules
from edgekd.kd.data import Samples
from edgekd.kd.training import callbacks, dry_run, trainer
from edgekd.kd.training.jobs import TrainingJob, TrainingSettings

ENTRY = EntryPoint("models.py", "student")
CLASSES = 3


class Noisy(nn.Module):
    """Draws from every generator there is, and has batch statistics: what a resumed run must get right."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x):
        if self.training:
            x = x * (1 + 0.01 * random.random() + 0.01 * np.random.rand())  # noqa: NPY002  (as user code does)
        return self.head(self.body(x))


class Viewing(Noisy):
    def forward(self, x):
        return self.head(self.body[:5](x).view(len(x), 24))


def samples(count, seed, *, with_teacher=True):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    images = torch.randn(count, 1, 8, 8, generator=generator) + labels[:, None, None, None]
    teacher = 4 * nn.functional.one_hot(labels, CLASSES) + torch.randn(count, CLASSES, generator=generator)
    return Samples((images,), labels, teacher if with_teacher else None)


def noise(inputs, generator):
    return tuple(item + 0.1 * torch.randn(item.shape, generator=generator) for item in inputs)


def distilling(logits, teacher_logits, labels, _):
    return 0.9 * losses.kl(logits, teacher_logits["frozen"], 2.0) + 0.1 * losses.ce(logits, labels)


def job(**changes):
    settings = {"epochs": 4, "batch_size": 16, "optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.01, "seed": 3, "threads": 1}
    settings |= {name: changes.pop(name) for name in list(changes) if name in settings}
    parts = {
        "section": "distill",
        "entry": ENTRY,
        "build": Noisy,
        "train": samples(70, 1),
        "validation": samples(40, 2),
        "objective": distilling,
        "settings": TrainingSettings(**settings),
        "augment": noise,
    }
    return TrainingJob(**{**parts, **changes})


def no_progress(*_):
    pass


def serialized(result):
    weights, curve = result
    return modules.serialize_weights(weights), curve


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_same_job_gives_the_same_bytes_and_learns(tmp_path, optimizer):
    runs = []
    for name in "ab":
        (tmp_path / name).mkdir()
        torch.manual_seed(random.randrange(2**31))
        runs.append(serialized(trainer.fit(job(optimizer=optimizer), tmp_path / name, no_progress)))
    assert runs[0] == runs[1]
    curve = runs[0][1]
    assert [line.epoch for line in curve] == [1, 2, 3, 4]
    assert curve[-1].train_loss < curve[0].train_loss
    assert curve[-1].validation_accuracy > 0.6  # a third by chance


def test_another_seed_gives_other_weights(tmp_path):
    (tmp_path / "b").mkdir()
    assert serialized(trainer.fit(job(), tmp_path, no_progress)) != serialized(trainer.fit(job(seed=4), tmp_path / "b", no_progress))


class Stop(BaseException):
    """As little expected as a kill."""


def stopping(after):
    calls = []

    def progress(share, _):
        assert 0 <= share <= 1
        calls.append(share)
        if len(calls) > after:
            raise Stop

    return progress


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_that_stops_anywhere_ends_in_the_same_bytes(tmp_path, optimizer):
    (tmp_path / "whole").mkdir()
    reports = []
    whole = serialized(trainer.fit(job(optimizer=optimizer), tmp_path / "whole", lambda *report: reports.append(report)))
    chosen = random.Random(8)
    for attempt in range(4):
        work = tmp_path / str(attempt)
        work.mkdir()
        for _ in range(3):
            try:
                trainer.fit(job(optimizer=optimizer), work, stopping(chosen.randrange(len(reports) // 2)))
            except Stop:
                continue
        assert serialized(trainer.fit(job(optimizer=optimizer), work, no_progress)) == whole


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = serialized(trainer.fit(job(), tmp_path, no_progress))
    reports = []
    assert serialized(trainer.fit(job(), tmp_path, lambda *report: reports.append(report))) == first
    assert reports == []


@pytest.mark.parametrize(
    "damage", [lambda _: b"", lambda whole: whole[: len(whole) // 2], lambda whole: whole[:-300] + b"\0" + whole[-299:]]
)
def test_a_damaged_checkpoint_is_ignored(tmp_path, damage):
    first = serialized(trainer.fit(job(), tmp_path, no_progress))
    path = tmp_path / callbacks.CHECKPOINT
    path.write_bytes(damage(path.read_bytes()))
    assert serialized(trainer.fit(job(), tmp_path, no_progress)) == first


CHILD = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("parts", sys.argv[1])
parts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parts)
work = Path(sys.argv[2])
print("ready", flush=True)
weights, curve = parts.trainer.fit(parts.job(epochs=12), work, lambda share, text: None)
(work / "weights").write_bytes(parts.modules.serialize_weights(weights))
"""


def _kill_and_resume(tmp_path, times):
    (tmp_path / "whole").mkdir()
    whole, _ = serialized(trainer.fit(job(epochs=12), tmp_path / "whole", no_progress))
    command = [sys.executable, "-c", CHILD, str(Path(__file__)), str(tmp_path)]
    chosen, killed = random.Random(5), 0
    for _ in range(times):
        child = subprocess.Popen(command, stdout=subprocess.PIPE)
        child.stdout.readline()
        before = (tmp_path / callbacks.CHECKPOINT).stat().st_mtime_ns if (tmp_path / callbacks.CHECKPOINT).exists() else 0
        patience = chosen.choice([0, 0, 0.002, 0.02])
        while child.poll() is None:  # let it get one epoch further, then kill it at once or a little later
            path = tmp_path / callbacks.CHECKPOINT
            if path.exists() and path.stat().st_mtime_ns != before:
                time.sleep(patience)
                os.kill(child.pid, signal.SIGKILL)
                break
            time.sleep(0.001)
        killed += child.wait() == -signal.SIGKILL
        child.stdout.close()
        if (tmp_path / "weights").exists():
            break
    assert killed >= 2
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "weights").read_bytes() == whole


def test_a_killed_process_ends_in_the_same_bytes(tmp_path):
    _kill_and_resume(tmp_path, 3)


@pytest.mark.long
def test_a_process_killed_many_times_ends_in_the_same_bytes(tmp_path):
    for round_ in range(4):
        (tmp_path / str(round_)).mkdir()
        _kill_and_resume(tmp_path / str(round_), 6)


class Snapshots(callbacks.Callback):
    def __init__(self):
        self.weights = []

    def after_epoch(self, trainer):
        self.weights.append({name: value.clone() for name, value in trainer.module.state_dict().items()})


def test_the_result_is_the_weights_after_the_last_epoch(tmp_path):
    snapshots = Snapshots()
    weights, curve = trainer.fit(job(learning_rate=0.5, optimizer="sgd", epochs=4, augment=None), tmp_path, no_progress, [snapshots])
    same = [all(torch.equal(weights[name], value) for name, value in snapshot.items()) for snapshot in snapshots.weights]
    assert same == [False, False, False, True]
    assert len(curve) == 4


def test_global_state_is_as_before(tmp_path):
    torch.manual_seed(11)
    expected = torch.rand(2)
    torch.manual_seed(11)
    threads = torch.get_num_threads()
    trainer.fit(job(epochs=1, threads=threads + 1), tmp_path, no_progress)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.rand(2), expected)


def test_code_that_views_an_image_trains_in_the_default_memory_format(tmp_path):
    with pytest.raises(RuntimeError, match="view"):
        Viewing().to(memory_format=torch.channels_last)(torch.randn(4, 1, 8, 8).to(memory_format=torch.channels_last))
    assert dry_run.choose_memory_format(job(build=Viewing)) == torch.contiguous_format
    assert dry_run.choose_memory_format(job()) == torch.channels_last
    _, curve = trainer.fit(job(build=Viewing, epochs=6), tmp_path, no_progress)
    assert curve[-1].validation_accuracy > 0.6  # a third by chance


def test_a_loss_that_is_not_finite_is_reported_with_epoch_and_step(tmp_path):
    with pytest.raises(
        StageError, match=r"distill: the loss is (nan|inf) in epoch \d, step \d of 5; lower distill.learning_rate \(now 1e\+20\)"
    ):
        trainer.fit(job(learning_rate=1e20, optimizer="sgd"), tmp_path, no_progress)


def test_inputs_that_are_not_finite_on_validation_are_reported(tmp_path):
    bad = samples(40, 2)
    bad.inputs[0][7] = float("nan")
    with pytest.raises(StageError, match="the loss is nan on the validation split after epoch 1"):
        trainer.fit(job(validation=bad), tmp_path, no_progress)


class Counting(nn.Linear):
    def forward(self, x):
        return [x]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Flatten(), "the module has no parameter to train"),  # noqa: PLW0108  (a fresh one each time)
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), "has 4 classes; the teacher has 3"),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(63, 3)),
            r"models.py.* raised RuntimeError: mat1 and mat2 shapes cannot be multiplied",
        ),
        (lambda: nn.Sequential(nn.Linear(8, 3)), r"returned float32 \[8, 1, 8, 3\] for 8 samples; expected float logits \[8, classes\]"),
        (lambda: Counting(2, 2), "returned list; expected one tensor of logits"),
    ],
)
def test_a_module_that_cannot_be_trained_is_refused_before_training(tmp_path, build, message):
    with pytest.raises(RecipeError, match=message):
        trainer.fit(job(build=build), tmp_path, no_progress)


def test_labels_beyond_the_classes_are_refused(tmp_path):
    validation = samples(40, 2, with_teacher=False)
    validation.labels[4] = 7
    wrong = job(
        train=samples(70, 1, with_teacher=False),
        validation=validation,
        objective=lambda logits, _teacher_logits, labels, _epoch: losses.ce(logits, labels),
    )
    with pytest.raises(RecipeError, match="has 3 classes; the validation split has the label 7"):
        trainer.fit(wrong, tmp_path, no_progress)


def test_without_classes_there_is_no_accuracy(tmp_path):
    unlabelled = job(objective=lambda logits, teacher_logits, *_: losses.kl(logits, teacher_logits["frozen"], 2.0))
    for split in (unlabelled.train, unlabelled.validation):
        split.labels[:] = losses.UNLABELLED
    _, curve = trainer.fit(unlabelled, tmp_path, no_progress)
    assert {line.validation_accuracy for line in curve} == {None}
    assert curve[-1].validation_loss < curve[0].validation_loss


def test_one_cycle_is_the_schedule_of_torch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.4, total_steps=101, cycle_momentum=False)
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    ours = [trainer.one_cycle(step, 101, 0.4) for step in range(101)]
    assert max(ours) == pytest.approx(0.4, rel=1e-3)
    np.testing.assert_allclose(ours, rates, atol=0.02)  # torch counts its first phase one step shorter


def test_batches_are_of_nearly_equal_size_and_cover_all():
    batches = trainer._batches(torch.arange(129), 64)
    assert [len(rows) for rows in batches] == [43, 43, 43]
    assert torch.cat(batches).tolist() == list(range(129))
