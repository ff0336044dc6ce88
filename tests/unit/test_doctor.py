# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

from edgekd import doctor


def test_what_is_missing_is_told_with_the_command_that_mends_it(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "tool_version", lambda name: None if name == "onnxsim" else "1.0")
    findings = doctor.check(tmp_path / "cache", deep=False)
    line = next(line for line in doctor.as_text(findings).splitlines() if "onnxsim" in line)
    assert line.startswith("MISSING")
    assert line.endswith("run: pip install 'edgekd[build]'")
    assert doctor.exit_code(findings) == 3


def test_an_optional_tool_that_is_absent_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "tool_version", lambda name: "1.0")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    findings = doctor.check(tmp_path, deep=False)
    assert doctor.exit_code(findings) == 0
    assert "apt-get install adb" in doctor.as_text(findings)


def test_deep_imports_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", {"numpy": ("no_such_module", "x", "mend it"), "click": ("click", "x", "mend it")})
    found = {finding.name: finding for finding in doctor.check(tmp_path, deep=True)}
    assert not found["numpy"].ok
    assert "No module named 'no_such_module'" in found["numpy"].found
    assert found["click"].ok


def test_a_cache_without_room_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 2**80)
    (finding,) = [item for item in doctor.check(tmp_path, deep=False) if item.name == "cache"]
    assert (finding.ok, finding.needed) == (False, True)


def test_json_holds_the_same(tmp_path):
    findings = doctor.check(tmp_path, deep=False)
    assert [row["name"] for row in json.loads(doctor.as_json(findings))] == [finding.name for finding in findings]
