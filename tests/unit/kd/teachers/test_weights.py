# SPDX-License-Identifier: Apache-2.0
"""Weights as users save them are loaded into the module, and what does not fit is named."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn
from torch.nn.utils import parametrizations

from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError
from edgekd.kd.teachers.weights import load_user_weights

ENTRY = EntryPoint("teachers.py", "teacher")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


def net():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))


@pytest.fixture
def trained():
    torch.manual_seed(1)
    module = net()
    module(torch.randn(8, 1, 3, 3))  # statistics of batch norm
    return module.eval()


def is_same(module, other):
    pairs = zip(module.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def load(content, path, module=None):
    module = net() if module is None else module
    torch.save(content, path)
    return module, load_user_weights(module, path, ENTRY)


def refusal(content, path, module=None):
    with pytest.raises(RecipeError) as caught:
        load(content, path, module)
    return "\n".join(caught.value.problems)


def prefixed(weights, prefix):
    return {f"{prefix}{name}": value for name, value in weights.items()}


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "teacher.", "module._orig_mod.", "_orig_mod.module.", "model.module."]
)
def test_a_common_prefix_is_removed(trained, tmp_path, prefix):
    module, (note,) = load(prefixed(trained.state_dict(), prefix), tmp_path / "w.pth")
    assert is_same(module, trained)
    assert "removed" in note


def test_a_compiled_part_inside_is_recognized(trained, tmp_path):
    weights = {
        name.replace("1.", "1._orig_mod.", 1) if name.startswith("1.") else name: value for name, value in trained.state_dict().items()
    }
    module, notes = load(weights, tmp_path / "w.pth")
    assert is_same(module, trained)
    assert notes == ["w.pth: removed '_orig_mod.' from names"]


def test_weights_of_the_inner_module_get_its_prefix(trained, tmp_path):
    outer = nn.ModuleDict({"model": net()})
    _, notes = load(trained.state_dict(), tmp_path / "w.pth", outer)
    assert is_same(outer, trained)
    assert notes == ["w.pth: added the prefix 'model.'"]


def test_the_part_of_a_lightning_module_is_taken(trained, tmp_path):
    weights = {**prefixed(trained.state_dict(), "model."), "criterion.weight": torch.ones(3)}
    module, notes = load({"state_dict": weights, "epoch": 3, "callbacks": {}}, tmp_path / "last.ckpt")
    assert is_same(module, trained)
    assert notes == ["last.ckpt: took the weights from ['state_dict']; removed the prefix 'model.', left out criterion.weight"]


@pytest.mark.parametrize("keys", [("state_dict",), ("model",), ("model_state_dict",), ("ema", "state_dict"), ("anything",)])
def test_weights_in_a_wrapper_are_taken(trained, tmp_path, keys):
    content = trained.state_dict()
    for key in reversed(keys):
        content = {key: content, "epoch": 4, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}}
    module, (note,) = load(content, tmp_path / "w.pth")
    assert is_same(module, trained)
    assert note == f"w.pth: took the weights from {''.join(f'[{key!r}]' for key in keys)}"


def test_entries_beside_the_weights_are_left_out(trained, tmp_path):
    module, notes = load({**trained.state_dict(), "epoch": 7, "optimizer": {"state": {}}}, tmp_path / "w.pth")
    assert is_same(module, trained)
    assert notes == []


def test_several_weights_that_fit_are_listed(trained, tmp_path):
    content = {"model": trained.state_dict(), "ema": net().state_dict()}
    message = refusal(content, tmp_path / "w.pth")
    assert "holds several weights that fit (['model'], ['ema'])" in message
    assert "torch.save(torch.load('w.pth', weights_only=True)['ema'], 'teacher.pth')" in message
    content = {**prefixed(trained.state_dict(), "student."), **prefixed(net().state_dict(), "teacher.")}
    assert "removed the prefix 'student.'" in refusal(content, tmp_path / "w.pth")
    content = {"model": trained.state_dict(), "copy": copy.deepcopy(trained.state_dict())}
    assert is_same(load(content, tmp_path / "w.pth")[0], trained)  # the same twice


def test_a_tied_weight_may_lack_its_second_name(tmp_path):
    torch.manual_seed(1)
    saved, module = Tied(), Tied()
    save_model(saved, str(tmp_path / "w.safetensors"))
    (note,) = load_user_weights(module, tmp_path / "w.safetensors", ENTRY)
    assert torch.equal(module.head.weight, saved.embed.weight)
    assert module.head.weight is module.embed.weight
    assert "is tied to" in note


def test_a_tied_weight_must_not_have_two_values(tmp_path):
    weights = {"embed.weight": torch.zeros(6, 4), "head.weight": torch.ones(6, 4)}
    assert "embed.weight and head.weight are one weight of the module; the file has different ones" in refusal(
        weights, tmp_path / "w.pth", Tied()
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("saved_as", ["old", "new"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_normalized_weights_are_renamed(tmp_path, kind, saved_as, prefix):
    torch.manual_seed(1)
    old, new = (nn.Sequential(nn.ReLU(), getattr(library, kind)(nn.Linear(4, 3))) for library in (nn.utils, parametrizations))
    saved, module = (old, new) if saved_as == "old" else (new, old)
    load(prefixed(saved.state_dict(), prefix), tmp_path / "w.pth", module)
    inputs = torch.randn(5, 4)
    torch.testing.assert_close(module.eval()(inputs), saved.eval()(inputs))


def test_counters_may_be_missing_and_foreign_ones_are_left_out(trained, tmp_path):
    weights = {name: value for name, value in trained.state_dict().items() if "num_batches_tracked" not in name}
    module, _ = load({**weights, "total_ops": torch.zeros(1), "1.total_params": torch.zeros(1)}, tmp_path / "w.pth")
    inputs = torch.randn(2, 1, 3, 3)
    torch.testing.assert_close(module.eval()(inputs), trained(inputs))
    averaged = torch.optim.swa_utils.AveragedModel(trained)
    assert is_same(load(averaged.state_dict(), tmp_path / "w.pth")[0], trained)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_converted(trained, tmp_path, dtype):
    module, _ = load(copy.deepcopy(trained).to(dtype).state_dict(), tmp_path / "w.pth")
    assert module[0].weight.dtype == torch.float32
    assert torch.equal(module[0].weight, trained[0].weight.to(dtype).float())


def test_what_torch_loads_is_loaded(tmp_path):
    class Renaming(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *rest):
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}old_weight")
            super()._load_from_state_dict(state_dict, prefix, *rest)

    weights = {"old_weight": torch.ones(3, 2), "bias": torch.zeros(3)}
    assert torch.equal(load(weights, tmp_path / "w.pth", Renaming(2, 3))[0].weight, torch.ones(3, 2))


def test_what_does_not_fit_is_named_for_the_best_part(trained, tmp_path):
    weights = prefixed(trained.state_dict(), "module.")
    del weights["module.3.bias"]
    assert refusal({"model": weights, "epoch": 1}, tmp_path / "w.pth") == (
        "teachers.py:teacher with w.pth['model'] without the prefix 'module.': the weights lack 3.bias"
    )
    weights = {**trained.state_dict(), "3.weight": torch.zeros(9, 4), "new.bias": torch.zeros(2)}
    assert refusal(weights, tmp_path / "w.pth").splitlines() == [
        "teachers.py:teacher with w.pth: the module has no new.bias",
        "teachers.py:teacher with w.pth: 3.weight has shape [9, 4]; the module's is [3, 4]",
    ]
    assert "holds no weights; expected a state dict" in refusal({"epoch": 3}, tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.zeros(3, dtype=torch.int8), "whole numbers"),
        (torch.zeros(3, dtype=torch.complex64), "complex"),
        (torch.empty(3, device="meta"), "on the meta device, without values"),
        (torch.zeros(3).to_sparse(), "sparse"),
    ],
)
def test_numbers_of_another_kind_are_refused(trained, tmp_path, value, kind):
    message = refusal({**trained.state_dict(), "3.bias": value}, tmp_path / "w.pth")
    assert f"3.bias is {kind}; the module's is floating-point" in message


def test_weights_of_another_precision_in_safetensors(trained, tmp_path):
    save_file(
        {name: value.half() if value.is_floating_point() else value for name, value in trained.state_dict().items()},
        tmp_path / "w.safetensors",
    )
    module = net()
    assert load_user_weights(module, tmp_path / "w.safetensors", ENTRY) == []
    assert torch.equal(module[3].bias, trained[3].bias.half().float())
    assert "teachers" not in sys.modules  # no code of the user is needed
