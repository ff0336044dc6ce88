# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import hashlib

import pytest
import torch
from torch import nn

from edgekd.domain.losses import Loss, Tap
from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError
from edgekd.kd.losses import features, taps

ENTRY = EntryPoint("models.py", "net")


def convolutional(width, *, inplace=False, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=inplace),
        nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(width, 3),
    )


class Attending(nn.Module):
    """A transformer block that returns its attention as a second output."""

    def __init__(self, width, heads, tokens=20):
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.wrapped = WithWeights(self.attention)
        self.head = nn.Linear(width, 3)

    def forward(self, tokens):
        states = self.embed(tokens)
        attended, _ = self.wrapped(states)
        return self.head((states + attended).mean(1))


class WithWeights(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.inner = attention

    def forward(self, states):
        return self.inner(states, states, states, need_weights=True, average_attn_weights=False)


def make_loss(kind, *pairs, **options):
    return Loss(kind, taps=tuple(Tap(*pair) for pair in pairs), **options)


def networks(student, teacher):
    return taps.Network("student", student, ENTRY), taps.Network("teacher", teacher, ENTRY)


def images(count=6, seed=0):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def loss_of(tapped, batch, epoch):
    tapped.run_teacher([batch])
    return tapped.loss(epoch)


def state_digest(module):
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in module.state_dict().values())).hexdigest()


@pytest.mark.parametrize("kind", ["attention", "hint", "relation"])
def test_the_loss_is_that_of_the_tapped_tensors_and_trains_the_student_only(kind):
    student, teacher = convolutional(4).train(), convolutional(6, seed=1)
    before = state_digest(teacher)
    tapped = taps.attach_taps(*networks(student, teacher), [make_loss(kind, ("3", "3"), weight=2.0)], [images()], 0)
    student(images())
    loss = loss_of(tapped, images(), 0)
    loss.backward()
    assert not any(module.training for module in teacher.modules())
    assert state_digest(teacher) == before
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student[0].weight.grad.abs().sum() > 0
    assert student[7].weight.grad is None
    assert (len(tapped.adapters) == 1) == (kind == "hint")
    student.eval()
    with torch.no_grad():
        student(images())
        value = loss_of(tapped, images(), 0)
        tensors = [net[:4](images()) for net in (student, teacher)]
        if kind == "hint":
            assert tapped.adapters["hint_0"].weight.shape == (6, 4, 1, 1)
            tensors[0] = tapped.adapters["hint_0"](tensors[0])
        assert value.item() == pytest.approx(2 * features.FEATURES[kind](*tensors).item(), rel=1e-5)


def test_hidden_states_and_attention_of_a_transformer():
    student, teacher = Attending(8, 2), Attending(16, 4)
    tokens = torch.randint(0, 20, (5, 7))
    losses = [make_loss("hidden", ("embed", "embed")), make_loss("attention", ("wrapped:1", "wrapped:1"), over="heads")]
    tapped = taps.attach_taps(*networks(student, teacher), losses, [tokens], 0)
    student(tokens)
    loss_of(tapped, tokens, 0).backward()
    assert tapped.adapters["hidden_0"].weight.shape == (16, 8)
    assert student.attention.in_proj_weight.grad.abs().sum() > 0


def test_a_block_gets_the_teachers_input_and_only_it_is_trained():
    student, teacher = convolutional(6).train(), convolutional(6, seed=1)
    tapped = taps.attach_taps(*networks(student, teacher), [make_loss("block", ("3", "3"))], [images()], 0)
    student(images())
    loss_of(tapped, images(), 0).backward()
    assert student[3][0].weight.grad.abs().sum() > 0
    assert student[0].weight.grad is None
    student.eval()
    with torch.no_grad():
        student(images())
        block_input = teacher[:3](images())
        assert loss_of(tapped, images(), 0).item() == pytest.approx(
            ((student[3](block_input) - teacher[3](block_input)) ** 2).mean().item(), rel=1e-5
        )


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_block_does_not_mix_the_teachers_activations_into_the_running_statistics(epochs):
    student, teacher = convolutional(6).train(), convolutional(6, seed=1)
    alone = convolutional(6).train()
    with torch.no_grad():
        teacher[1].weight.mul_(50)
    tapped = taps.attach_taps(*networks(student, teacher), [make_loss("block", ("3", "3"))], [images()], 0)
    for epoch in range(epochs):
        student(images())
        loss_of(tapped, images(), epoch).backward()
        alone(images())
    for name, value in alone.named_buffers():
        torch.testing.assert_close(dict(student.named_buffers())[name], value, rtol=0, atol=0)
    block = copy.deepcopy(student[3])
    student(images())
    with torch.no_grad():
        block_input = teacher[:3](images())
        expected = ((block(block_input) - teacher[3](block_input)) ** 2).mean()  # in training mode: statistics of this batch
    assert loss_of(tapped, images(), 0).item() == pytest.approx(expected.item(), rel=1e-5)


