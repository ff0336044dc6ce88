# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.kd.losses import features

KINDS = {"attention": (5, 6, 4, 4), "block": (5, 6, 4, 4), "hidden": (5, 7, 6), "hint": (5, 6, 4, 4), "relation": (5, 6)}


def random_tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_zero_for_equal_tensors_and_positive_for_others(kind):
    tensor = random_tensor(*KINDS[kind])
    assert features.FEATURES[kind](tensor, tensor).item() == pytest.approx(0, abs=1e-10)
    assert features.FEATURES[kind](tensor, random_tensor(*KINDS[kind], seed=1)).item() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_correct(kind):
    student, teacher = random_tensor(*KINDS[kind]).double().requires_grad_(), random_tensor(*KINDS[kind], seed=1).double()
    assert torch.autograd.gradcheck(lambda tensor: features.FEATURES[kind](tensor, teacher), student)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"relation"}))
def test_the_batch_size_does_not_matter(kind):
    student, teacher = random_tensor(*KINDS[kind]), random_tensor(*KINDS[kind], seed=1)
    twice = features.FEATURES[kind](torch.cat([student, student]), torch.cat([teacher, teacher]))
    assert twice.item() == pytest.approx(features.FEATURES[kind](student, teacher).item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_converted_to_float32(kind):
    halves = [random_tensor(*KINDS[kind], seed=seed).bfloat16() for seed in (0, 1)]
    loss = features.FEATURES[kind](*halves)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(features.FEATURES[kind](*[item.float() for item in halves]).item(), rel=1e-6)


def test_attention_of_channels_is_that_of_the_paper():
    student, teacher = random_tensor(3, 6, 4, 4).double(), random_tensor(3, 9, 4, 4, seed=1).double()
    maps = []
    for item in (student.numpy(), teacher.numpy()):
        flat = (item**2).sum(1).reshape(3, -1)
        maps.append(flat / np.sqrt((flat**2).sum(1, keepdims=True)))
    expected = ((maps[0] - maps[1]) ** 2).sum(1).mean()
    assert features.attention(student, teacher).item() == pytest.approx(expected, rel=1e-9)


def test_attention_does_not_depend_on_the_scale_or_the_number_of_channels_of_a_map():
    student, teacher = random_tensor(3, 6, 4, 4), random_tensor(3, 9, 4, 4, seed=1)
    expected = features.attention(student, teacher).item()
    assert features.attention(7 * student, teacher).item() == pytest.approx(expected, rel=1e-5)
    assert features.attention(student.repeat(1, 2, 1, 1), teacher).item() == pytest.approx(expected, rel=1e-5)


def test_a_larger_map_is_averaged_to_the_size_of_the_smaller_one():
    coarse = random_tensor(3, 6, 2, 2)
    fine = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    for kind in ("attention", "hint"):
        assert features.FEATURES[kind](fine, coarse).item() == pytest.approx(0, abs=1e-10)
        assert features.FEATURES[kind](coarse, fine).item() == pytest.approx(0, abs=1e-10)


def test_attention_of_heads_is_the_divergence_of_their_means():
    student, teacher = random_tensor(2, 3, 4, 5).softmax(3), random_tensor(2, 8, 4, 5, seed=1).softmax(3)
    student_mean, teacher_mean = student.mean(1), teacher.mean(1)
    expected = (teacher_mean * (teacher_mean.log() - student_mean.log())).sum(2).mean().item()
    assert features.attention(student, teacher, "heads").item() == pytest.approx(expected, rel=1e-5)


def test_masked_attention_gives_no_nan():
    teacher = torch.eye(4)[None, None].repeat(2, 3, 1, 1)
    student = random_tensor(2, 3, 4, 4).softmax(3).requires_grad_()
    loss = features.attention(student, teacher, "heads")
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_hint_and_hidden_and_block_are_mean_squared_differences():
    for kind in ("hint", "hidden", "block"):
        student, teacher = random_tensor(*KINDS[kind]), random_tensor(*KINDS[kind], seed=1)
        expected = ((student - teacher) ** 2).mean().item()
        assert features.FEATURES[kind](student, teacher).item() == pytest.approx(expected, rel=1e-6)


def _relations(points):
    """Return distances and cosines by the equations of the paper, element by element."""
    n = len(points)
    distances = np.array([[np.linalg.norm(points[i] - points[j]) for j in range(n)] for i in range(n)])
    distances /= distances[distances > 0].mean()
    unit = lambda v: v / max(np.linalg.norm(v), 1e-12)  # noqa: E731  (short)
    cosines = np.array(
        [[[unit(points[i] - points[j]) @ unit(points[k] - points[j]) for k in range(n)] for i in range(n)] for j in range(n)]
    )
    return distances, cosines


def test_relation_is_that_of_the_paper():
    student, teacher = random_tensor(5, 6).double(), random_tensor(5, 9, seed=1).double()
    (student_distances, student_angles), (distances, angles) = _relations(student.numpy()), _relations(teacher.numpy())
    huber = lambda a, b: nn.functional.smooth_l1_loss(torch.tensor(a), torch.tensor(b)).item()  # noqa: E731  (short)
    expected = 1.0 * huber(student_distances, distances) + 2.0 * huber(student_angles, angles)
    assert features.relation(student, teacher).item() == pytest.approx(expected, rel=1e-6)
    assert features.relation(student, teacher, 0.0, 3.0).item() == pytest.approx(3.0 * huber(student_angles, angles), rel=1e-6)


def test_relation_does_not_depend_on_translation_rotation_or_scale_of_the_points():
    student, teacher = random_tensor(5, 6), random_tensor(5, 6, seed=1)
    rotation = torch.linalg.qr(random_tensor(6, 6, seed=2))[0]
    expected = features.relation(student, teacher).item()
    assert features.relation(3 * student @ rotation + 5, teacher).item() == pytest.approx(expected, rel=1e-4)


def test_relation_of_equal_samples_has_a_finite_gradient():
    student = torch.ones(4, 6, requires_grad=True)
    loss = features.relation(student, random_tensor(4, 6))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
