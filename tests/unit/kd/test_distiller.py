# SPDX-License-Identifier: Apache-2.0
"""The loss in training loops of the user's: plain, with batches by name, with taps, with stored logits."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import edgekd
from edgekd.domain.losses import Loss
from edgekd.errors import RecipeError
from edgekd.kd import losses


def net(width, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 3))


def batch(count=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    return torch.randn(count, 6, generator=generator) + 2 * labels[:, None], labels


@dataclass
class ModelOutput:
    logits: torch.Tensor


class NamedInputs(nn.Module):
    """Like models of the transformers library: inputs by name, an output with ``logits``."""

    def __init__(self, width):
        super().__init__()
        self.embed, self.head = nn.Linear(6, width), nn.Linear(width, 3)

    def forward(self, features, scale=None):
        return ModelOutput(self.head(self.embed(features if scale is None else features * scale).relu()))


def test_the_loss_is_the_weighted_sum_of_its_terms():
    student, teacher, (x, y) = net(8, 0).eval(), net(16, 1), batch()
    distiller = edgekd.Distiller(student, teacher, [{"kind": "kl", "temperature": 2.0, "weight": 0.7}, {"kind": "ce", "weight": 0.3}])
    loss = distiller((x, y), student(x))
    expected = losses.total_loss([Loss("kl", 0.7, temperature=2.0), Loss("ce", 0.3)], student(x), {"frozen": teacher.eval()(x)}, y)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_plain_loop_trains_the_student_and_does_not_change_the_teacher():
    student, teacher, (x, y) = net(8, 0), net(16, 1), batch(256)
    with torch.no_grad():
        teacher[4].weight.copy_(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    terms = [{"kind": "kl", "temperature": 1.0}, {"kind": "hint", "taps": [{"student": "0", "teacher": "0"}]}]
    distiller = edgekd.Distiller(student, teacher, terms, example=(x[:4], y[:4]))
    names = set(student.state_dict())
    optimizer = torch.optim.Adam([*student.parameters(), *distiller.parameters()], 0.02)
    distiller.train()
    curve = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = distiller((x, y), student.train()(x))
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    assert curve[-1] < curve[0] / 3
    assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert set(student.state_dict()) == names
    assert sorted(distiller.state_dict()) == ["adapters.hint_0.bias", "adapters.hint_0.weight"]


def test_batches_by_name_and_outputs_with_logits():
    student, teacher, (x, y) = NamedInputs(8), NamedInputs(16), batch()
    taps = [{"student": "embed", "teacher": "embed"}]
    distiller = edgekd.Distiller(
        student, teacher, [{"kind": "kl"}, {"kind": "relation", "taps": taps}], example={"features": x[:4], "labels": y[:4]}
    )
    inputs = {"features": x, "scale": torch.tensor(2.0), "labels": y}
    outputs = student(features=x, scale=inputs["scale"])
    loss = distiller(inputs, outputs)
    loss.backward()
    assert loss.item() > 0
    assert student.embed.weight.grad is not None
    assert teacher.embed.weight.grad is None
    assert distiller(inputs, {"logits": student(x, inputs["scale"]).logits}).item() == pytest.approx(loss.item(), rel=1e-6)


def test_stored_logits_need_no_teacher():
    student, (x, y) = net(8, 0), batch()
    stored = torch.randn(32, 3)
    distiller = edgekd.Distiller(student)
    as_argument = distiller((x, y), student.eval()(x), teacher_logits=stored)
    in_batch = distiller({"x": x, "labels": y, "teacher_logits": stored}, student.eval()(x))
    assert as_argument.item() == in_batch.item()
    with pytest.raises(RecipeError, match="need a teacher's logits"):
        distiller((x, y), student(x))


def test_labels_that_other_libraries_ignore_do_not_count():
    student, (x, y) = net(8, 0).eval(), batch()
    distiller = edgekd.Distiller(student, None, [{"kind": "ce"}])
    labels = y.clone()
    labels[4:] = -100
    assert distiller((x, labels), student(x)).item() == pytest.approx(distiller((x[:4], y[:4]), student(x[:4])).item(), rel=1e-6)


def test_the_caller_sets_the_epoch():
    student, teacher, (x, y) = net(8, 0), net(16, 1), batch()
    distiller = edgekd.Distiller(student, teacher, [{"kind": "ce", "epochs": [1, 1]}, {"kind": "mse", "epochs": [2, 9]}])
    first = distiller((x, y), student.eval()(x)).item()
    distiller.epoch = 1
    assert first == pytest.approx(losses.ce(student(x), y).item(), rel=1e-6)
    assert distiller(x, student(x)).item() == pytest.approx(losses.mse(student(x), teacher(x)).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([{"kind": "kld"}], r"losses\[0\].kind: 'kld' is not a loss; .*did you mean 'kl'"),
        ([{"kind": "kl", "alpha": 1}], r"losses\[0\]: got an unexpected keyword argument 'alpha'"),
        ([{"weight": 1.0}], "missing 1 required positional argument: 'kind'"),
        ([{"kind": "hard", "temperature": 2.0}], "'hard' has no temperature"),
        ([{"kind": "hint"}], "'hint' matches modules of student and teacher"),
        ([{"kind": "hint", "taps": [{"student": "0", "teacher": "0"}]}], "expected the teacher, and a batch to check them"),
        ([{"kind": "kl", "teacher": "ema"}], "'ema' is a teacher of recipes only"),
    ],
)
def test_wrong_losses_are_reported(terms, message):
    with pytest.raises(RecipeError, match=message):
        edgekd.Distiller(net(8, 0), net(8, 1), terms)


def test_missing_parts_of_a_batch_are_reported():
    student, teacher, (x, _) = net(8, 0), net(16, 1), batch()
    with pytest.raises(RecipeError, match="the losses need labels"):
        edgekd.Distiller(student, teacher)(x, student(x))
    with pytest.raises(RecipeError, match=r"have shapes \[32, 3\] and \[32, 4\]; expected the same classes"):
        edgekd.Distiller(student, None, [{"kind": "kl"}])(x, student(x), teacher_logits=torch.zeros(32, 4))
    with pytest.raises(RecipeError, match="a network returned str; expected logits"):
        edgekd.Distiller(student, teacher, [{"kind": "kl"}])(x, "no")


def test_edgekd_exports_its_public_names():
    assert set(edgekd.__all__) == {"Distiller", "__version__", "build_recipe", "save_teacher_logits"}
    assert all(callable(getattr(edgekd, name)) for name in edgekd.__all__ if name != "__version__")
    with pytest.raises(AttributeError, match="has no attribute 'Destiller'"):
        edgekd.Destiller  # noqa: B018  (the lookup is tested)
