# SPDX-License-Identifier: Apache-2.0
"""The watcher: what user code reads is recorded, and nothing else. It runs in a process of its own, as its hook cannot be removed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgekd.ports import Record
from edgekd.store.digests import env_digest, first_change, listing_digest
from edgekd.usercode.watch import code_dependencies, merge_records

PROGRAM = """\
import dataclasses, json, sys
from pathlib import Path
import numpy
from edgekd import usercode
from edgekd.domain.recipe import EntryPoint
from edgekd.usercode.watch import Watcher

folder = Path(sys.argv[1])
watcher = Watcher(folder, (folder / "work",))
records = []
for function in ("read", "read_again"):
    entry = EntryPoint("data.py", function)
    with watcher.phase() as reads:
        usercode.call_user_code(usercode.load_function(folder, entry), entry)
    records.append(dataclasses.asdict(watcher.record(reads)))
open("ignored.txt").close()  # between phases
print(json.dumps(records))
"""
DATA = """\
import os
import sqlite3
import tempfile
from pathlib import Path

import hypothesis
import json
import mmap
import numpy as np

from shared import SCALE
try:
    import faster_reader
except ImportError:
    pass


def read():
    np.load(os.environ["TOY_FILE"])
    assert len(list(Path("more").glob("*.txt"))) == 2
    assert os.listdir("listed") == ["c.txt"]
    if Path("optional.npy").exists():
        raise RuntimeError("must be absent")
    os.environ["TOY_SET"] = "1"
    assert os.environ.get("TOY_SET") == "1"
    assert os.getenv("TOY_UNSET") is None
    os.getenv("PYTHONHASHSEED"), os.getenv("GOMP_SPINCOUNT")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "scratch.txt").write_text("x")
        assert [path.read_text() for path in Path(folder).iterdir()] == ["x"]
    cached = Path("cache.txt")
    cached.write_text("x")
    assert cached.read_text() == "x"
    assert Path("work/arrays.txt").read_text() == "of edgekd"
    assert Path("link.txt").read_text() == "linked"
    np.memmap("mapped.bin", mode="r")
    try:
        open("gone.csv")
    except FileNotFoundError:
        pass
    assert sqlite3.connect("toy.db").execute("select 1").fetchone() == (1,)
    from safetensors.numpy import load_file
    assert load_file("native.safetensors")["a"].shape == (3,)
    global library_mapping
    with open("work/written.db", "r+b") as file:
        library_mapping = mmap.mmap(file.fileno(), 5)


def read_again():
    assert Path("link.txt").read_text() == "linked"
