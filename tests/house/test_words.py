# SPDX-License-Identifier: Apache-2.0
"""Names and prose use the words of the field. Words that named something else once, or nothing at all, stay out."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = [path for name in ("edgekd", "tests", "examples", "benchmarks", "scripts") for path in sorted((ROOT / name).rglob("*.py"))]

# names of variables, parameters, attributes, functions and classes that say nothing about their value
BARE_NAMES = {
    *("found", "told", "untold", "kept", "given", "made", "wanted", "seen", "way", "ways", "way_of", "lesson", "lessons"),
    *("conclude", "concluded", "Concluded", "Case", "telling", "Teller", "teller", "Site", "Done", "crew", "orders", "remark", "remarks"),
    *(
        "Way",
        "Form",
        "counted",
        "Beside",
        "beside",
        "selves",
        "sited",
        "placed",
        "laid_out",
        "moved",
        "summed",
        "sureness",
        "Sureness",
        "tops",
    ),
    *("Tops", "vet", "mend", "twin", "twins", "supervise", "supervisors", "Supervisor"),
}
# parts of names, between underscores
NAME_PARTS = {"told", "untold", "twin", "twins", "clothes", "mend", "supervise", "supervisor", "taught", "sureness"}
# text of all files; a pattern, and the word to use
TEXT = {
    r"\bis no (?:TOML|JSON|file|class|tensor)\b": "is not valid TOML, is not a file, ...",
    r"\bone candidate a\b": "one candidate per",
    r"\bthe machine to itself\b": "exclusive access to the machine",
    r"\bshares? the weather\b": "same background load",
    r"\b[Ff]ew clothes\b": "Fashion-MNIST with few labels",
    r"\bclothes\b": "Fashion-MNIST",
    r"\b[Ss]upervise[sd]?\b(?! the student| by)": "the stage soft_targets",
    r"\btwins?\b": "baseline",
    r"\bpaid[ _]back\b|\bwon back\b": "break even",
    r"\banswers_kept\b": "soft_target_storage",
    r"\bstore_answers\b": "save_teacher_logits",
    r"\bway\.json\b": "execution_mode.json",
    r"\bsureness\b": "confidence",
    r"\bat home\b": "in-domain",
    r"\bverdict stands\b": "cached verdict",
    r"\btaught teacher\b|\bteacher(?:s)? (?:is|was|are) taught\b": "trained teacher",
    r"\bthe teacher's answers?\b": "teacher logits, soft targets",
    r"\bpredecessor's selves\b|\bits own earlier selves\b": "auxiliary models",
    r"\bpaid_back_within\b": "break_even_inferences",
    r"\bdistill\.mixing\b": "distill.teacher_weighting",
    r"\bdistill\.control\b": "distill.baselines",
    r"\bstudent\.answers\b": "student.task",
    r"\bremarks?\b": "note, warning",
}
ALLOWED = {"tests/house/test_words.py", "LICENSE", "changelog.d/words.breaking.md"}  # this list; a licence; what was renamed


def _names(tree):
    """Yield each name that a module binds or uses as a keyword or an attribute that it sets, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, ast.ImportFrom | ast.Import):
            for alias in node.names:
                if alias.asname:
                    yield alias.asname, node.lineno


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_say_what_they_name(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bad = [f"{path.name}:{line}: {name}" for name, line in _names(tree) if name in BARE_NAMES or NAME_PARTS & set(name.split("_"))]
    assert bad == []


def _texts():
    listed = subprocess.run(
        [str(shutil.which("git")), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if name not in ALLOWED and path.is_file() and path.suffix in {"", ".c", ".json", ".md", ".py", ".sh", ".toml", ".txt"}:
            yield name, path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def texts():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return dict(_texts())


@pytest.mark.parametrize("pattern", TEXT, ids=TEXT.values())
def test_text_uses_the_words_of_the_field(texts, pattern):
    assert len(texts) > len(CODE)
    hits = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert hits == [], f"use: {TEXT[pattern]}"


@pytest.mark.parametrize(
    ("concept", "place"),
    {
        "execution mode": "edgekd/kd/training/execution.py",
        "soft target": "edgekd/stages/soft_targets.py",
        "EMA": "edgekd/kd/training/callbacks.py",
        "all_gather": "edgekd/kd/training/distributed.py",
        "break-even|break_even": "edgekd/kd/training/epoch_limits.py",
        "pseudo-label": "edgekd/domain/recipe.py",
        "label smoothing": "edgekd/domain/recipe.py",
        "temperature scaling": "edgekd/kd/training/calibrate.py",
        "callback": "edgekd/kd/training/trainer.py",
        "cached verdict": "edgekd/build/judge.py",
        "calibration set": "edgekd/stages/quantize.py",
        "dry run": "edgekd/kd/training/dry_run.py",
        "ensemble": "edgekd/kd/data.py",
        "feature": "edgekd/kd/losses/features.py",
        "domain shift|distribution shift": "edgekd/kd/soft_targets/shift.py",
        "confidence": "edgekd/kd/soft_targets/shift.py",
    }.items(),
)
def test_a_concept_is_where_a_search_for_its_name_leads(concept, place):
    assert re.search(concept, (ROOT / place).read_text(encoding="utf-8"), re.IGNORECASE)
