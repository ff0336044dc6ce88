# SPDX-License-Identifier: Apache-2.0
"""Data and networks of the keywords example, on clips of noise: the recordings are not part of this repository."""

from __future__ import annotations

import importlib.util
import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

EXAMPLE = Path(__file__).parents[3] / "examples" / "keywords"


def _module(name):
    spec = importlib.util.spec_from_file_location(f"keywords_{name}", EXAMPLE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data():
    return _module("data")


@pytest.fixture
def folder(tmp_path, monkeypatch, data):
    generator = np.random.default_rng(0)
    for split, speakers in (("train", range(1, 21)), ("val", (21, 22)), ("test", (23, 24))):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            for word in data.WORDS:
                for speaker in speakers:
                    encoded = io.BytesIO()
                    soundfile.write(encoded, generator.normal(0, 0.1, generator.integers(12_000, 18_000)), 16_000, format="FLAC")
                    member = tarfile.TarInfo(f"{word}/{speaker:08}_NO_01.flac")
                    member.size = len(encoded.getvalue())
                    archive.addfile(member, io.BytesIO(encoded.getvalue()))
    monkeypatch.setenv("EDGEKD_DATA", str(tmp_path))
    return tmp_path


def test_clips_become_standardized_coefficients_grouped_by_speaker(data, folder):
    splits = data.splits()
    assert {name: len(split) for name, split in splits.items()} == {"train": 240, "validation": 24, "calibration": 240, "evaluation": 24}
    features, label = splits["train"][0]
    assert (tuple(features.shape), features.dtype, int(label)) == ((1, 63, 13), torch.float32, 0)
    train = torch.stack([features for features, _ in splits["train"]])
    torch.testing.assert_close(train.mean((0, 1, 2)), torch.zeros(13), atol=1e-4, rtol=0)
    torch.testing.assert_close(train.std((0, 1, 2)), torch.ones(13), atol=1e-3, rtol=0)
    assert sorted(set(splits["evaluation"].groups)) == ["00000023", "00000024"]
    (folder / "val.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"val\.tar: no such file; name the folder"):
        data.splits()


@pytest.fixture
def noisy(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "data", data)  # edgekd imports it from the folder of noisy.py
    return _module("noisy")


def test_noisy_clips_are_in_evaluation_and_unlabelled_splits(data, noisy, folder, monkeypatch):
    monkeypatch.setattr(data, "mfcc", lambda samples: data.fix_length(samples)[:819].reshape(63, 13).astype(np.float32))  # fast
    clean, splits, again = data.splits(), noisy.splits(), noisy.splits()
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 240,
        "validation": 24,
        "evaluation": 24,
        "unlabelled": 240,
        "calibration": 240,
    }
    assert [tuple(part.shape) for part in splits["unlabelled"][0]] == [(1, 63, 13)]  # no label
    assert splits["evaluation"].groups == clean["evaluation"].groups
    for name in ("train", "validation", "calibration"):
        assert all(torch.equal(first, second) for first, second in _parts(clean[name], splits[name]))
    assert torch.equal(clean["evaluation"].tensors[1], splits["evaluation"].tensors[1])
    assert not any(torch.equal(first, second) for (first, _), (second, _) in zip(clean["evaluation"], splits["evaluation"], strict=True))
    for name in ("evaluation", "unlabelled"):
        assert all(torch.equal(first, second) for first, second in _parts(splits[name], again[name]))


def _parts(first, second):
    return [pair for items in zip(first, second, strict=True) for pair in zip(*items, strict=True)]


def test_babble_has_the_stated_level_and_differs_between_clips(data, noisy, folder):
    train, voices = data.read_clips("train").waveforms[:8], data.read_clips("val").waveforms
    clean = np.stack([data.fix_length(waveform) for waveform in train])
    first, second = (np.stack(noisy.add_babble(train, speakers, seed)) - clean for speakers, seed in ((train, 0), (voices, 1)))
    for noise in (first, second):
        level_db = 10 * np.log10((clean**2).mean(1) / (noise**2).mean(1))
        assert level_db == pytest.approx(np.full(8, noisy.LEVEL_DB), abs=0.01)
    correlations = np.corrcoef(np.concatenate([first, second]))
    assert np.abs(correlations - np.eye(16)).max() < 0.5  # two mixtures may share a voice, but not more


def test_first_coefficient_separates_a_low_tone_from_a_high_one(data):
    seconds = np.arange(16_000) / 16_000
    low, high = (data.mfcc(0.5 * np.sin(2 * np.pi * pitch * seconds)) for pitch in (200, 6000))
    assert low.shape == (63, 13)
    assert low[30, 1] > 0 > high[30, 1]  # the first cosine is positive at low bands, negative at high ones


def test_augmentation_shifts_and_masks_and_depends_on_the_seed_only(data):
    features = torch.randn(8, 1, 63, 13)
    first, again, other = (data.augment(features, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    for clip, source in zip(first[:, 0], features[:, 0], strict=True):
        assert all((row == 0).all() or (row == source).all(1).any() for row in clip)


def test_the_student_is_ten_times_smaller():
    models = _module("models")
    teacher, student = models.teacher(), models.student()
    counts = [sum(parameter.numel() for parameter in module.parameters()) for module in (teacher, student)]
    assert counts[0] >= 10 * counts[1]
    assert student(torch.zeros(2, 1, 63, 13)).shape == (2, 12)
