# SPDX-License-Identifier: Apache-2.0
"""What the documents show runs: blocks of ``python``; those of ``py`` need libraries that edgekd does not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
SHOWN = [path for path in sorted(DOCS.glob("*.md")) if "```python\n" in path.read_text()]


def test_documents_with_programs_are_found():
    assert [path.name for path in SHOWN] == ["python.md"]


@pytest.mark.parametrize("path", SHOWN, ids=lambda path: path.name)
def test_programs_run(path, tmp_path):
    program = "\n".join(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
