# SPDX-License-Identifier: Apache-2.0
"""Threads, memory formats and padding: how the stage ``soft_targets`` runs a teacher, and that its logits are those of the plain one."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from edgekd.domain.artifact import Artifact
from edgekd.domain.recipe import Data, Distill, EntryPoint, Recipe, Student, Teacher, TensorSpec
from edgekd.kd import modules
from edgekd.kd.output_spec import OutputSpec
from edgekd.kd.training.execution import ExecutionMode
from edgekd.ports import Context
from edgekd.stages import soft_targets
from tests.stored import stored

CODE = """
import threading, time
import torch
from torch import nn

RUNS = []  # of each batch: the module, torch's threads, the input's shape, whether an image was in channels-last

def note(module, x):
    in_channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    RUNS.append((id(module), torch.get_num_threads(), tuple(x.shape), in_channels_last))

class Stateful(nn.Module):  # a thread that ran this module at the same time would change its hidden states
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.utils.weight_norm(nn.Linear(8, 3))
    def forward(self, x):
        note(self, x)
        self.hidden = self.first(x)
        time.sleep(0.001)
        return self.last(self.hidden.relu())

class Locked(Stateful):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        self.head = nn.Linear(64, 3)
    def forward(self, x):
        note(self, x)
        return self.head(self.layers(x).flatten(1))

class Viewing(Images):
    def forward(self, x):
        note(self, x)
        return self.head(self.layers(x).view(len(x), -1))

class ByStride(Images):
    def forward(self, x):
        return super().forward(x) + x.stride(1)

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.mixer, self.head = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 3)
    def forward(self, ids, mask):
        note(self, ids)
        return self.pool(torch.tanh(self.mixer(self.words(ids))), mask)
    def pool(self, states, mask):
        weights = mask.unsqueeze(2).float()
        return self.head((states * weights).sum(1) / weights.sum(1))

class PoolsPadding(Tokens):
    def pool(self, states, mask):
        return self.head(states.mean(1))

class Fixed(Tokens):
    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 20, 8))
    def pool(self, states, mask):
        return super().pool(states + self.positions, mask)  # one state is added to all positions

class Flat(Tokens):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(20 * 8, 3)
    def pool(self, states, mask):
        return self.head((states * mask.unsqueeze(2)).flatten(1))