"""
TEXTS = {
    "data.py": DATA,
    "shared.py": "SCALE = 1.0\n",
    "json.py": "raise RuntimeError('replaces a module of Python')\n",
    "more/a.txt": "",
    "more/b.txt": "",
    "listed/c.txt": "",
    "mapped.bin": "bytes",
    "real.txt": "linked",
    "work/arrays.txt": "of edgekd",
    "work/written.db": "bytes",
    "ignored.txt": "",
}
ABSENT = {"faster_reader.py", "optional.npy", "gone.csv"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    for name, text in TEXTS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    np.save(folder / "undeclared.npy", np.zeros(3))
    save_file({"a": np.zeros(3)}, folder / "native.safetensors")
    (folder / "link.txt").symlink_to("real.txt")
    connection = sqlite3.connect(folder / "toy.db")
    connection.execute("create table t (a)")
    connection.close()
    return folder


@pytest.fixture(scope="module")
def records(folder):
    """Return the records of two phases."""
    environment = {**os.environ, "TOY_FILE": "undeclared.npy"}
    command = [sys.executable, "-P", "-c", PROGRAM, str(folder)]
    run = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)
    return [Record(**record) for record in json.loads(run.stdout)]


def test_everything_that_was_read_is_recorded_and_nothing_else(folder, records):
    record = records[0]
    existing = {"data.py", "shared.py", "undeclared.npy", "link.txt", "mapped.bin", "toy.db", "native.safetensors"}
    assert set(record.files) == existing | ABSENT
    assert {name for name, digest in record.files.items() if digest is None} == ABSENT
    assert record.files["undeclared.npy"] == hashlib.sha256((folder / "undeclared.npy").read_bytes()).hexdigest()
    assert record.listings == {"more": listing_digest(folder / "more"), "listed": listing_digest(folder / "listed"), "optional.npy": None}
    assert record.env == {"TOY_FILE": env_digest("undeclared.npy", b""), "TOY_SET": None, "TOY_UNSET": None}
    assert record.modules == {name: version(name) for name in ("hypothesis", "safetensors")}


def test_each_phase_has_a_complete_record_of_its_own(records):
    assert set(records[1].files) == {"data.py", "shared.py", "faster_reader.py", "link.txt"}
    assert records[1].listings == records[1].env == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "undeclared.npy").write_bytes(b"x"), "undeclared.npy changed"),
        (lambda folder: (folder / "shared.py").write_text("SCALE = 2.0\n"), "shared.py changed"),
        (lambda folder: (folder / "real.txt").write_text("other"), "link.txt changed"),
        (lambda folder: (folder / "listed" / "d.txt").write_text(""), "the files in listed changed"),
        (lambda folder: (folder / "gone.csv").write_text(""), "gone.csv appeared"),
        (lambda folder: (folder / "optional.npy").mkdir(), "the files in optional.npy changed"),
        (lambda folder: (folder / "shared.py").unlink(), "shared.py is gone"),
        (lambda folder: os.environ.update(TOY_FILE="other"), "the environment variable TOY_FILE changed"),
        (lambda folder: (folder / "unread.txt").write_text(""), None),
        (lambda folder: (folder / "json.py").write_text("x = 1"), None),
    ],
)
def test_a_change_of_what_was_read_is_noticed(folder, records, change, message, tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_FILE", "undeclared.npy")
    copy = tmp_path / "recipe"
    shutil.copytree(folder, copy, symlinks=True)
    record = dataclasses.asdict(records[0])
    assert first_change(record, copy) is None
    change(copy)
    assert first_change(record, copy) == message


UNSEEN = """\
import sys
from pathlib import Path
from edgekd import usercode
from edgekd.domain.recipe import EntryPoint
from edgekd.usercode.watch import Watcher
watcher, entry = Watcher(Path(sys.argv[1]), ()), EntryPoint("data.py", "read")
with watcher.phase() as reads:
    usercode.call_user_code(usercode.load_function(Path(sys.argv[1]), entry), entry)
print(sorted(watcher.unseen_readers(reads)))
"""


@pytest.mark.parametrize(
    ("body", "unseen"),
    [
        ("open('data.py').read()", []),
        ("import sqlite3, json, zipfile", []),
        ("import ctypes", ["ctypes"]),
        ("try:\n        import h5py, soundfile\n    except ImportError:\n        pass", ["h5py", "soundfile"]),
        ("import subprocess; subprocess.run(['true'])", ["another process"]),
        ("import os; os.posix_spawnp('true', ['true'], os.environ)", ["another process"]),
        ("import os; pid = os.fork(); pid or os._exit(0)", ["another process"]),
        ("import socket; socket.socket().connect_ex(('127.0.0.1', 9))", ["the network"]),
    ],
)
def test_means_to_read_what_is_not_seen_are_named(tmp_path, body, unseen):
    (tmp_path / "data.py").write_text(f"def read():\n    {body}\n")
    command = [sys.executable, "-P", "-c", UNSEEN, str(tmp_path)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    assert run.stdout.strip() == str(unseen)


def test_records_are_merged():
    first = Record({"a.py": "1"}, {}, {"X": None}, {"numpy": "2"})
    second = Record({"a.py": "1", "b.py": None}, {"more": "3"}, {}, {})
    assert merge_records([first, second]) == Record({"a.py": "1", "b.py": None}, {"more": "3"}, {"X": None}, {"numpy": "2"})
    assert merge_records([]) == Record()


def test_code_dependencies_name_no_folder_outside_the_recipe():
    digest = "0123456789abcdef" * 4
    record = Record(
        {"a.py": digest, "/else/where/b.py": digest, "absent.py": None}, {"/else": digest, "gone": None}, {"X": None}, {"m": "1"}
    )
    assert code_dependencies(record) == {
        "files": {"a.py": digest, "b.py:0123456789abcdef": digest},
        "listings": {"else:0123456789abcdef": digest},
        "env": {"X": None},
        "modules": {"m": "1"},
    }
