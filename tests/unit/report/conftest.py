# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture
def report():
    """Return the report of a build that passed: the golden one, which follows the schema."""
    return json.loads((GOLDEN / "report_pass.json").read_text())
