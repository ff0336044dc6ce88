# SPDX-License-Identifier: Apache-2.0
"""The process: how OpenMP threads wait, unless the user has decided."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = (
    "import os, sys; from edgekd import __main__, cli; cli.run = lambda _: print(os.environ.get('GOMP_SPINCOUNT')) or 0; __main__.main()"
)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_threads_spin_shortly_unless_the_user_has_decided(environment, expected):
    inherited = {name: value for name, value in os.environ.items() if name not in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}}
    command = [sys.executable, "-c", PROGRAM]
    process = subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, check=True)
    assert process.stdout == f"{expected}\n"