"""
COUNT = 300


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "user_layouts.py").write_text(CODE)
    for name in ("work", "out"):
        (tmp_path / name).mkdir()
    yield tmp_path
    sys.modules.pop("user_layouts", None)


def run(folder, network, arrays, threads=1):
    """Run the stage; return its notes, the logits of the train split, the runs of the teacher, and its logits for whole rows."""
    entry = EntryPoint("user_layouts.py", network)
    torch.manual_seed(1)
    module = modules.build_module(folder, entry).eval()
    modules.save_weights(module, folder / "teacher.safetensors")
    inputs = {"teacher": Artifact(folder / "teacher.safetensors", "", 0)}
    for split, count in {"train": len(arrays[0]), "validation": 8, "unlabelled": 0}.items():
        for index, array in enumerate(arrays):
            np.save(folder / f"{split}.{index}.npy", array[:count])
            inputs[f"{split}.inputs.{index}"] = Artifact(folder / f"{split}.{index}.npy", "", 0)
    np.save(folder / "labels.npy", np.zeros((8, 2)))
    inputs["validation.labels"] = Artifact(folder / "labels.npy", "", 0)
    specs = tuple(TensorSpec(f"x{index}", (1, *array.shape[1:]), array.dtype.name) for index, array in enumerate(arrays))
    recipe = Recipe(1, "t", Data(entry), Teacher(entry, "teacher.safetensors"), Student(entry, specs), Distill(epochs=1, threads=threads))
    [step] = soft_targets.steps(recipe, [])
    runs = sys.modules["user_layouts"].RUNS
    runs.clear()
    result = soft_targets.run(step, inputs, Context(folder, folder / "out", folder / "work", lambda *_: None))
    done = list(runs)
    with torch.no_grad():
        expected = module(*map(torch.from_numpy, arrays)).numpy()
    [logits] = stored(folder / "out" / "train.soft_targets.safetensors")
    notes = [note for note in result.notes if " runs " in note]
    return notes, logits, done, expected


def vectors():
    return [np.random.default_rng(1).standard_normal((COUNT, 4)).astype(np.float32)]


def images():
    return [np.random.default_rng(1).standard_normal((COUNT, 2, 8, 8)).astype(np.float32)]


def tokens(full_rows=0):
    """Return ids and attention masks of rows of 1 to 10 tokens, and of some of 20."""
    generator = np.random.default_rng(1)
    lengths = generator.integers(1, 11, COUNT)
    lengths[:full_rows] = 20
    mask = (np.arange(20) < lengths[:, None]).astype(np.int64)
    return [generator.integers(1, 50, (COUNT, 20)) * mask, mask]


def test_batches_run_in_as_many_threads_as_the_recipe_says_and_the_bytes_are_those_of_one_thread(folder):
    written = {}
    for threads in (1, 3):
        notes, logits, runs, expected = run(folder, "Stateful", vectors(), threads)
        assert notes == []
        assert len({module for module, *_ in runs}) == threads
        assert {torch_threads for _, torch_threads, *_ in runs} == {1}
        np.testing.assert_allclose(logits, expected, rtol=2e-3, atol=1e-3)
        written[threads] = (folder / "out" / "train.soft_targets.safetensors").read_bytes()
    assert written[1] == written[3]


def test_a_module_that_cannot_be_copied_runs_in_one_thread(folder):
    [note], logits, runs, expected = run(folder, "Locked", vectors(), threads=2)
    assert note.startswith("warning: the teacher runs in one thread, not in 2: ")
    assert "copying what Locked() made raised TypeError: cannot pickle '_thread.lock' object" in note
    assert len({module for module, *_ in runs}) == 1
    np.testing.assert_allclose(logits, expected, rtol=2e-3, atol=1e-3)


def test_images_are_run_in_channels_last_where_the_logits_are_the_same(folder):
    notes, logits, runs, expected = run(folder, "Images", images(), threads=2)
    assert notes == []
    assert [in_channels_last for *_, in_channels_last in runs] == [False] + [True] * (len(runs) - 1)  # the first one to compare with
    np.testing.assert_allclose(logits, expected, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(("network", "why"), [("Viewing", "view size is not compatible"), ("ByStride", "its logits differ by ")])
def test_code_that_depends_on_the_memory_format_runs_in_the_default_one(folder, network, why):
    [note], logits, runs, expected = run(folder, network, images())
    assert note.startswith("warning: the teacher runs in the default memory format, not in channels-last")
    assert why in note
    assert not runs[-1][-1]
    np.testing.assert_allclose(logits, expected, rtol=2e-3, atol=1e-3)


def test_tokens_are_run_without_padding_in_batches_of_similar_length(folder):
    notes, logits, runs, expected = run(folder, "Tokens", tokens(full_rows=30))
    assert notes == []
    lengths = [shape[1] for _, _, shape, _ in runs if shape[0] == soft_targets.BATCH_SIZE][1:]
    assert lengths == [20, 9, 7, 5]  # 30 rows of 20 tokens in the first batch; the rest of 300 - 4 * 64 rows is of 3 or fewer
    np.testing.assert_allclose(logits, expected, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(("side", "accelerator", "size"), [(4, "cpu", 64), (64, "cpu", 21), (224, "cpu", 8), (224, "cuda", 128)])
def test_a_batch_of_large_samples_is_small_on_a_cpu(side, accelerator, size):
    params = soft_targets.SoftTargetParams(None, None, 1, None, OutputSpec(), "auto", ExecutionMode(accelerator=accelerator), "")
    assert soft_targets._batch_size(params, [np.zeros((1, 3, side, side), np.float32)]) == size


@pytest.mark.parametrize(
    ("network", "why"),
    [("PoolsPadding", "its logits differ by "), ("Fixed", "its logits differ by "), ("Flat", "user_layouts.py:72: Flat() raised ")],
)
def test_padding_stays_where_the_logits_depend_on_it(folder, network, why):
    notes, logits, runs, expected = run(folder, network, tokens())
    [note] = notes
    assert note.startswith(f"the teacher runs on padding too, because on 1 of 20 tokens {why}")
    assert {shape[1] for _, _, shape, _ in runs if shape[0] == soft_targets.BATCH_SIZE} == {20}
    np.testing.assert_allclose(logits, expected, rtol=2e-3, atol=1e-3)
