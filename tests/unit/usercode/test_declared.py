# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

import pytest

from edgekd.errors import RecipeError
from edgekd.store.digests import file_digest, first_change
from edgekd.usercode.declared import check_unchanged, declared_reads

PATTERNS = ("data/*.h5", "audio", "labels.csv")


@pytest.fixture
def folder(tmp_path):
    for name in ("data/a.h5", "data/notes.txt", "audio/deep/b.wav", "labels.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def test_files_folders_and_globs_are_digested(folder):
    record = declared_reads(folder, PATTERNS)
    assert record.files == {name: file_digest(folder / name) for name in ("audio/deep/b.wav", "data/a.h5", "labels.csv")}
    assert set(record.listings) == {"audio", "audio/deep", "data"}
    assert declared_reads(folder, ()).files == {}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("data/a.h5", "data/a.h5 changed"),
        ("data/new.h5", "the files in data changed"),
        ("audio/deep/new.wav", "the files in audio/deep changed"),
        ("audio/deep/b.wav", "audio/deep/b.wav changed"),
        ("labels.csv", "labels.csv changed"),
        ("other.csv", None),
    ],
)
def test_a_change_of_a_declared_file_is_noticed(folder, name, message):
    record = declared_reads(folder, PATTERNS)
    (folder / name).write_text("other")
    assert first_change(dataclasses.asdict(record), folder) == message


def test_a_file_that_changes_while_the_code_runs_is_refused(folder):
    record = declared_reads(folder, PATTERNS)
    check_unchanged(record, folder, PATTERNS)
    (folder / "labels.csv").write_text("other")
    with pytest.raises(RecipeError, match="data.reads: labels.csv changed while it was read; build again"):
        check_unchanged(record, folder, PATTERNS)


@pytest.mark.parametrize("pattern", ["none.h5", "none/*", "empty", "a\0b", "x" * 300])
def test_a_pattern_without_a_file_is_refused(folder, pattern):
    (folder / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"data\.reads: .* matches no file"):
        declared_reads(folder, [pattern])


def test_a_file_outside_of_the_recipe_has_its_whole_path(folder):
    recipe_dir = folder / "recipe"
    recipe_dir.mkdir()
    assert set(declared_reads(recipe_dir, ["../labels.csv"]).files) == {str(folder / "labels.csv")}
