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
from edgekd.kd.training import dry_run, loop

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


def samples(count, seed, *, outputs=True):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    images = torch.randn(count, 1, 8, 8, generator=generator) + labels[:, None, None, None]
    teacher = 4 * nn.functional.one_hot(labels, CLASSES) + torch.randn(count, CLASSES, generator=generator)
    return Samples((images,), labels, teacher if outputs else None)


def noise(inputs, generator):
    return tuple(item + 0.1 * torch.randn(item.shape, generator=generator) for item in inputs)


def distilling(logits, answers, labels, _):
    return 0.9 * losses.kl(logits, answers["frozen"], 2.0) + 0.1 * losses.ce(logits, labels)


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
        "settings": loop.TrainingSettings(**settings),
        "augment": noise,
    }
    return loop.TrainingJob(**{**parts, **changes})


def quiet(*_):
    pass


def packed(result):
    weights, curve = result
    return modules.serialize_weights(weights), curve


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_same_job_gives_the_same_bytes_and_learns(tmp_path, optimizer):
    runs = []
    for name in "ab":
        (tmp_path / name).mkdir()
        torch.manual_seed(random.randrange(2**31))
        runs.append(packed(loop.fit(job(optimizer=optimizer), tmp_path / name, quiet)))
    assert runs[0] == runs[1]
    curve = runs[0][1]
    assert [line.epoch for line in curve] == [1, 2, 3, 4]
    assert curve[-1].train_loss < curve[0].train_loss
    assert loop.best_epoch(curve).validation_accuracy > 0.6  # a third by chance


