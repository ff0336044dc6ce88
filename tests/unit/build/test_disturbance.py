# SPDX-License-Identifier: Apache-2.0
"""A cache that goes away under a build, or that cannot be written."""

from __future__ import annotations

import errno
import os
import shutil
from types import SimpleNamespace

import pytest

from edgekd.build import disturbance
from edgekd.errors import RecipeError, StageError, StorageError
from edgekd.ports import StageResult
from edgekd.store.cache import Cache
from edgekd.store.digests import digest

MATERIAL = {"stage": "toy"}
KEY = digest(MATERIAL)


@pytest.fixture
def lines():
    return []


@pytest.fixture
def cache(tmp_path, lines, monkeypatch):
    monkeypatch.setattr(disturbance, "_SETTLE_S", 0)
    store = Cache(tmp_path / "cache", lines.append)
    store.prepare()
    return store


def _build(cache, lines, work):
    return disturbance.with_cache(cache, SimpleNamespace(log=lines.append), work)


def _store(cache):
    out = cache.new_output_folder(KEY)
    (out / "model").write_bytes(b"bytes")
    return cache.put(out, KEY, MATERIAL, StageResult(), 1.0)


@pytest.mark.parametrize(
    "lost",
    ["", "objects", f"objects/{KEY[:2]}", f"objects/{KEY[:2]}/{KEY}/model", f"objects/{KEY[:2]}/{KEY}/entry.json", "tmp", "work", "locks"],
)
@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "no file"), RuntimeError("of native code"), StageError("x")])
def test_a_build_whose_files_were_removed_starts_again(cache, lines, lost, error):
    tries = []

    def work():
        entry = _store(cache)
        tries.append(entry.key)
        if len(tries) == 1:
            path = cache.root / lost
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            raise error
        return entry

    assert _build(cache, lines, work).artifacts["model"].path.read_bytes() == b"bytes"
    assert len(tries) == 2
    assert any("another process removed files" in line for line in lines)


def test_an_output_folder_that_was_removed_and_replaced_is_not_stored(cache, lines):
    tries = []

    def work():
        tries.append(1)
        if len(tries) > 1:
            return _store(cache)
        out = cache.new_output_folder(KEY)
        (out / "first").write_bytes(b"")
        shutil.rmtree(out)
        out.mkdir()
        (out / "second").write_bytes(b"")
        return cache.put(out, KEY, MATERIAL, StageResult(), 1.0)

    assert set(_build(cache, lines, work).artifacts) == {"model"}
    assert len(tries) == 2


def test_files_that_are_removed_again_and_again_end_with_one_message(cache, lines):
    def work():
        shutil.rmtree(cache.root)
        raise FileNotFoundError(errno.ENOENT, "no file")

    with pytest.raises(StorageError, match=r"another process removed files while this build used them \(4 times\)"):
        _build(cache, lines, work)


@pytest.mark.parametrize(
    "number", [errno.EFBIG, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENAMETOOLONG, errno.ESTALE, errno.EROFS]
)
def test_every_error_of_the_system_is_one_message_of_the_storage(cache, lines, number):
    def work():
        raise OSError(number, os.strerror(number), "some/file")

    with pytest.raises(
        StorageError, match=f"cannot be read or written: {os.strerror(number)}: some/file; free space or name another folder"
    ):
        _build(cache, lines, work)


def test_an_error_of_native_code_that_names_the_storage_is_one_message(cache, lines):
    def work():
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    with pytest.raises(StorageError, match="a file cannot be written: No space left on device"):
        _build(cache, lines, work)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), RecipeError("data.py: wrong"), StageError("of the runtime"), BrokenPipeError()])
def test_other_errors_stay_as_they_are(cache, lines, error):
    def work():
        raise error

    with pytest.raises(type(error)) as caught:
        _build(cache, lines, work)
    assert caught.value is error


def test_a_candidate_is_not_refused_for_a_full_disk_or_lost_files(cache):
    disturbance.check_storage(cache, StageError("export: op X is unknown"))
    with pytest.raises(StorageError, match="No space left on device"):
        disturbance.check_storage(cache, StageError("export: No space left on device"))
    _store(cache).artifacts["model"].path.unlink()
    with pytest.raises(StorageError, match="another process removed files"):
        disturbance.check_storage(cache, StageError("export: the model cannot be read"))
