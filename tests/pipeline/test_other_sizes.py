# SPDX-License-Identifier: Apache-2.0
"""Students of other sizes, distilled in addition to the one that ships."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

from tests import toy

MODELS = """\
def student():
    return nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3))
def wide():
    return nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 3))
"""


def test_the_report_shows_the_accuracy_and_the_cost_of_other_sizes(tmp_path):
    text = toy.RECIPE.replace("[distill]", '[distill]\nsizes = ["models.py:teacher", "models.py:wide"]')
    for name, content in {"edgekd.toml": text, "models.py": toy.MODELS + MODELS, "data.py": toy.DATA}.items():
        (tmp_path / name).write_text(content)
    environment = {**os.environ, "EDGEKD_CACHE": str(tmp_path / "cache"), "EDGEKD_LOCK_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "edgekd", "build", "--target", "host", "--json"]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode in {0, 1, 4}, process.stderr
    (document,) = json.loads(process.stdout)
    (note,) = [note for note in document["notes"] if note.startswith("sizes, on validation")]
    counts = dict(re.findall(r"models.py:(\w+) \((\d+) parameters\)", note))
    assert counts == {"teacher": "15", "student": "19", "wide": "75"}
    assert list(counts) == ["teacher", "student", "wide"]  # by size
    assert re.search(r"; the smallest within 3 pp is models.py:\w+$|; none is within 3 pp: try larger ones$", note)
    [sizes] = [row for row in document["cost"]["parts"] if row["part"] == "sizes"]
    assert min(sizes["seconds"], sizes["samples"], sizes["bytes"]) > 0
