# SPDX-License-Identifier: Apache-2.0
"""Output folders and depfiles that cannot be used are refused before anything is built or written."""

from __future__ import annotations

import os

import pytest

from edgekd import cli
from tests import toy


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return the folder of a recipe."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name, text in (("edgekd.toml", toy.RECIPE), ("data.py", toy.DATA), ("models.py", toy.MODELS)):
        (folder / name).write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("EDGEKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "host"))
    return folder


def _refusal(capsys, *arguments):
    """Return the message of a build that ends with exit code 2."""
    assert cli.run(["build", "--target", "host", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    return output.err


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("/", "/host: is the root of the file system, a folder in it, or your home folder; expected a folder for outputs only"),
        ("../home", "home/host: is the root of the file system, a folder in it, or your home folder"),
        ("../cache/objects", "host: is in the cache"),
        ("", "is empty; expected a path"),
        ("edgekd.toml", "edgekd.toml/host: cannot be written: Not a directory; name another output with --out"),
        ("loop", "loop/host: cannot be written: Too many levels of symbolic links"),
        ("/dev/null", "/dev/null/host: cannot be written: Not a directory"),
        ("x" * 4096, "... (4,101 characters): cannot be written: File name too long"),
        ("a/" * 2040, "cannot be written: File name too long"),
    ],
    ids=lambda text: text[:20],
)
def test_an_output_folder_that_cannot_be_used_is_refused(folder, capsys, out, message):
    (folder / "loop").symlink_to("loop")
    assert message in _refusal(capsys, "--out", out)
    assert not (folder.parent / "home").exists()


def test_the_folder_of_the_recipe_is_no_output_folder(folder, capsys):
    project = folder.rename(folder.with_name("host"))
    os.chdir(project)
    assert "is the recipe's own folder, or has it inside" in _refusal(capsys, "--out", "..")


@pytest.mark.parametrize("name", ["a\nb", "a;b", "a|b", "a\tb", "a\\b", "\x1b[2J"])
def test_an_output_folder_that_make_cannot_read_is_refused(folder, capsys, name):
    message = _refusal(capsys, "--depfile", "model.d", "--out", f"{name}/x")
    assert "cannot be written in a depfile; rename it, or build without --depfile" in message
    assert "\x1b" not in message
    assert sorted(path.name for path in folder.iterdir()) == ["data.py", "edgekd.toml", "models.py"]


@pytest.mark.parametrize(
    ("depfile", "message"),
    [
        ("edgekd.toml", "is a file that the build reads or writes"),
        ("build/host/edgekd.stamp", "is a file that the build reads or writes"),
        ("/dev/null", "is a folder or a device"),
        (".", "is a folder or a device"),
        ("", "is empty; expected a path"),
        ("models.py/x", "cannot be written: "),
    ],
)
def test_a_depfile_in_the_place_of_another_file_is_refused(folder, capsys, depfile, message):
    assert message in _refusal(capsys, "--depfile", depfile)
    assert (folder / "edgekd.toml").read_text() == toy.RECIPE
    assert not (folder / "build").exists()
