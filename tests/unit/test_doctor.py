# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest

from edgekd import doctor
from edgekd.errors import RecipeError
from edgekd.harness import runner
from tests import sshd


def test_a_missing_package_is_reported_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "tool_version", lambda name: None if name == "onnxsim" else "99.0")
    findings = doctor.check(tmp_path / "cache", deep=False)
    line = next(line for line in doctor.as_text(findings).splitlines() if "onnxsim" in line)
    assert line.startswith("MISSING")
    assert line.endswith("fix: pip install 'edgekd[build]'")
    assert doctor.exit_code(findings) == 3


def test_a_missing_optional_tool_is_not_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "tool_version", lambda name: "99.0")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    findings = doctor.check(tmp_path, deep=False)
    assert doctor.exit_code(findings) == 0
    assert "apt-get install adb" in doctor.as_text(findings)


def test_deep_imports_each_package_in_its_own_process(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", {"numpy": ("no_such_module", "x", "fix it"), "click": ("click", "x", "fix it")})
    findings = {finding.name: finding for finding in doctor.check(tmp_path, deep=True)}
    assert not findings["numpy"].ok
    assert "No module named 'no_such_module'" in findings["numpy"].detail
    assert findings["click"].ok


def test_a_cache_without_free_space_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 2**80)
    (finding,) = [item for item in doctor.check(tmp_path, deep=False) if item.name == "cache"]
    assert (finding.ok, finding.required) == (False, True)


def test_json_holds_the_same(tmp_path):
    findings = doctor.check(tmp_path, deep=False)
    assert [row["name"] for row in json.loads(doctor.as_json(findings))] == [finding.name for finding in findings]


def test_a_version_that_is_too_old_is_reported_with_the_lowest_one_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "tool_version", lambda name: {"torch": "2.8.1+cpu", "onnx": "1.9.1"}.get(name, "99.0"))
    too_old = [finding for finding in doctor.check(tmp_path, deep=False) if finding.required and not finding.ok]
    assert [(finding.name, finding.detail) for finding in too_old] == [
        ("torch", "2.8.1+cpu; edgekd needs at least 2.9"),
        ("onnx", "1.9.1; edgekd needs at least 1.17"),
    ]
    assert too_old[0].fix == "pip install 'edgekd[build]' --upgrade"


@pytest.mark.parametrize(("version", "older"), [("2.9", False), ("2.10.0", False), ("2.13.0+cpu", False), ("2.8.9", True), ("1.99", True)])
def test_versions_are_compared_as_version_numbers(version, older):
    assert (doctor._version_numbers(version) < doctor._version_numbers("2.9")) is older


def test_every_package_has_a_lowest_version():
    assert [name for name in doctor.PACKAGES if doctor._minimum_version(name) is None] == []
    assert doctor._minimum_version("onnx") != doctor._minimum_version("onnxruntime")


def test_a_module_in_the_working_directory_is_not_taken_for_the_installed_package(tmp_path, monkeypatch):
    (tmp_path / "click.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "PACKAGES", {"click": ("click", "x", "fix it")})
    assert next(finding for finding in doctor.check(tmp_path, deep=True) if finding.name == "click").ok


def test_a_cache_that_is_a_file_is_reported(tmp_path):
    (tmp_path / "cache").write_text("")
    (tmp_path / "cache").chmod(0o755)
    (finding,) = [item for item in doctor.check(tmp_path / "cache", deep=False) if item.name == "cache"]
    assert (finding.ok, finding.detail.endswith(", not writable")) == (False, True)
    (below,) = [item for item in doctor.check(tmp_path / "not" / "yet" / "there", deep=False) if item.name == "cache"]
    assert below.detail.startswith(f"{tmp_path}/not/yet/there, ")


@pytest.mark.parametrize(("clock", "ok"), [("tsc\n", True), ("hpet\n", False), ("arch_sys_counter\n", True), (None, True)])
def test_a_slow_clock_is_reported(tmp_path, monkeypatch, clock, ok):
    monkeypatch.setattr(doctor, "CLOCK", tmp_path / "clock")
    if clock:
        (tmp_path / "clock").write_text(clock)
    (finding,) = [item for item in doctor.check(tmp_path, deep=False) if item.name == "clock"]
    assert (finding.ok, finding.required, finding.detail) == (ok, False, (clock or "unknown").strip())


def test_the_accelerator_that_training_would_use_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.execution, "accelerators", lambda: {"cuda": "NVIDIA T1"})
    (finding,) = [item for item in doctor.check(tmp_path, deep=False) if item.name == "accelerator"]
    assert (finding.ok, finding.detail) == (True, "cuda (NVIDIA T1)")


def _device_findings(tmp_path, monkeypatch, toml, target=None):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "devices.toml").write_text(toml)
    return [item for item in doctor.check(tmp_path, ("bench",), target, deep=False) if item.name.startswith("ssh:")]


def test_a_device_is_reported_with_its_state_and_its_runtimes(tmp_path, monkeypatch):
    with sshd.running(tmp_path) as server:
        spec = server.spec
        where = f'address = "{spec.address}"\nport = {spec.port}\npython = "{spec.python}"\nssh_config = "config"\n'
        toml = f'[bench]\nkind = "ssh"\n{where}'
        machine, state, runtimes, target = _device_findings(tmp_path, monkeypatch, toml, "rpi4")
    assert runner.facts()["instruction_set"] in machine.detail
    assert state.detail.startswith("governor ")
    assert "onnxruntime 1." in runtimes.detail
    assert machine.ok
    assert runtimes.ok
    assert (target.ok, target.detail) == (False, f"rpi4 is aarch64, {spec.label} is {runner.facts()['arch']}")


def test_a_target_is_compared_with_a_device_only(tmp_path):
    with pytest.raises(RecipeError, match="doctor: --target rpi4 is compared with devices, and none was named; add --device"):
        doctor.check(tmp_path, target="rpi4", deep=False)


def test_a_device_that_cannot_be_reached_is_a_failure(tmp_path, monkeypatch):
    findings = _device_findings(tmp_path, monkeypatch, '[bench]\nkind = "ssh"\naddress = "pi@127.0.0.1"\nport = 9\n')
    assert ["refused the connection" in finding.detail for finding in findings] == [True]
    assert doctor.exit_code(findings) == 3
