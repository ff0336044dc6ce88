# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
from importlib import metadata

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


def test_tool_versions_are_those_that_importlib_metadata_finds():
    installed = {item.metadata["Name"]: item.version for item in reversed(list(metadata.distributions()))}

    assert {name: digests.tool_version(name) for name in installed} == installed
    assert digests.tool_version("No.Such_Package") is None


@pytest.fixture
def no_known_versions():
    def forget():
        for function in (digests.tool_version, digests._wheel_versions):
            function.cache_clear()

    forget()
    yield
    forget()


@pytest.mark.usefixtures("no_known_versions")
def test_the_version_of_the_distribution_that_is_imported_counts(tmp_path, monkeypatch):
    for name in ("first/some_tool-2.0+cpu.dist-info", "second/some_tool-1.0.dist-info"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr("sys.path", [str(tmp_path / name) for name in ("absent", "first", "second")])
    assert digests.tool_version("Some.Tool") == "2.0+cpu"


@pytest.mark.usefixtures("no_known_versions")
def test_a_distribution_that_is_no_wheel_has_a_version(tmp_path, monkeypatch):
    folder = tmp_path / "from_debian-3.1.egg-info"
    folder.mkdir()
    (folder / "PKG-INFO").write_text("Name: from_debian\nVersion: 3.1\n")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert digests.tool_version("from-debian") == "3.1"
