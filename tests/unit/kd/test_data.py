# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from edgekd.domain.artifact import Artifact
from edgekd.errors import RecipeError
from edgekd.kd import data
from edgekd.kd.views import ViewOptions, draw_mixture
from edgekd.store import arrays
from tests.stored import store


def store_artifacts(folder, **arrays):
    artifacts = {}
    for name, array in arrays.items():
        split, _, kind = name.partition("__")
        path = folder / (f"{name}.safetensors" if kind == "soft_targets" else f"{name}.npy")
        if kind == "soft_targets":
            store(path, array, split, inputs=sum(other.startswith(f"{split}__inputs") for other in arrays))
        else:
            np.save(path, array)
        artifacts[name.replace("__", ".")] = Artifact(path, "", path.stat().st_size)
    return artifacts


def test_a_split_is_loaded_with_the_labels_and_soft_targets_that_it_has(tmp_path):
    artifacts = store_artifacts(
        tmp_path,
        train__inputs__0=np.ones((4, 2), np.float32),
        train__inputs__1=np.arange(4)[:, None],
        train__labels=np.array([3, 1, 0, 2]),
        train__soft_targets=np.zeros((1, 4, 5), np.float32),
        unlabelled__inputs__0=np.zeros((0, 2), np.float32),
        unlabelled__inputs__1=np.zeros((0, 1), np.int64),
    )
    train = data.load_split(artifacts, "train")
    batch = train.pick(torch.tensor([2, 0]))
    assert [tuple(item.shape) for item in train.inputs] == [(4, 2), (4, 1)]
    assert batch.inputs[1].flatten().tolist() == [2, 0]
    assert batch.labels.tolist() == [0, 3]
    assert tuple(batch.teacher_logits.shape) == (2, 5)
    unlabelled = data.load_split(artifacts, "unlabelled")
    assert len(unlabelled) == 0
    assert unlabelled.teacher_logits is None


def test_labels_that_are_not_classes_count_as_missing(tmp_path):
    artifacts = store_artifacts(tmp_path, train__inputs__0=np.ones((3, 2), np.float32), train__labels=np.array([0.5, 1.5, 2.0]))
    assert data.load_split(artifacts, "train").labels.tolist() == [-1, -1, -1]


def test_an_array_larger_than_free_memory_is_mapped_and_gives_the_same_batch(tmp_path, monkeypatch):
    artifacts = store_artifacts(tmp_path, train__inputs__0=np.arange(12, dtype=np.float32).reshape(6, 2))
    rows = torch.tensor([5, 0, 3])
    expected = data.load_split(artifacts, "train").pick(rows)
    monkeypatch.setattr(os, "sysconf", lambda _: 1)
    mapped = data.load_arrays(artifacts, "train")[0]
    assert isinstance(mapped, np.memmap)
    assert torch.equal(data.load_split(artifacts, "train").pick(rows).inputs[0], expected.inputs[0])


def test_compact_inputs_are_loaded_as_plain_ones(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (200, 3, 8, 8)) / np.float32(255)
    artifacts = store_artifacts(tmp_path, train__inputs__0=pixels.astype(np.float32))
    plain, path = data.load_split(artifacts, "train"), artifacts["train.inputs.0"].path
    before = path.stat().st_size
    monkeypatch.setattr(arrays, "MIN_BYTES", 0)
    arrays.compact(path)
    assert path.stat().st_size < 0.3 * before
    assert torch.equal(data.load_split(artifacts, "train").inputs[0], plain.inputs[0])


def test_a_view_has_its_own_inputs_and_the_teachers_logits_for_them(tmp_path):
    logits = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    inputs, labels = np.ones((3, 2), np.float32), np.array([0, 1, 0])
    artifacts = store_artifacts(tmp_path, train__inputs__0=inputs, train__labels=labels, train__soft_targets=logits)

    def noisy(inputs, generator):
        return tuple(item + torch.rand(item.shape, generator=generator) for item in inputs)

    options = ViewOptions(noisy)
    views = [data.load_split(artifacts, "train", view=options, number=number) for number in (0, 1)]
    assert not torch.equal(views[0].inputs[0], views[1].inputs[0])
    assert torch.equal(views[1].inputs[0], data.load_split(artifacts, "train", view=options, number=1).inputs[0])
    assert [view.teacher_logits.tolist() for view in views] == logits.tolist()
    assert data.load_split(artifacts, "train").inputs[0].unique().tolist() == [1]  # the stored inputs are unchanged


def test_a_mixed_view_has_the_labels_of_both_samples(tmp_path):
    labels = np.array([0, 1, 2, -1, 1, 0])
    artifacts = store_artifacts(tmp_path, train__inputs__0=np.eye(6, dtype=np.float32), train__labels=labels)
    options = ViewOptions(mixup=1.0)
    mixed = data.load_split(artifacts, "train", view=options, number=2)
    mixture = draw_mixture(options, "train", 6, 2)
    batch = data.concatenate(mixed, mixed).pick(torch.tensor([7, 2, 3, 10]))
    expected = torch.zeros(4, 3)
    for row, sample in enumerate((1, 2, 3, 4)):
        partner, share = int(mixture.partners[sample]), mixture.shares[sample]
        assert batch.inputs[0][row, sample] >= share - 1e-6
        if labels[sample] >= 0 and labels[partner] >= 0:
            expected[row, labels[sample]] += share
            expected[row, labels[partner]] += 1 - share
    torch.testing.assert_close(batch.targets(3), expected)
    assert batch.targets(3).sum(dim=1).tolist() == pytest.approx(
        [float(labels[i] >= 0 and labels[mixture.partners[i]] >= 0) for i in (1, 2, 3, 4)]
    )
    assert data.load_split(artifacts, "train", view=options, number=0).targets(3).tolist() == labels.tolist()


