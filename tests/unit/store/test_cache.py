# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import random
from contextlib import suppress

import pytest

from edgekd.errors import StorageError
from edgekd.ports import Record, StageResult
from edgekd.store.cache import Cache
from edgekd.store.digests import digest, env_digest, file_digest, tool_version

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
    cache.close()  # it has used them
    size = sum(row[2] for row in cache.entries())
    removed, freed = cache.prune(max_gib=(size - 1) / 2**30, older_than_days=None)
    assert (removed, cache.get(keys[2])) == (1, None)
    assert freed > 1000
    assert cache.get(keys[0]) is not None
    cache.close()
    assert cache.prune(None, older_than_days=1)[0] == 2


def test_prune_spares_what_another_process_uses(cache, warnings):
    _store(cache)
    (cache.work(KEY) / "checkpoint").write_bytes(b"x")
    other = Cache(cache.root, warnings.append)
    with cache.lock(KEY):
        (cache.new_output_folder(KEY) / "half").write_bytes(b"x")
        assert other.prune(max_gib=0, older_than_days=0) == (0, 0)
        assert (cache.root / "tmp" / f"{KEY}.{os.getpid()}" / "half").exists()
    cache.close()
    assert other.prune(max_gib=0, older_than_days=None)[0] == 2
    assert [list((cache.root / part).iterdir()) for part in ("tmp", "work")] == [[], []]
    assert cache.get(KEY) is None
    assert warnings == []


def test_a_build_removes_what_killed_builds_left_and_nobody_will_resume(cache, warnings):
    fresh, old = digest("fresh"), digest("old")
    for path in (cache.root / "tmp" / f"{KEY}.1", cache.root / "work" / fresh, cache.root / "work" / old, cache.root / "tmp" / ".DS_Store"):
        path.mkdir()
    os.utime(cache.root / "work" / old, (0, 0))
    Cache(cache.root, warnings.append).prepare()
    assert [path.name for path in (cache.root / "tmp").iterdir()] == [".DS_Store"]
    assert [path.name for path in (cache.root / "work").iterdir()] == [fresh]


def test_foreign_files_are_ignored_and_stay(cache, warnings):
    path = _store(cache).artifacts["model.onnx"].path
    cache.close()
    elsewhere = cache.root.parent / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    link = cache.root / "objects" / "00" / ("0" * 64)
    link.parent.mkdir()
    link.symlink_to(elsewhere)
    foreign = [cache.root / "objects" / ".DS_Store", path.parent.parent / "notes~", path.parent / ".DS_Store", cache.root / "work" / "mine"]
    for file in foreign:
        file.write_text("x")
    (cache.root / "lost+found").mkdir()
    (cache.root / "objects" / "lost+found" / "x").mkdir(parents=True)
    store = Cache(cache.root, warnings.append)
    store.prepare()
    assert [row[0] for row in store.entries()] == [KEY]
    assert store.get(KEY) is not None
    assert store.get(KEY[:-1] + ("0" if KEY[-1] != "0" else "1")) is None
    store.close()
    assert store.prune(0, 0)[0] == 1
    assert all(file.exists() for file in foreign if file.parent != path.parent)
    assert (elsewhere / "deep").is_dir()
    assert warnings == []


def test_a_file_in_the_place_of_an_entry_is_replaced(cache, warnings):
    folder = cache.root / "objects" / KEY[:2] / KEY
    folder.parent.mkdir()
    folder.write_text("x")
    assert cache.get(KEY) is None
    assert _store(cache).artifacts["model.onnx"].path.is_file()


def test_the_cache_is_private_whatever_the_umask(cache):
    previous = os.umask(0)
    try:
        cache.root.chmod(0o777)
        cache.prepare()
        _store(cache)
        cache.save_material("step", MATERIAL)
        cache.add_record("base", Record())
        cache.work(KEY)
        cache.digest_of(cache.root / "secret")
        cache.close()
    finally:
        os.umask(previous)
    modes = {path: path.stat().st_mode & 0o777 for path in [cache.root, *cache.root.rglob("*")]}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}


