# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os

import pytest

from edgekd.errors import StorageError
from edgekd.ports import Record, StageResult
from edgekd.store.cache import Cache
from edgekd.store.digests import digest, file_digest

MATERIAL = {"stage": "quantize", "params": {"scheme": "float32"}}
KEY = digest(MATERIAL)


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def cache(tmp_path, warnings):
    store = Cache(tmp_path / "cache", warnings.append)
    store.prepare()
    return store


def _store(cache, content=b"model bytes", key=KEY):
    out = cache.new_output_folder(key)
    (out / "model.onnx").write_bytes(content)
    return cache.put(out, key, MATERIAL, StageResult(metrics={"ops": 3}, notes=("a note",)), 1.5)


def test_a_stored_entry_is_returned(cache, warnings):
    stored = _store(cache)
    entry = cache.get(KEY)
    assert entry == stored
    assert entry.artifacts["model.onnx"].path.read_bytes() == b"model bytes"
    assert (entry.metrics, entry.notes, entry.seconds) == ({"ops": 3}, ("a note",), 1.5)
    assert warnings == []


def test_an_unknown_key_is_a_miss(cache):
    assert cache.get(KEY) is None


@pytest.mark.parametrize("name", ["model.onnx", "entry.json"])
@pytest.mark.parametrize("position", [0, 5, -1])
def test_a_flipped_byte_in_any_file_is_a_miss_with_a_warning(cache, warnings, name, position):
    path = _store(cache).artifacts["model.onnx"].path.parent / name
    cache.close()
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    fresh = Cache(cache.root, warnings.append)
    assert fresh.get(KEY) is None
    assert len(warnings) == 1
    assert "is damaged" in warnings[0]
    assert not path.exists()


@pytest.mark.parametrize("name", ["model.onnx", "entry.json"])
def test_a_missing_or_short_file_is_a_miss(cache, name):
    path = _store(cache).artifacts["model.onnx"].path.parent / name
    path.unlink()
    assert cache.get(KEY) is None


def test_a_damaged_list_of_digests_damages_no_entry(cache, warnings):
    path = _store(cache).artifacts["model.onnx"].path
    stat = path.stat()
    wrong = {str(path): [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, "0" * 64]}
    (cache.root / "stat.json").write_text(json.dumps(wrong))
    assert Cache(cache.root, warnings.append).get(KEY) is not None
    assert warnings == []


@pytest.mark.parametrize("content", [b"", b"not json", b"[1, 2]", b'{"a": 3}', b"\xff\xfe"])
def test_an_unreadable_list_of_digests_is_ignored(cache, content):
    path = _store(cache).artifacts["model.onnx"].path
    (cache.root / "stat.json").write_bytes(content)
    fresh = Cache(cache.root, lambda text: None)
    assert fresh.digest_of(path) == file_digest(path)


def test_a_digest_is_computed_again_after_a_change_of_the_file(cache, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    first = cache.digest_of(path)
    path.write_bytes(b"two")  # the same size
    os.utime(path, ns=(0, 0))
    assert cache.digest_of(path) != first
    assert cache.digest_of(path) == file_digest(path)


def test_digests_of_young_files_are_not_saved(cache, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    cache.digest_of(path)
    cache.close()
    assert str(path) not in json.loads((cache.root / "stat.json").read_bytes())


def test_leftovers_of_a_killed_process_are_removed(cache):
    out = cache.new_output_folder(KEY)
    (out / "half").write_bytes(b"x")
    assert list(cache.new_output_folder(KEY).iterdir()) == []


def test_partial_work_exists_until_the_entry_is_stored(cache):
    (cache.work(KEY) / "checkpoint").write_bytes(b"x")
    assert (cache.work(KEY) / "checkpoint").exists()
    _store(cache)
    assert not (cache.root / "work" / KEY).exists()


def test_a_valid_record_leads_to_its_entry(cache, tmp_path):
    (tmp_path / "data.py").write_bytes(b"code")
    record = Record(files={"data.py": file_digest(tmp_path / "data.py")})
    key = cache.add_record("base", record)
    assert cache.matching_key("base", tmp_path) == key
    (tmp_path / "data.py").write_bytes(b"other")
    assert cache.matching_key("base", tmp_path) is None
    other = cache.add_record("base", Record(files={"data.py": file_digest(tmp_path / "data.py")}))
    assert cache.matching_key("base", tmp_path) == other != key
    (tmp_path / "data.py").write_bytes(b"code")
    assert cache.matching_key("base", tmp_path) == key  # the old file is a hit again


def test_a_cache_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="the cache folder cannot be written.*--cache"):
        Cache(tmp_path / "file" / "cache", lambda text: None).prepare()


def test_prune_removes_the_least_recently_used(cache):
    keys = [digest(number) for number in range(3)]
    for age, key in enumerate(keys):
        folder = _store(cache, bytes(1000), key).artifacts["model.onnx"].path.parent
        os.utime(folder, (1_000_000 - age, 1_000_000 - age))
    size = sum(row[2] for row in cache.entries())
    removed, freed = cache.prune(max_gib=(size - 1) / 2**30, older_than_days=None)
    assert (removed, cache.get(keys[2])) == (1, None)
    assert freed > 1000
    assert cache.get(keys[0]) is not None
    assert cache.prune(None, older_than_days=1)[0] == 2


def test_damaged_files_are_named(cache):
    path = _store(cache).artifacts["model.onnx"].path
    assert cache.damaged_files(KEY) == []
    path.write_bytes(b"model bytex")
    assert cache.damaged_files(KEY) == ["model.onnx"]
