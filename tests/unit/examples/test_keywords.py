# SPDX-License-Identifier: Apache-2.0
"""The keywords' data and networks, on clips of noise: the recording's own are not part of this repository."""

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
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


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
                    packed = io.BytesIO()
                    soundfile.write(packed, generator.normal(0, 0.1, generator.integers(12_000, 18_000)), 16_000, format="FLAC")
                    member = tarfile.TarInfo(f"{word}/{speaker:08}_NO_01.flac")
                    member.size = len(packed.getvalue())
                    archive.addfile(member, io.BytesIO(packed.getvalue()))
    monkeypatch.setenv("EDGEKD_DATA", str(tmp_path))
    return tmp_path


def test_clips_become_scaled_coefficients_with_their_speakers(data, folder):
    found = data.splits()
    assert {name: len(split) for name, split in found.items()} == {"train": 240, "validation": 24, "calibration": 240, "evaluation": 24}
    features, label = found["train"][0]
    assert (tuple(features.shape), features.dtype, int(label)) == ((1, 63, 13), torch.float32, 0)
    whole = torch.stack([features for features, _ in found["train"]])
    torch.testing.assert_close(whole.mean((0, 1, 2)), torch.zeros(13), atol=1e-4, rtol=0)
    torch.testing.assert_close(whole.std((0, 1, 2)), torch.ones(13), atol=1e-3, rtol=0)
    assert sorted(set(found["evaluation"].groups)) == ["00000023", "00000024"]
    (folder / "val.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"val\.tar: no such file; name the folder"):
        data.splits()


@pytest.fixture
def noisy(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "data", data)  # as edgekd finds it, beside noisy.py
    return _module("noisy")


def test_noisy_clips_are_evaluated_and_learnt_from_without_labels(data, noisy, folder, monkeypatch):
    monkeypatch.setattr(data, "mfcc", lambda samples: data.second(samples)[:819].reshape(63, 13).astype(np.float32))  # fast
    clean, found, again = data.splits(), noisy.splits(), noisy.splits()
    assert {name: len(split) for name, split in found.items()} == {
        "train": 240,
        "validation": 24,
        "evaluation": 24,
        "unlabelled": 240,
        "calibration": 240,
    }
    assert [tuple(part.shape) for part in found["unlabelled"][0]] == [(1, 63, 13)]  # no label
    assert found["evaluation"].groups == clean["evaluation"].groups
    for name in ("train", "validation", "calibration"):
        assert all(torch.equal(one, two) for one, two in _parts(clean[name], found[name]))
    assert torch.equal(clean["evaluation"].tensors[1], found["evaluation"].tensors[1])
    assert not any(torch.equal(one, two) for (one, _), (two, _) in zip(clean["evaluation"], found["evaluation"], strict=True))
    for name in ("evaluation", "unlabelled"):
        assert all(torch.equal(one, two) for one, two in _parts(found[name], again[name]))


def _parts(first, second):
    return [pair for items in zip(first, second, strict=True) for pair in zip(*items, strict=True)]


def test_babble_lies_below_each_clip_by_the_stated_level_and_is_another_for_each(data, noisy, folder):
    train, voices = data.clips("train").waveforms[:8], data.clips("val").waveforms
    clean = np.stack([data.second(item) for item in train])
    own, other = (np.stack(noisy.mixed(train, chosen, seed)) - clean for chosen, seed in ((train, 0), (voices, 1)))
    for noise in (own, other):
        level_db = 10 * np.log10((clean**2).mean(1) / (noise**2).mean(1))
        assert level_db == pytest.approx(np.full(8, noisy.LEVEL_DB), abs=0.01)
    drawn = np.corrcoef(np.concatenate([own, other]))
    assert np.abs(drawn - np.eye(16)).max() < 0.5  # two draws may share a voice, not more


def test_a_tone_has_its_energy_where_its_pitch_is(data):
    seconds = np.arange(16_000) / 16_000
    low, high = (data.mfcc(0.5 * np.sin(2 * np.pi * pitch * seconds)) for pitch in (200, 6000))
    assert low.shape == (63, 13)
    assert low[30, 1] > 0 > high[30, 1]  # the first cosine is positive at low bands, negative at high ones


def test_an_augmented_clip_is_moved_and_blanked_and_the_seed_decides(data):
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