class ChangesItsInput(nn.Module):
    """A network that changes its inputs in place, or not."""

    def __init__(self, change, width=4, *, inplace=True):
        super().__init__()
        torch.manual_seed(0)
        self.change, self.inplace = change, inplace
        self.first, self.block = nn.Conv2d(1, width, 3), nn.Sequential(nn.ReLU(inplace=inplace), nn.Conv2d(width, width, 3))
        self.drop, self.head = nn.Dropout2d(0.5, inplace=inplace), nn.Linear(width, 3)

    def forward(self, x):
        x = self.change(x if self.inplace else x.clone())
        return self.head(self.drop(torch.relu(self.block(self.first(x))).add(1)).mean((2, 3)))


def _overwrite(x):
    x[:] = x * 2 + 1
    return x


CHANGES = {
    "sub_": lambda x: x.sub_(0.5).mul_(4),
    "assignment": _overwrite,
    "relu": lambda x: nn.functional.relu(x, inplace=True),
    "zero_": lambda x: x.clone() + 0 * x.zero_(),
    "out": lambda x: torch.mul(x, 3, out=x),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["hint", "block"])
def test_inputs_that_a_network_changes_in_place_are_its_copies(change, kind):
    values = []
    for inplace in (True, False):
        student, teacher = (ChangesItsInput(CHANGES[change], inplace=inplace) for _ in range(2))
        with torch.no_grad():
            teacher.block[1].weight.add_(0.1)
        pairs = {"hint": [("first", "first"), ("block", "block")], "block": [("block", "block"), ("block.1", "block.1")]}[kind]
        tapped = taps.attach_taps(*networks(student, teacher), [make_loss(kind, *pairs)], [images()], 0)
        batch = images()
        student.eval()(batch.clone())
        values.append(loss_of(tapped, batch, 0).item())
        assert torch.equal(batch, images())
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert values[0] > 0


@pytest.mark.parametrize("training", [True, False])
def test_a_tap_is_what_its_module_returned_whatever_changes_that_afterwards(training):
    values = []
    for inplace in (True, False):
        student, teacher = convolutional(4, inplace=inplace).train(training), convolutional(4, inplace=inplace, seed=1)
        tapped = taps.attach_taps(*networks(student, teacher), [make_loss("hint", ("1", "1"))], [images()], 0)
        student(images())
        loss = loss_of(tapped, images(), 0)
        loss.backward()
        values.append((loss.item(), student[0].weight.grad.sum().item()))
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert values[0][0] > 0


def test_a_loss_is_active_in_its_epochs_only():
    student, teacher = convolutional(4), convolutional(4, seed=1)
    tapped = taps.attach_taps(*networks(student, teacher), [make_loss("hint", ("3", "3"), epochs=(2, 3))], [images()], 0)
    assert [tapped.is_active_in(epoch) for epoch in range(4)] == [False, True, True, False]
    for epoch in (1, 2):
        student(images())
        assert loss_of(tapped, images(), epoch).item() > 0


def test_the_mode_and_the_buffers_of_the_student_do_not_change():
    for mode in (True, False):
        student = convolutional(4).train(mode)
        before = state_digest(student)
        taps.attach_taps(*networks(student, convolutional(4)), [make_loss("hint", ("3", "3"))], [images()], 0)
        assert student.training == mode
        assert state_digest(student) == before


def test_the_seed_determines_the_weights_of_the_adapters():
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(weights))
        tapped = taps.attach_taps(*networks(convolutional(4), convolutional(6)), [make_loss("hint", ("3", "3"))], [images()], seed)
        weights.append(tapped.adapters["hint_0"].weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


class CallsTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.unused, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(self.layer(x)))


class ArgMax(nn.Module):
    def forward(self, x):
        return x.flatten(1).argmax(1)