def test_another_seed_gives_other_weights(tmp_path):
    (tmp_path / "b").mkdir()
    assert packed(loop.fit(job(), tmp_path, quiet)) != packed(loop.fit(job(seed=4), tmp_path / "b", quiet))


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
    told = []
    whole = packed(loop.fit(job(optimizer=optimizer), tmp_path / "whole", lambda *line: told.append(line)))
    chosen = random.Random(8)
    for attempt in range(4):
        work = tmp_path / str(attempt)
        work.mkdir()
        for _ in range(3):
            try:
                loop.fit(job(optimizer=optimizer), work, stopping(chosen.randrange(len(told) // 2)))
            except Stop:
                continue
        assert packed(loop.fit(job(optimizer=optimizer), work, quiet)) == whole


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = packed(loop.fit(job(), tmp_path, quiet))
    told = []
    assert packed(loop.fit(job(), tmp_path, lambda *line: told.append(line))) == first
    assert told == []


@pytest.mark.parametrize(
    "damage", [lambda _: b"", lambda whole: whole[: len(whole) // 2], lambda whole: whole[:-300] + b"\0" + whole[-299:]]
)
def test_a_damaged_checkpoint_is_ignored(tmp_path, damage):
    first = packed(loop.fit(job(), tmp_path, quiet))
    path = tmp_path / loop.CHECKPOINT
    path.write_bytes(damage(path.read_bytes()))
    assert packed(loop.fit(job(), tmp_path, quiet)) == first


CHILD = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("parts", sys.argv[1])
parts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parts)
work = Path(sys.argv[2])
print("ready", flush=True)
weights, curve = parts.loop.fit(parts.job(epochs=12), work, lambda share, text: None)
(work / "weights").write_bytes(parts.modules.serialize_weights(weights))
"""


def _kill_and_go_on(tmp_path, times):
    (tmp_path / "whole").mkdir()
    whole, _ = packed(loop.fit(job(epochs=12), tmp_path / "whole", quiet))
    command = [sys.executable, "-c", CHILD, str(Path(__file__)), str(tmp_path)]
    chosen, killed = random.Random(5), 0
    for _ in range(times):
        child = subprocess.Popen(command, stdout=subprocess.PIPE)
        child.stdout.readline()
        before = (tmp_path / loop.CHECKPOINT).stat().st_mtime_ns if (tmp_path / loop.CHECKPOINT).exists() else 0
        patience = chosen.choice([0, 0, 0.002, 0.02])
        while child.poll() is None:  # let it get one epoch further, then kill it at once or a little later
            path = tmp_path / loop.CHECKPOINT
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
    _kill_and_go_on(tmp_path, 3)


@pytest.mark.long
def test_a_process_killed_many_times_ends_in_the_same_bytes(tmp_path):
    for round_ in range(4):
        (tmp_path / str(round_)).mkdir()
        _kill_and_go_on(tmp_path / str(round_), 6)


def test_the_weights_of_the_best_epoch_are_kept(tmp_path):
    hostile = job(learning_rate=0.5, optimizer="sgd", epochs=6, augment=None)
    weights, curve = loop.fit(hostile, tmp_path, quiet)
    module = Noisy()
    module.load_state_dict(weights)
    found = hostile.validation
    with torch.no_grad():
        right = (module.eval()(*found.inputs).argmax(1) == found.labels).float().mean().item()
    best = loop.best_epoch(curve)
    assert right == pytest.approx(best.validation_accuracy)
    assert best.validation_accuracy == max(line.validation_accuracy for line in curve)


def test_equal_accuracies_are_ranked_by_loss_and_equal_losses_by_order():
    def line(epoch, accuracy, loss):
        return loop.EpochResult(epoch, 1.0, 0.9, loss, accuracy, 0.1)

    assert loop.best_epoch([line(1, 0.5, 0.9), line(2, 0.7, 0.8), line(3, 0.7, 0.6), line(4, 0.7, 0.6)]).epoch == 3
    assert loop.best_epoch([line(1, None, 0.9), line(2, None, 0.3), line(3, None, 0.6)]).epoch == 2


def test_global_state_is_as_before(tmp_path):
    torch.manual_seed(11)
    expected = torch.rand(2)
    torch.manual_seed(11)
    threads = torch.get_num_threads()
    loop.fit(job(epochs=1, threads=threads + 1), tmp_path, quiet)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.rand(2), expected)


def test_code_that_views_an_image_trains_in_the_default_layout(tmp_path):
    with pytest.raises(RuntimeError, match="view"):
        Viewing().to(memory_format=torch.channels_last)(torch.randn(4, 1, 8, 8).to(memory_format=torch.channels_last))
    assert dry_run.choose_memory_format(job(build=Viewing)) == torch.contiguous_format
    assert dry_run.choose_memory_format(job()) == torch.channels_last
    _, curve = loop.fit(job(build=Viewing, epochs=6), tmp_path, quiet)
    assert loop.best_epoch(curve).validation_accuracy > 0.6  # a third by chance


def test_a_loss_that_is_not_finite_is_told_with_epoch_and_step(tmp_path):
    with pytest.raises(
        StageError, match=r"distill: the loss is (nan|inf) in epoch \d, step \d of 5; lower distill.learning_rate \(now 1e\+20\)"
    ):
        loop.fit(job(learning_rate=1e20, optimizer="sgd"), tmp_path, quiet)


def test_inputs_that_are_not_finite_on_validation_are_told(tmp_path):
    bad = samples(40, 2)
    bad.inputs[0][7] = float("nan")
    with pytest.raises(StageError, match="the loss is nan on the validation split after epoch 1"):
        loop.fit(job(validation=bad), tmp_path, quiet)


class Counting(nn.Linear):
    def forward(self, x):
        return [x]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Flatten(), "the module has no parameter to train"),  # noqa: PLW0108  (a fresh one each time)
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), "answers with 4 classes; the teacher answers with 3"),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(63, 3)),
            r"models.py.* raised RuntimeError: mat1 and mat2 shapes cannot be multiplied",
        ),
        (lambda: nn.Sequential(nn.Linear(8, 3)), r"answered 8 samples with float32 \[8, 1, 8, 3\]; expected float logits \[8, classes\]"),
        (lambda: Counting(2, 2), "answered with list; expected one tensor of logits"),
    ],
)
def test_a_module_that_cannot_be_trained_is_refused_before_training(tmp_path, build, message):
    with pytest.raises(RecipeError, match=message):
        loop.fit(job(build=build), tmp_path, quiet)


def test_labels_beyond_the_classes_are_refused(tmp_path):
    found = samples(40, 2, outputs=False)
    found.labels[4] = 7
    given = job(
        train=samples(70, 1, outputs=False), validation=found, objective=lambda logits, _answers, labels, _epoch: losses.ce(logits, labels)
    )
    with pytest.raises(RecipeError, match="answers with 3 classes; the validation split has the label 7"):
        loop.fit(given, tmp_path, quiet)


def test_without_classes_the_epoch_is_chosen_by_loss(tmp_path):
    given = job(objective=lambda logits, answers, *_: losses.kl(logits, answers["frozen"], 2.0))
    for split in (given.train, given.validation):
        split.labels[:] = losses.UNLABELLED
    _, curve = loop.fit(given, tmp_path, quiet)
    assert {line.validation_accuracy for line in curve} == {None}
    assert loop.best_epoch(curve).validation_loss == min(line.validation_loss for line in curve)


def test_one_cycle_is_the_schedule_of_torch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.4, total_steps=101, cycle_momentum=False)
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    found = [loop.one_cycle(step, 101, 0.4) for step in range(101)]
    assert max(found) == pytest.approx(0.4, rel=1e-3)
    np.testing.assert_allclose(found, rates, atol=0.02)  # torch counts its first phase one step shorter


def test_batches_are_of_nearly_equal_size_and_cover_all():
    found = loop._batches(torch.arange(129), 64)
    assert [len(rows) for rows in found] == [43, 43, 43]
    assert torch.cat(found).tolist() == list(range(129))
