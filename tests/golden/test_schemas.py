# SPDX-License-Identifier: Apache-2.0
"""The JSON Schemas that the first lines of examples and target profiles name are those of ``edgekd schema``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgekd.config import schema

ROOT = Path(__file__).parents[2]
FILES = {"recipe": ROOT / "examples" / "edgekd.schema.json", "target": ROOT / "targets" / "target.schema.json"}


@pytest.mark.parametrize("name", schema.DOCUMENTS)
def test_schemas_match_the_golden_files(name):
    text = schema.render(name)
    if os.environ.get("EDGEKD_GOLDEN"):
        FILES[name].write_text(text)
    assert text == FILES[name].read_text()
