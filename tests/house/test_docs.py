# SPDX-License-Identifier: Apache-2.0
"""The documents match the code: programs run, paths and links exist, layers and recipe keys are those of the code.

Blocks of ``python`` are run; those of ``py`` need libraries that edgekd does not depend on.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from edgekd.domain.losses import LOSSES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PROGRAMS = [path for path in sorted(DOCS.glob("*.md")) if "```python\n" in path.read_text()]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *(
        path
        for folder in ("docs", "examples", "changelog.d")
        for path in sorted((ROOT / folder).rglob("*.md"))
        if "build" not in path.parts
    ),
]
MAX_DECISION_LINES = 40


def _id(path):
    return str(path.relative_to(ROOT))


def test_all_documents_are_collected():
    assert [path.name for path in PROGRAMS] == ["python.md"]
    assert len(DOCUMENTS) >= 40


@pytest.mark.parametrize("path", PROGRAMS, ids=_id)
def test_programs_run(path, tmp_path):
    program = "\n".join(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
    completed = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr


@pytest.mark.parametrize("path", DOCUMENTS, ids=_id)
def test_paths_exist(path):
    text = path.read_text(encoding="utf-8")
    paths = re.findall(r"`((?:edgekd|tests|benchmarks|scripts|examples|docs|targets)/[\w./-]+)`", text)
    links = [_id((path.parent / link).resolve()) for link in re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", text)]
    missing = [name for name in (*paths, *links) if not re.search(r"\b(NAME|KIND|TARGET|NNNN)", name)]
    assert [name for name in missing if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=_id)
def test_toml_blocks_parse(path):
    for block in re.findall(r"```toml\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        if "{ model, " not in block:
            tomllib.loads(block)


def test_every_loss_is_documented():
    text = (DOCS / "distillation.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == set(LOSSES)
    for kind, options in LOSSES.items():
        for option in options:
            assert re.search(rf"^\| `{kind}` \|.*`{option} = ", text, re.MULTILINE), f"{kind}: {option}"


def test_design_shows_the_layers_of_the_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    text = (DOCS / "design.md").read_text(encoding="utf-8")
    assert "\n".join(contracts[0]["layers"]) in text


def test_decisions_are_numbered_and_short():
    paths = sorted((DOCS / "decisions").glob("*.md"))
    numbers = [path.name[:4] for path in paths]
    assert len(set(numbers)) == len(numbers)
    assert all(number.isdigit() for number in numbers)
    assert [path.name for path in paths if len(path.read_text().splitlines()) > MAX_DECISION_LINES] == []
    assert all(path.read_text().startswith(f"# {path.name[:4]}: ") for path in paths)


def test_changelog_fragments_have_a_known_type():
    types = re.findall(r"^\| `(\w+)` \|", (ROOT / "changelog.d" / "README.md").read_text(), re.MULTILINE)
    names = [path.name for path in (ROOT / "changelog.d").glob("*.md") if path.name != "README.md"]
    assert len(names) >= 20
    assert [name for name in names if not re.fullmatch(rf"[a-z-]+\.({'|'.join(types)})\.md", name)] == []
