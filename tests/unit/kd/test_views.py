# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

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
    (view,) = data.make_view(augment, "train", [stored], 0)
    assert view.tolist() == [[0, 2], [4, 6], [8, 10]]
    assert stored.tolist() == [[0, 1], [2, 3], [4, 5]]