def test_splits_are_concatenated_in_order():
    first = data.Samples((torch.zeros(2, 1),), torch.tensor([1, 0]), torch.zeros(2, 3))
    second = data.Samples((torch.ones(1, 1),), torch.tensor([-1]), torch.ones(1, 3))
    both = data.concatenate(first, second)
    assert both.labels.tolist() == [1, 0, -1]
    assert both.inputs[0].flatten().tolist() == [0, 0, 1]
    assert both.teacher_logits[:, 0].tolist() == [0, 0, 1]


def test_soft_targets_of_many_classes_stay_in_their_file_and_are_read_by_row(tmp_path):
    logits = {
        split: 3 * np.random.default_rng(seed).standard_normal((2, 20, 300)).astype(np.float32)
        for seed, split in enumerate(("train", "unlabelled"))
    }
    arrays = {
        f"{split}__{kind}": array
        for split in logits
        for kind, array in (("inputs__0", np.ones((20, 2), np.float32)), ("soft_targets", logits[split]))
    }
    artifacts = store_artifacts(tmp_path, **arrays)
    train, unlabelled = (data.load_split(artifacts, split, number=1) for split in logits)
    both = data.concatenate(train, unlabelled)
    assert isinstance(both.teacher_logits, data.SampledSoftTargets)
    assert both.teacher_logits.shape == (40, 300)
    rows = torch.tensor([25, 3, 39])
    sampled = both.pick(rows).teacher_logits
    expected = torch.from_numpy(np.concatenate([logits["train"][1], logits["unlabelled"][1]]))[rows]
    assert torch.equal(sampled.argmax(1), expected.argmax(1))
    top = expected.topk(10).indices
    log_probabilities = [logits.log_softmax(1).gather(1, top) for logits in (sampled, expected)]
    torch.testing.assert_close(log_probabilities[0], log_probabilities[1], rtol=2e-3, atol=2e-3)
    assert torch.equal(sampled[1], train.teacher_logits[rows[1:2]][0])


def test_soft_targets_of_other_samples_are_refused(tmp_path):
    artifacts = store_artifacts(tmp_path, train__inputs__0=np.ones((3, 2), np.float32), train__soft_targets=np.zeros((1, 3, 2), np.float32))
    artifacts["train.inputs.0"] = Artifact(artifacts["train.inputs.0"].path, "another", 0)
    with pytest.raises(RecipeError, match="train__soft_targets.safetensors: holds other soft targets: data "):
        data.load_split(artifacts, "train")


def test_several_teachers_of_many_classes_need_dense_soft_targets(tmp_path):
    logits = np.zeros((1, 3, 300), np.float32)
    artifacts = store_artifacts(tmp_path, train__inputs__0=np.ones((3, 2), np.float32), train__soft_targets=logits)
    artifacts["train.soft_targets.teacher.0"] = artifacts["train.soft_targets"]
    with pytest.raises(RecipeError, match=r'several teachers of 300 classes, .* expected distill.soft_target_storage = "dense"'):
        data.load_split(artifacts, "train", ensemble=data.Ensemble((1.0, 1.0), "fixed"))


LABELS = torch.tensor([0, 1, 2, -1])


def random_logits(seed):
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))


def test_fixed_weights_give_the_weighted_mean_of_logits():
    mean = data.ensemble_logits([random_logits(0), random_logits(1)], (3.0, 1.0), LABELS, "fixed")
    assert torch.allclose(mean, 0.75 * random_logits(0) + 0.25 * random_logits(1))


def test_the_scale_of_the_weights_does_not_matter():
    logits = [random_logits(0), random_logits(1), random_logits(2)]
    assert torch.allclose(
        data.ensemble_logits(logits, (3.0, 1.0, 2.0), LABELS, "confidence"),
        data.ensemble_logits(logits, (6.0, 2.0, 4.0), LABELS, "confidence"),
    )


def test_confidence_weights_are_those_of_the_paper():
    logits = [random_logits(0), random_logits(1), random_logits(2)]
    entropy = torch.stack([torch.nn.functional.cross_entropy(item[:3], LABELS[:3], reduction="none") for item in logits])
    weights = (1 - entropy.exp() / entropy.exp().sum(0)) / 2
    expected = (weights[:, :, None] * torch.stack([item[:3] for item in logits])).sum(0)
    assert torch.allclose(data.ensemble_logits(logits, (1.0, 1.0, 1.0), LABELS, "confidence")[:3], expected, atol=1e-6)


def test_the_teacher_that_predicts_the_label_gets_more_weight():
    right, wrong = torch.tensor([[5.0, 0.0, 0.0]]), torch.tensor([[0.0, 5.0, 0.0]])
    mean = data.ensemble_logits([wrong, right], (1.0, 1.0), torch.tensor([0]), "confidence")
    assert mean.argmax().item() == 0
    assert data.ensemble_logits([wrong, right], (1.0, 1.0), torch.tensor([0]), "fixed")[0, 0] == pytest.approx(2.5)


def test_without_a_label_the_more_confident_teacher_gets_more_weight():
    confident, uncertain = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.1, 0.0]])
    assert data.ensemble_logits([confident, uncertain], (1.0, 1.0), torch.tensor([-1]), "confidence")[0, 0] > 4.5


def test_confident_and_wrong_teachers_give_no_nan():
    logits = [torch.tensor([[1000.0, 0.0]]), torch.tensor([[1000.0, 0.0]])]
    assert torch.isfinite(data.ensemble_logits(logits, (1.0, 1.0), torch.tensor([1]), "confidence")).all()
