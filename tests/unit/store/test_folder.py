# SPDX-License-Identifier: Apache-2.0
"""Which folders may be a cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgekd.errors import StorageError, UsageError
from edgekd.store.cache import Cache
from edgekd.store.folder import cache_folder


def _prepare(root):
    Cache(root, print).prepare()


@pytest.mark.parametrize("text", ["", ".", "a\nb", "a\x1b[31mb"])
def test_a_name_that_is_no_folder_is_refused(text):
    with pytest.raises(UsageError, match="expected a folder for the cache alone"):
        cache_folder(Path(text))


def test_the_folder_is_that_of_the_option_else_of_the_environment_else_of_the_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("EDGEKD_CACHE", "relative")
    assert cache_folder(Path("~/mine")) == tmp_path / "mine"
    assert cache_folder(None) == tmp_path / "relative"
    monkeypatch.setenv("EDGEKD_CACHE", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder(None) == tmp_path / ".cache" / "edgekd"


@pytest.mark.parametrize("place", [Path("/dev/null"), Path(__file__), Path("/proc/cache"), Path(__file__).parent / ("x" * 300)])
def test_a_place_where_no_folder_can_be_is_one_message(place):
    with pytest.raises(StorageError, match="cache folder cannot be written.*--cache"):
        _prepare(place)


def test_a_folder_of_other_files_is_refused_and_stays_as_it_is(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    tmp_path.chmod(0o755)
    with pytest.raises(StorageError, match="is not a cache of edgekd: it contains 'thesis.txt'"):
        _prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert tmp_path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("name", [".DS_Store", "lost+found", "objects"])
def test_a_new_file_system_or_a_cache_without_its_tag_is_accepted(tmp_path, name):
    (tmp_path / name).mkdir()
    _prepare(tmp_path)
    assert (tmp_path / "CACHEDIR.TAG").read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55")


def test_a_tag_of_another_tool_does_not_make_a_cache(tmp_path):
    (tmp_path / "CACHEDIR.TAG").write_bytes(b"Signature: 8a477f597d28d172789f06886806bc55\n# of pip\n")
    (tmp_path / "wheels").mkdir()
    with pytest.raises(StorageError, match="is not a cache of edgekd: it contains 'wheels'"):
        _prepare(tmp_path)


def test_a_planted_link_as_tag_is_refused_and_not_written_through(tmp_path):
    (tmp_path / "mine").write_text("x")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "CACHEDIR.TAG").symlink_to(tmp_path / "mine")
    with pytest.raises(StorageError, match=r"CACHEDIR\.TAG: is not a file of this user"):
        _prepare(tmp_path / "cache")
    assert (tmp_path / "mine").read_text() == "x"


def test_a_link_to_a_folder_of_this_user_is_accepted_and_one_inside_is_refused(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    _prepare(tmp_path / "link")
    (tmp_path / "real" / "objects").rmdir()
    (tmp_path / "real" / "objects").symlink_to(tmp_path)
    with pytest.raises(StorageError, match="objects: is a symbolic link"):
        _prepare(tmp_path / "real")


def test_a_folder_that_another_user_could_have_planted_is_refused(tmp_path, monkeypatch):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(StorageError, match="every user may replace what is in .*open; .*chmod o-w"):
        _prepare(tmp_path / "open" / "cache")
    (tmp_path / "open").chmod(0o1777)
    _prepare(tmp_path / "open" / "cache")
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(StorageError, match="belongs to user .*edgekd runs as user 4711"):
        _prepare(tmp_path / "open" / "cache")
