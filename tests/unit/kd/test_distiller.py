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
        ([{"kind": "kl", "alpha": 1}], r"losses\[0\].alpha: unknown key; "),
        ([{"weight": 1.0}], r"losses\[0\].kind: missing; expected one of attention, block"),
        ([{"kind": "kl", "temperature": 0}], r"losses\[0\].temperature: 0 is out of range; expected a number from 0.01 to 1000"),
        ([{"kind": "kl", "temperature": float("nan")}], r"losses\[0\].temperature: nan; expected "),
        ([{"kind": "ce"}, {"kind": "kl", "weight": -1}], r"losses\[1\].weight: -1 is out of range; expected more than 0"),
        ([{"kind": "kl", "weight": "auto"}], r"losses\[0\]: a value is 'auto', which a search chooses in recipes only"),
        ([{"kind": "kl", "temperature": "auto"}], r"losses\[0\]: a value is 'auto'"),
        ([{"kind": "kl", "temperature": "2"}], r"losses\[0\].temperature: '2'; expected a number"),
        ([{"kind": "ce", "label_smoothing": 2}], r"losses\[0\].label_smoothing: 2 is out of range; expected a number from 0 to 1"),
        ([{"kind": "ce"}, {"kind": "ce"}], r"losses\[1\].kind: 'ce' occurs twice"),
        ([{"kind": "ce", "epochs": (3, 1)}], r"losses\[0\].epochs: \[3, 1\]; expected the first and the last epoch"),
        ([{"kind": "mse_labels"}, {"kind": "ce"}], r"losses\[1\].kind: 'ce' compares classes, 'mse_labels' numbers"),
        ([], "losses: are empty"),
        (["kl"], r"losses\[0\]: 'kl'; expected a table"),
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


def tokens(count=6, length=5, classes=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(count, length, classes, generator=generator) for _ in range(2))
    labels = torch.randint(0, classes, (count, length), generator=generator)
    labels[0, 3:], labels[1, 1:] = -100, -1
    return student, teacher, labels


@pytest.mark.parametrize("kind", ["kl", "dkd", "hard", "ce", "mse", "dist"])
def test_each_token_is_a_row_and_padding_does_not_count(kind):
    logits, teacher_logits, labels = tokens()
    distiller = edgekd.Distiller(nn.Identity(), None, [{"kind": kind}])
    loss = distiller({"labels": labels}, logits, teacher_logits=teacher_logits)
    has_label = labels >= 0
    rows = losses.total_loss([Loss(kind)], logits[has_label], {"frozen": teacher_logits[has_label]}, labels[has_label])
    assert loss.item() == pytest.approx(rows.item(), rel=1e-6)
    garbage = teacher_logits.clone()
    garbage[~has_label] = 1e4
    assert distiller({"labels": labels}, logits, teacher_logits=garbage).item() == loss.item()


def test_the_softmax_of_tokens_is_over_the_vocabulary():
    logits, teacher_logits, labels = tokens(length=7)  # as many tokens as classes: no shape tells the axes apart
    labels = labels.clamp(min=0)
    log_student, log_teacher = torch.log_softmax(logits / 2, -1), torch.log_softmax(teacher_logits / 2, -1)
    expected = 4 * (log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean()
    distiller = edgekd.Distiller(nn.Identity(), None, [{"kind": "kl", "temperature": 2.0}])
    assert distiller((logits, labels), logits, teacher_logits=teacher_logits).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_mask_or_the_attention_mask_selects_tokens():
    logits, teacher_logits, labels = tokens()
    distiller = edgekd.Distiller(nn.Identity(), None, [{"kind": "kl"}])
    mask = labels >= 0
    expected = losses.total_loss([Loss("kl")], logits[mask], {"frozen": teacher_logits[mask]}, labels[mask]).item()
    by_attention = distiller({"x": logits, "attention_mask": mask.long()}, logits, teacher_logits=teacher_logits)
    by_mask = distiller(logits, logits, teacher_logits=teacher_logits, mask=mask)
    assert by_attention.item() == pytest.approx(expected, rel=1e-6)
    assert by_mask.item() == pytest.approx(expected, rel=1e-6)
    nothing = distiller(logits, logits.requires_grad_(), teacher_logits=teacher_logits, mask=torch.zeros_like(mask))
    nothing.backward()
    assert nothing.item() == 0
    assert logits.grad.abs().max() == 0
    with pytest.raises(RecipeError, match=r"the mask has shape \[6\], the logits \[6, 5, 7\]; expected \[6, 5\]"):
        distiller(logits, logits, teacher_logits=teacher_logits, mask=mask[:, 0])


def test_numbers_below_minus_one_are_numbers():
    outputs, labels = torch.zeros(4, 1), torch.tensor([[-5.0], [-1.0], [3.0], [-100.0]])
    distiller = edgekd.Distiller(nn.Identity(), None, [{"kind": "mse_labels"}])
    assert distiller((outputs, labels), outputs).item() == pytest.approx((25 + 1 + 9 + 10_000) / 4)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 3, 2]), "a label is 3; expected 0 to 2 for 3 classes, or -1 or -100 for none"),
        (torch.tensor([0, 1, -2, 2]), "a label is -2; expected 0 to 2"),
        (torch.tensor([0.0, 1.0, 2.0, 1.0]), "labels are float32; expected class ids, int64"),
        (torch.tensor([True, False, True, False]), "labels are bool; expected class ids"),
        (torch.tensor([[0], [1], [2], [1]]), r"labels have shape \[4, 1\], the logits \[4, 3\]; expected labels \[4\]"),
        (torch.eye(3)[[0, 1, 2, 1]], r"labels have shape \[4, 3\]"),
    ],
)
def test_labels_that_are_no_classes_of_the_logits_are_refused(labels, message):
    logits = torch.zeros(4, 3)
    with pytest.raises(RecipeError, match=message):
        edgekd.Distiller(nn.Identity(), None, [{"kind": "ce"}])((logits, labels), logits)


def test_one_class_and_integers_are_refused():
    with pytest.raises(RecipeError, match=r"the logits have shape \[4, 1\], one class"):
        edgekd.Distiller(nn.Identity(), None, [{"kind": "kl"}])(torch.zeros(4, 1), torch.zeros(4, 1), teacher_logits=torch.zeros(4, 1))
    with pytest.raises(RecipeError, match=r"the logits are int64 \[4, 3\]; expected floating point"):
        edgekd.Distiller(nn.Identity(), None, [{"kind": "ce"}])((torch.zeros(4), torch.zeros(4).long()), torch.zeros(4, 3).long())


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(x.sub_(1).mul_(4))


@pytest.mark.parametrize("tapped", [True, False])
def test_neither_network_changes_the_batch_of_the_other(tapped):
    torch.manual_seed(0)
    student, teacher, (x, y) = InPlace(), InPlace(), batch()
    before = x.clone()
    taps = [{"kind": "hint", "taps": [{"student": "layer", "teacher": "layer"}]}] if tapped else []
    distiller = edgekd.Distiller(student, teacher, [{"kind": "mse"}, *taps], example=(x[:4], y[:4]))
    loss = distiller((x, y), student(x))
    student_output, teacher_output = (network.layer((before - 1) * 4) for network in (student, teacher))
    expected = (student_output - teacher_output).square().mean() * (2 if tapped else 1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(x, before)