@pytest.mark.parametrize(
    ("student", "kind", "pair", "message"),
    [
        (convolutional(4), "hint", ("33", "3"), r"tap '33' of the student \(models.py:net\): no such module.* it has 0, 1, 2, 3"),
        (convolutional(4), "hint", ("3", "3.9"), r"tap '3.9' of the teacher .*: no such module"),
        (convolutional(4), "hint", ("", "3"), "no such module"),
        (convolutional(4), "hint", ("7", "3"), r"have shapes \[6, 3\] and \[6, 6, 8, 8\]; expected the same number of axes"),
        (convolutional(4), "hidden", ("3", "3"), r"expected \(n, tokens, width\)"),
        (convolutional(4), "attention", ("5", "5"), r"expected \(n, channels, length\) or"),
        (convolutional(4), "block", ("3", "3"), "the student's block cannot take the teacher's input of that block"),
        (convolutional(4), "block", ("0", "0"), "block needs equal shapes"),
    ],
)
def test_wrong_taps_are_reported_before_training(student, kind, pair, message):
    with pytest.raises(RecipeError, match=message):
        taps.attach_taps(*networks(student, convolutional(6)), [make_loss(kind, pair)], [images()], 0)


def test_all_wrong_taps_are_reported_at_once():
    with pytest.raises(RecipeError) as caught:
        taps.attach_taps(*networks(convolutional(4), convolutional(6)), [make_loss("hint", ("a", "b"), ("3", "c"))], [images()], 0)
    assert len(caught.value.problems) == 3


def test_a_module_that_is_called_twice_or_never_is_refused():
    rows = torch.randn(5, 4)
    for name, message in (("layer", "is called 2 times in one forward pass"), ("unused", "is not called in a forward pass")):
        with pytest.raises(RecipeError, match=message):
            taps.attach_taps(*networks(CallsTwice(), CallsTwice()), [make_loss("hint", (name, "head"))], [rows], 0)


def test_a_module_with_several_outputs_or_integers_is_refused():
    tokens = torch.randint(0, 20, (5, 7))
    with pytest.raises(RecipeError, match=r"the module returns 2 outputs; expected one tensor; name one by its number: 'wrapped:0'"):
        taps.attach_taps(*networks(Attending(8, 2), Attending(8, 2)), [make_loss("hidden", ("wrapped", "embed"))], [tokens], 0)
    with pytest.raises(
        RecipeError, match=r"tap 'embed:3' of the student: the module returns one tensor; expected 'embed', without a number"
    ):
        taps.attach_taps(*networks(Attending(8, 2), Attending(8, 2)), [make_loss("hidden", ("embed:3", "embed"))], [tokens], 0)
    integer_networks = [nn.Sequential(nn.Conv2d(1, 2, 3), ArgMax()) for _ in range(2)]
    with pytest.raises(RecipeError, match="the module returns int64; expected floating point numbers"):
        taps.attach_taps(*networks(*integer_networks), [make_loss("hint", ("1", "0"))], [images()], 0)


def test_different_numbers_of_tokens_are_reported():
    class Shorter(Attending):
        def forward(self, tokens):
            return super().forward(tokens[:, 1:])

    tokens = torch.randint(0, 20, (5, 7))
    for kind, path, options in (("hidden", "embed", {}), ("attention", "wrapped:1", {"over": "heads"})):
        with pytest.raises(RecipeError, match="are the vocabularies or lengths different"):
            taps.attach_taps(*networks(Shorter(8, 2), Attending(8, 2)), [make_loss(kind, (path, path), **options)], [tokens], 0)


def test_a_module_that_is_skipped_later_is_reported_and_no_stale_tensor_is_used():
    class Skipping(Attending):
        skip = False

        def forward(self, tokens):
            states = self.embed(tokens)
            return self.head((states if self.skip else states + self.wrapped(states)[0]).mean(1))

    student, tokens = Skipping(8, 2), torch.randint(0, 20, (5, 7))
    tapped = taps.attach_taps(
        *networks(student, Attending(8, 2)), [make_loss("attention", ("wrapped:1", "wrapped:1"), over="heads")], [tokens], 0
    )
    student.skip = True
    student(tokens)
    with pytest.raises(RecipeError, match="tap 'wrapped:1': the module was not called for this batch"):
        loss_of(tapped, tokens, 0)


def test_refused_taps_leave_the_student_unchanged():
    student = convolutional(4).train()
    with pytest.raises(RecipeError):
        taps.attach_taps(*networks(student, convolutional(6)), [make_loss("hidden", ("3", "3"))], [images()], 0)
    assert student.training
    assert not any(module._forward_hooks for module in student.modules())
