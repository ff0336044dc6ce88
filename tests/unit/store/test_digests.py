# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib

import pytest

from edgekd.store import digests


def test_canonical_json_is_the_same_for_any_order_of_keys():
    assert digests.canonical_json({"b": [1, 2.5], "a": None}) == digests.canonical_json({"a": None, "b": [1, 2.5]})


def test_canonical_json_refuses_nan():
    with pytest.raises(ValueError, match="JSON"):
        digests.canonical_json(float("nan"))


def test_file_digest_is_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert digests.file_digest(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def _record(folder, monkeypatch):
    (folder / "sub").mkdir()
    (folder / "sub" / "x.npy").write_bytes(b"1")
    (folder / "data.py").write_bytes(b"code")
    monkeypatch.setenv("EDGEKD_TEST_VALUE", "1")
    return {
        "files": {"data.py": digests.file_digest(folder / "data.py"), "absent.csv": None},
        "listings": {"sub": digests.listing_digest(folder / "sub")},
        "env": {"EDGEKD_TEST_VALUE": digests.env_digest("1", b""), "EDGEKD_TEST_UNSET": None},
        "modules": {"numpy": digests.tool_version("numpy"), "no-such-package": None},
    }


def test_a_record_is_valid_while_nothing_changes(tmp_path, monkeypatch):
    assert digests.first_change(_record(tmp_path, monkeypatch), tmp_path) is None


def test_each_kind_of_change_is_described(tmp_path, monkeypatch):
    record = _record(tmp_path, monkeypatch)

    (tmp_path / "absent.csv").write_bytes(b"new")
    assert digests.first_change(record, tmp_path) == "absent.csv appeared"
    (tmp_path / "absent.csv").unlink()

    (tmp_path / "data.py").write_bytes(b"other")
    assert digests.first_change(record, tmp_path) == "data.py changed"
    (tmp_path / "data.py").unlink()
    assert digests.first_change(record, tmp_path) == "data.py is gone"
    (tmp_path / "data.py").write_bytes(b"code")

    (tmp_path / "sub" / "y.npy").write_bytes(b"2")
    assert digests.first_change(record, tmp_path) == "the files in sub changed"
    (tmp_path / "sub" / "y.npy").unlink()

    monkeypatch.setenv("EDGEKD_TEST_VALUE", "2")
    assert digests.first_change(record, tmp_path) == "the environment variable EDGEKD_TEST_VALUE changed"
    monkeypatch.setenv("EDGEKD_TEST_VALUE", "1")

    record["modules"]["numpy"] = "0.1"
    assert digests.first_change(record, tmp_path).startswith("numpy 0.1 -> ")
