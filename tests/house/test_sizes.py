# SPDX-License-Identifier: Apache-2.0
"""The size and the shape of the code: a file or a function that outgrows its limit is usually two things."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = sorted((ROOT / "edgekd").rglob("*.py"))
CODE = PACKAGE + [path for name in ("tests", "examples", "benchmarks", "scripts") for path in sorted((ROOT / name).rglob("*.py"))]
MAX_LINES, MAX_FUNCTION_LINES = 350, 60
MIN_FILES, MAX_FILES = 30, 165
VAGUE = {"utils", "util", "common", "helpers", "helper", "manager", "managers", "misc"}
REGISTRIES = ("pypi" + ".org", "files.python" + "hosted.org", "deb.debian" + ".org", "registry.npmjs" + ".org")


def _id(path):
    return str(path.relative_to(ROOT))


def _tracked_texts():
    """Yield the text files that git would commit."""
    try:
        listed = subprocess.run(
            [str(shutil.which("git")), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):  # an unpacked source archive: look at the code alone
        listed = "\0".join(_id(path) for path in CODE)
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_file() and path.suffix in {"", ".c", ".md", ".py", ".S", ".sh", ".toml", ".txt"}:
            yield name, path.read_text(encoding="utf-8")


def test_the_package_has_about_a_hundred_files():
    assert MIN_FILES <= len(PACKAGE) <= MAX_FILES


@pytest.mark.parametrize("path", CODE, ids=_id)
def test_a_file_is_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", CODE, ids=_id)
def test_functions_are_short(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {node.name: length for node in functions if (length := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES}
    assert not long


@pytest.mark.parametrize("path", CODE, ids=_id)
def test_a_file_names_its_license_and_its_module_says_what_it_is(path):
    if path.parent.name == "templates":  # becomes the user's own
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# SPDX-License-Identifier: Apache-2.0"
    assert path.stem not in VAGUE


@pytest.mark.parametrize("path", PACKAGE, ids=_id)
def test_no_target_stands_in_code(path):
    names = {profile.stem for profile in (ROOT / "targets").glob("*.toml")} - {"host"}  # host is a word of the command line
    assert len(names) >= 13
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = {id(node.body[0].value) for node in ast.walk(tree) if hasattr(node, "body") and ast.get_docstring(_body_of(node))}
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented
    ]
    assert not [(text, name) for text in texts for name in names if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)]


def _body_of(node):
    return node if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) else ast.Module([], [])


def test_no_file_names_a_package_registry():
    texts = dict(_tracked_texts())
    assert len(texts) > len(PACKAGE) / 2
    assert not [(name, host) for name, text in texts.items() for host in REGISTRIES if host in text]


def test_a_noqa_carries_its_reason():
    bare = re.compile(r"# noqa(?::\s*[A-Z0-9, ]+)?\s*$")
    without_reason = [
        f"{_id(path)}:{number}" for path in CODE for number, line in enumerate(path.read_text().splitlines(), 1) if bare.search(line)
    ]
    assert not without_reason


def test_a_target_profile_is_at_most_45_lines_and_named_as_its_file():
    profiles = sorted((ROOT / "targets").glob("*.toml"))
    assert len(profiles) >= 14
    for path in profiles:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 45, path.name
        assert tomllib.loads(text)["name"] == path.stem


def test_every_python_module_lies_where_the_layers_expect_it():
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    in_layers = {name.strip() for layer in layers for name in layer.split("|")}
    top = {path.stem for path in (ROOT / "edgekd").glob("*.py")} | {path.parent.name for path in (ROOT / "edgekd").glob("*/__init__.py")}
    assert top - {"__init__"} <= in_layers
