# SPDX-License-Identifier: Apache-2.0
"""Every test has its own cache folder and lock folder, no colour, and no variables of an outer make."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _own_folders(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EDGEKD_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("EDGEKD_LOCK_DIR", str(tmp_path_factory.mktemp("locks")))
    monkeypatch.setenv("NO_COLOR", "1")
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):  # a make in a test must not see the make that runs the tests
        monkeypatch.delenv(name, raising=False)
