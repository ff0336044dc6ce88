# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from edgekd.domain.recipe import EntryPoint
from edgekd.kd import data, views

AUGMENT = """\
import torch
scale = torch.nn.Parameter(torch.tensor(2.0))
def augment(x, generator):
    return x.mul_(scale)
"""


def test_a_view_has_no_gradient_and_leaves_the_stored_samples_alone(tmp_path):
    (tmp_path / "augment.py").write_text(AUGMENT)
    augment = views.load_augmentation(tmp_path, EntryPoint("augment.py", "augment"))
    stored = torch.arange(6.0).reshape(3, 2).numpy()
    (view,) = data.make_view(views.ViewOptions(augment), "train", [stored], 0)
    assert view.tolist() == [[0, 2], [4, 6], [8, 10]]
    assert stored.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_a_mixed_view_is_the_samples_plus_a_share_of_their_partners():
    inputs = torch.randn(600, 3, 2), torch.randn(600)
    options = views.ViewOptions(mixup=0.4)
    mixture = views.draw_mixture(options, "train", 600, 1)
    first, second = views.make_view(options, "train", inputs, 1)
    rows = mixture.shares[:, None, None]
    torch.testing.assert_close(first, rows * inputs[0] + (1 - rows) * inputs[0][mixture.partners])
    torch.testing.assert_close(second, mixture.shares * inputs[1] + (1 - mixture.shares) * inputs[1][mixture.partners])
    assert mixture.partners.sort().values.tolist() == list(range(600))
    assert (float(mixture.shares.min()), float(mixture.shares.max())) == pytest.approx((0.5, 1), abs=0.03)


def test_the_shares_of_a_mixture_follow_the_beta_distribution():
    shares = views.draw_mixture(views.ViewOptions(mixup=1.0), "train", 20_000, 1).shares
    assert float(shares.mean()) == pytest.approx(0.75, abs=0.005)  # alpha = 1: uniform from 0.5 to 1
    assert float(shares.var()) == pytest.approx(1 / 48, rel=0.03)


def test_mixtures_depend_on_split_and_number_and_the_first_view_is_not_mixed():
    options, inputs = views.ViewOptions(mixup=1.0), (torch.randn(40, 2),)
    drawn = [views.make_view(options, split, inputs, number)[0] for split, number in (("train", 1), ("train", 2), ("unlabelled", 1))]
    assert not any(torch.equal(first, second) for first, second in zip(drawn, [*drawn[1:], drawn[0]], strict=True))
    assert torch.equal(views.make_view(options, "train", inputs, 1)[0], drawn[0])
    assert torch.equal(views.make_view(options, "train", inputs, 0)[0], inputs[0])


def test_samples_are_augmented_before_they_are_mixed():
    options = views.ViewOptions(lambda inputs, _: tuple(item + 1 for item in inputs), mixup=1.0)
    (view,) = views.make_view(options, "train", (torch.zeros(5, 2),), 3)
    assert view.unique().tolist() == [1]
