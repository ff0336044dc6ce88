# SPDX-License-Identifier: Apache-2.0
"""The layout of the package: few modules at the top, and stages, runtimes and devices each in their folder."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "edgekd"
MAX_TOP_MODULES = 12


def test_at_most_twelve_modules_are_beside_the_folders():
    modules = sorted(path.name for path in PACKAGE.glob("*.py"))
    assert "cli.py" in modules
    assert len(modules) <= MAX_TOP_MODULES, modules


def test_a_unit_test_is_where_its_module_is():
    """``tests/unit`` mirrors ``edgekd``: each test file has a module or a package of its name, or one that it begins with."""
    tests = sorted((PACKAGE.parent / "tests" / "unit").rglob("test_*.py"))
    assert len(tests) > 50
    outside = []
    for path in tests:
        folder = path.parent.relative_to(PACKAGE.parent / "tests" / "unit")
        if folder.parts[:1] == ("examples",):
            continue
        stem = path.stem.removeprefix("test_")
        names = {module.stem for module in (PACKAGE / folder).glob("*.py")} | {
            package.parent.name for package in (PACKAGE / folder).glob("*/__init__.py")
        }
        if not any(stem == name or stem.startswith(f"{name}_") for name in names):
            outside.append(str(path.relative_to(PACKAGE.parent)))
    assert outside == []


def test_no_folder_of_tests_is_skipped(pytestconfig):
    """Pytest skips folders by their names, ``build`` by default, without a word."""
    folders = {part for path in (PACKAGE.parent / "tests").rglob("test_*.py") for part in path.relative_to(PACKAGE.parent).parts[:-1]}
    patterns = pytestconfig.getini("norecursedirs")
    assert "build" in folders
    assert [name for name in sorted(folders) if any(fnmatch(name, pattern) for pattern in patterns)] == []
