# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os

import numpy as np
import pytest

from edgekd.errors import StorageError
from edgekd.store import arrays

COUNT = 400
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, 3, 16, 20), dtype=np.uint8)
GRAY = PIXELS[:, :1] / np.float32(255)
MEAN, DEVIATION = np.float32([[[0.491]], [[0.482]], [[0.447]]]), np.float32([[[0.247]], [[0.243]], [[0.262]]])
COLOR = (PIXELS / np.float32(255) - MEAN) / DEVIATION
TOKENS = np.random.default_rng(1).integers(0, 30_000, (COUNT, 2000))
SIGNED_ZEROS = np.where(PIXELS < 128, np.float32(-0.0), np.float32(0.0))


def save(folder, array):
    path = folder / "train.inputs.0.npy"
    np.save(path, array)
    return path


def same_bits(array, expected):
    return array.dtype == expected.dtype and array.shape == expected.shape and array.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("array", "share"),
    [
        (GRAY, 0.25),
        (COLOR, 0.25),  # each channel has 256 values of its own
        (np.ascontiguousarray(COLOR.transpose(0, 2, 3, 1)), 0.5),  # the channels come last: 768 values
        (COLOR.reshape(COUNT, -1).astype(np.float32), 0.5),
        (TOKENS, 0.29),
        (TOKENS.astype(np.int32) % 200, 0.25),
        (SIGNED_ZEROS, 0.25),
    ],
    ids=["gray", "color", "channels last", "flat", "tokens", "small tokens", "signed zeros"],
)
def test_few_values_take_less_space_and_read_back_as_the_same_bits(tmp_path, array, share, monkeypatch):
    monkeypatch.setattr(arrays, "MIN_BYTES", 2**18)
    path = save(tmp_path, array)
    arrays.compact(path)
    assert path.stat().st_size == pytest.approx(share * array.nbytes, rel=0.07)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    stored = arrays.open_array(path)
    assert len(stored) == COUNT
    assert same_bits(stored.load(), array)
    assert same_bits(stored[3:70], array[3:70])
    assert same_bits(stored[[5, 0, 5]], array[[5, 0, 5]])
    assert np.load(path, allow_pickle=False).ndim == 2  # a reader that does not know the form gets no samples


@pytest.mark.parametrize(
    "array",
    [
        np.random.default_rng(2).standard_normal((COUNT, 1, 32, 32)).astype(np.float32),
        np.random.default_rng(2).integers(0, 2**15, (COUNT, 700)).astype(np.int32) * 7,  # the values themselves would take too much space
        GRAY[:8],
        np.zeros((0, 4), np.float32),
    ],
    ids=["many values", "table", "small", "empty"],
)
def test_other_arrays_stay_as_numpy_writes_them(tmp_path, array):
    path = save(tmp_path, array)
    before = path.read_bytes()
    arrays.compact(path)
    assert path.read_bytes() == before
    assert same_bits(arrays.open_array(path).load(), array)
    assert same_bits(arrays.open_array(path)[:5], array[:5])


def test_the_same_array_gives_the_same_bytes_whatever_the_blocks(tmp_path, monkeypatch):
    contents = set()
    for block in (2**10, 2**18, 2**30):
        monkeypatch.setattr(arrays, "_BLOCK", block)
        path = save(tmp_path, COLOR)
        arrays.compact(path)
        contents.add(path.read_bytes())
    assert len(contents) == 1


def test_an_array_that_fills_the_memory_is_mapped_and_writable(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 2**10)
    plain, small = save(tmp_path, COLOR), tmp_path / "compact.npy"
    np.save(small, COLOR)
    arrays.compact(small)
    for path in (plain, small):
        array = arrays.open_array(path).load()
        assert isinstance(array, np.memmap)
        assert array.flags.writeable
        assert same_bits(array, COLOR)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compact.npy", "train.inputs.0.npy"]
    assert small.stat().st_size < plain.stat().st_size / 3


def test_a_compact_form_that_reads_back_otherwise_is_refused(tmp_path, monkeypatch):
    path = save(tmp_path, COLOR)
    before = path.read_bytes()
    encode = arrays._encode
    monkeypatch.setattr(arrays, "_encode", lambda values, array, codes: encode(values, array, codes) ^ 1)
    with pytest.raises(StorageError, match=r"train.inputs.0.npy: its compact form reads back as other values; check the disk"):
        arrays.compact(path)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before
