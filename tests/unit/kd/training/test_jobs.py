# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.domain.losses import Loss
from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError
from edgekd.kd import data, losses
from edgekd.kd.data import Samples
from edgekd.kd.output_spec import OutputSpec
from edgekd.kd.soft_targets import storage
from edgekd.kd.training import jobs
from edgekd.kd.training.trainer import fit
from tests.stored import store

STEPS = 200
TERMS = [Loss("kl", 0.9, temperature=2.0), Loss("ce", 0.1)]


def teacher():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10)).eval()


def student():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


class Online(Samples):
    """Samples with the teacher in the loop: it runs on each batch."""

    def pick(self, rows):
        batch = super().pick(rows)
        with torch.no_grad():
            return Samples(batch.inputs, batch.labels, teacher()(*batch.inputs))


def test_stored_soft_targets_train_as_the_teacher_itself_does(tmp_path):
    """Dense float16 against a teacher in the loop: the losses of 200 steps are equal to 1e-3."""
    generator = torch.Generator().manual_seed(0)
    images, labels = 3 * torch.randn(512, 1, 8, 8, generator=generator), torch.randint(0, 10, (512,), generator=generator)
    with torch.no_grad():
        logits = teacher()(images)
    store(tmp_path / "a.safetensors", logits.numpy()[None])
    soft_targets = torch.from_numpy(storage.open_soft_targets(tmp_path / "a.safetensors").read(0, range(512)))
    assert 0 < (soft_targets - logits).abs().max() < 0.01
    curves = []
    for kind, teacher_logits in ((Samples, soft_targets), (Online, logits)):
        values = []

        def objective(student_logits, teacher_logits, labels, epoch, values=values):
            loss = losses.total_loss(TERMS, student_logits, teacher_logits, labels, epoch)
            if student_logits.requires_grad and len(labels) == 32:
                values.append(loss.item())
            return loss

        samples = kind((images,), labels, teacher_logits)
        settings = jobs.TrainingSettings(13, 32, "adamw", 0.003, 0.01, 0, 1)
        work = tmp_path / kind.__name__
        work.mkdir()
        fit(
            jobs.TrainingJob("distill", EntryPoint("m.py", "student"), student, samples, samples, objective, settings),
            work,
            lambda *_: None,
        )
        curves.append(np.array(values[:STEPS]))
    assert len(curves[0]) == len(curves[1]) == STEPS
    assert curves[0][-10:].mean() < curves[0][:10].mean() / 1.5
    assert np.abs(curves[0] - curves[1]).max() < 1e-3


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([Loss("mse")], "'mse' needs all logits, and soft targets of 1000 classes are stored as samples"),
        ([Loss("hard")], "'hard' needs all logits"),
        ([Loss("kl", standardize=True)], "'kl' needs all logits"),
        ([Loss("kl", temperature=1.0), Loss("dkd", temperature=2.0)], "several temperatures"),
    ],
)
def test_losses_that_need_all_logits_are_refused_on_a_sample_of_them(terms, message):
    with pytest.raises(RecipeError, match=message):
        jobs._check_sampled(terms, OutputSpec(), 1000)


def test_losses_that_a_sample_is_enough_for_are_not_refused():
    jobs._check_sampled([Loss("kl", temperature=2.0), Loss("ce"), Loss("mse", teacher="ema")], OutputSpec(), 1000)
    assert jobs._temperature([Loss("ce"), Loss("dist", temperature=3.0)]) == 3.0
    assert jobs._temperature([Loss("ce")]) == 1.0


def test_sampled_soft_targets_teach(tmp_path):
    """Of 300 classes, samples are stored: the loss against them is, in the mean, that against all logits."""
    logits = 2 * np.random.default_rng(0).standard_normal((1, 64, 300)).astype(np.float32)
    store(tmp_path / "a.safetensors", logits)
    soft_targets = storage.open_soft_targets(tmp_path / "a.safetensors")
    sampled = data.SampledSoftTargets(((soft_targets, 0),), 1.0)[torch.arange(64)]
    student_logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gradients = []
    for teacher_logits in (sampled, torch.from_numpy(logits[0])):
        losses.kl(student_logits, teacher_logits, 1.0).backward()
        gradients.append(student_logits.grad.clone())
        student_logits.grad = None
    assert torch.isfinite(gradients[0]).all()
    similarity = torch.nn.functional.cosine_similarity(gradients[0].flatten(), gradients[1].flatten(), dim=0)
    assert similarity > 0.8
