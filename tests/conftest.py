# SPDX-License-Identifier: Apache-2.0
"""Every test gets a cache and a lock folder of its own, and no colour."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _own_folders(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EDGEKD_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("EDGEKD_LOCK_DIR", str(tmp_path_factory.mktemp("locks")))
    monkeypatch.setenv("NO_COLOR", "1")