def test_the_hash_of_a_variable_depends_on_the_secret_of_the_cache(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_PIN", "1234")
    other = Cache(tmp_path / "other", print)
    other.prepare()
    assert len(cache.secret) == len(other.secret) == 32
    assert cache.secret != other.secret
    assert env_digest("1234", cache.secret) != env_digest("1234", other.secret)
    key = cache.add_record("base", Record(env={"TOY_PIN": env_digest("1234", cache.secret)}))
    again = Cache(cache.root, print)
    again.prepare()
    assert again.matching_key("base", tmp_path) == key
    monkeypatch.setenv("TOY_PIN", "1235")
    assert again.matching_key("base", tmp_path) is None


def _mutate(generator, content):
    """Return damaged JSON: a flipped byte, a cut, or another value or key somewhere."""
    if generator.random() < 0.4:
        position = generator.randrange(len(content))
        return content[:position] + generator.choice([b"", bytes([generator.randrange(256)]), content[:20]]) + content[position + 1 :]
    document = json.loads(content)
    node = document
    while isinstance(node, dict | list) and node:
        key = generator.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], dict | list) or not node[key] or generator.random() < 0.3:
            values = [None, -1, 1e999, "", "../../x", "\0", "\ud800", [], {}, [[]], {"a": 1}, True, "é" * 300, 10**30]
            node[key] = generator.choice(values)
            break
        node = node[key]
    if isinstance(document, dict) and "self" in document and generator.random() < 0.7:  # also those whose own digest is right
        document.pop("self")
        with suppress(ValueError):
            document["self"] = digest(document)
    return json.dumps(document).encode()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.long)])
def test_damaged_documents_of_the_cache_are_misses(cache, tmp_path, seed, count):
    generator = random.Random(seed)
    (tmp_path / "data.py").write_bytes(b"code")
    record = Record(
        {"data.py": file_digest(tmp_path / "data.py"), "none": None}, {"sub": None}, {"X": None}, {"numpy": tool_version("numpy")}
    )
    key = cache.add_record("base", record)
    path = _store(cache, key=key).artifacts["model.onnx"].path
    cache.save_material("step", MATERIAL)
    os.utime(path, (0, 0))
    cache.close()
    files = [path.parent / "entry.json", cache.root / "records" / "base.json", *(cache.root / "last").iterdir(), cache.root / "stat.json"]
    files[3].write_text(json.dumps({str(path): [11, 0, 0, 0, "0" * 64]}))
    for number in range(count):
        file = files[number % len(files)]
        content = file.read_bytes()
        file.write_bytes(_mutate(generator, content))
        store = Cache(cache.root, lambda text: None)
        store.prepare()
        entry = store.get(store.matching_key("base", tmp_path) or key)
        assert entry is None or entry.artifacts["model.onnx"].path.read_bytes() == b"model bytes"
        store.last_material("step")
        store.nearest_changes("base", tmp_path)
        list(store.entries())
        store.close()
        if entry is None:
            _store(cache, key=key)
            cache.close()
        if file.exists() or file.parent.exists():
            file.write_bytes(content)


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b"\xff", b"null", None])
def test_odd_documents_are_misses(cache, content):
    path = _store(cache).artifacts["model.onnx"].path.parent / "entry.json"
    key = cache.add_record("base", Record())
    for file in (path, cache.root / "records" / "base.json", cache.root / "stat.json"):
        file.unlink(missing_ok=True)
        os.mkfifo(file) if content is None else file.write_bytes(content)
    store = Cache(cache.root, lambda text: None)
    store.prepare()
    assert store.matching_key("base", cache.root) is None
    assert store.get(KEY) is None
    assert store.add_record("base", Record()) == key


def test_damaged_files_are_named(cache):
    path = _store(cache).artifacts["model.onnx"].path
    assert cache.damaged_files(KEY) == []
    path.write_bytes(b"model bytex")
    assert cache.damaged_files(KEY) == ["model.onnx"]
