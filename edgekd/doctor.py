# SPDX-License-Identifier: Apache-2.0
"""What is missing in the environment, what it is needed for, and the command that fixes it: ``edgekd doctor``."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import config, registry
from edgekd.errors import RecipeError, UnavailableError
from edgekd.harness import runner
from edgekd.kd.training import execution
from edgekd.store.digests import tool_version

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgekd.domain.device import DeviceSpec
    from edgekd.domain.target import Target

BUILD = "build"
# distribution -> (module, what it is for, the command that installs it)
PACKAGES = {
    "ai-edge-litert": ("ai_edge_litert.interpreter", "measuring and evaluating .tflite", "pip install 'edgekd[litert]'"),
    "onnxruntime": ("onnxruntime", "measuring and evaluating .onnx", "pip install 'edgekd[onnx]'"),
    "torch": ("torch", BUILD, "pip install 'edgekd[build]'"),
    "onnx": ("onnx", BUILD, "pip install 'edgekd[build]'"),
    "onnxscript": ("onnxscript", BUILD, "pip install 'edgekd[build]'"),
    "onnxsim": ("onnxsim", BUILD, "pip install 'edgekd[build]'"),
    "litert-torch": ("litert_torch", BUILD, "pip install 'edgekd[build]'"),
    "ai-edge-quantizer": ("ai_edge_quantizer", BUILD, "pip install 'edgekd[build]'"),
    "safetensors": ("safetensors", BUILD, "pip install 'edgekd[build]'"),
}
TOOLS = {"ssh": "apt-get install openssh-client", "adb": "apt-get install adb", "qemu-aarch64-static": "apt-get install qemu-user-static"}
MIN_FREE_BYTES = 2 * 2**30
MIN_TEMP_BYTES = 256 * 2**20  # converters write a model several times
CLOCK = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
SLOW_CLOCKS = {"acpi_pm", "hpet", "jiffies"}  # reading one costs microseconds, or resolves milliseconds


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check. ``required``: a build needs it; ``fix``: the command or the change that fixes it."""

    name: str
    ok: bool
    detail: str
    required: bool
    fix: str | None = None


def check(cache: Path, devices: Sequence[str] = (), target: str | None = None, *, deep: bool) -> list[Finding]:
    """Return the results of all checks; ``deep`` imports each package in its own process, ``target`` is what devices should be.

    Raises:
        RecipeError: if a device or a target has a name that nothing has, or the target is named without a device.
    """
    if target is not None and not devices:
        raise RecipeError(f"doctor: --target {target} is compared with devices, and none was named; add --device ssh:user@host[:port]")
    profile = None if target is None else config.load_target(target)
    specs = [config.find_device(name, Path.cwd()) for name in devices]
    packages, tools = (_check_package(name, deep=deep) for name in PACKAGES), (_check_tool(name) for name in TOOLS)
    on_devices = [finding for spec in specs for finding in _check_device(spec, profile)]
    return [_check_python(), *packages, *tools, _check_cache(cache), _check_temp(), *_check_machine(), *on_devices]


def as_text(findings: Sequence[Finding]) -> str:
    """Return the findings as lines."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        mark = "ok     " if finding.ok else "MISSING" if finding.required else "note   "
        lines.append(
            f"{mark}  {finding.name:<{width}}  {finding.detail}" + ("" if finding.ok or not finding.fix else f"; fix: {finding.fix}")
        )
    return "\n".join(lines) + "\n"


def as_json(findings: Sequence[Finding]) -> str:
    """Return the findings as JSON."""
    return json.dumps([asdict(finding) for finding in findings], indent=1, sort_keys=True) + "\n"


def exit_code(findings: Sequence[Finding]) -> int:
    """Return 0, or that of a missing tool if something that a build needs is missing."""
    return 0 if all(finding.ok or not finding.required for finding in findings) else UnavailableError.exit_code


def _check_python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", sys.version_info >= (3, 11), version, required=True, fix="install Python 3.11 or newer")


def _check_package(name: str, *, deep: bool) -> Finding:
    module, purpose, fix = PACKAGES[name]
    version = tool_version(name)
    if version is None:
        return Finding(name, ok=False, detail=f"not installed: {purpose}", required=True, fix=fix)
    minimum = _minimum_version(name)
    if minimum is not None and _version_numbers(version) < _version_numbers(minimum):
        return Finding(name, ok=False, detail=f"{version}; edgekd needs at least {minimum}", required=True, fix=f"{fix} --upgrade")
    if deep:
        process = subprocess.run([sys.executable, "-P", "-c", f"import {module}"], capture_output=True, text=True, check=False)
        if process.returncode != 0:
            error = (process.stderr.strip().splitlines() or ["no error message"])[-1]
            return Finding(name, ok=False, detail=f"{version}, but cannot be imported: {error}", required=True, fix=fix)
    return Finding(name, ok=True, detail=version, required=True)


def _minimum_version(name: str) -> str | None:
    """Return the lowest version of a package that edgekd's own metadata allows."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        declared = requires("edgekd") or []
    except PackageNotFoundError:  # run from source, not installed
        return None
    matches = (re.match(rf"{re.escape(name)}>=([0-9.]+)", line) for line in declared)
    return next((match[1] for match in matches if match), None)


def _version_numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])[:3]))


def _check_tool(name: str) -> Finding:
    path = shutil.which(name)
    detail = path or "not installed: needed for devices other than this machine"
    return Finding(name, path is not None, detail, required=False, fix=TOOLS[name])


def _check_cache(folder: Path) -> Finding:
    fix = "edgekd cache prune --max-gib 5, or set EDGEKD_CACHE to another folder"
    return _check_folder("cache", folder, MIN_FREE_BYTES, fix)


def _check_temp() -> Finding:
    return _check_folder("temporary", Path(tempfile.gettempdir()), MIN_TEMP_BYTES, "free space there, or set TMPDIR to another folder")


def _check_folder(name: str, folder: Path, min_bytes: int, fix: str) -> Finding:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    detail = f"{folder}, {free / 2**30:.1f} GiB free, needs {min_bytes / 2**30:g} GiB" + ("" if writable else ", not writable")
    return Finding(name, writable and free >= min_bytes, detail, required=True, fix=fix)


def _check_device(spec: DeviceSpec, target: Target | None) -> list[Finding]:
    """Return what a device is, its state, the runtimes of its Python, and whether it is of a target's kind."""
    runtimes = [registry.runtime(name) for name in registry.names("runtimes")]
    names = [package for runtime in runtimes for package in (runtime.PACKAGE, *runtime.ALTERNATIVES)] + ["numpy"]
    try:
        with registry.device(spec.kind).connect(spec) as connection:
            facts: Any = connection.facts()
            versions = {name: version for name, version in connection.versions(names).items() if version is not None}
    except UnavailableError as error:
        return [Finding(spec.label, ok=False, detail=str(error), required=True)]
    kind = f"{facts['cpu_model']}, {facts['cores']} cores, {facts['instruction_set']}, {facts['libc']}, Python {facts['python']}"
    state = (
        f"governor {facts['governor']}, load {facts['load']}, temperature {facts['temp_c'] or 'unknown'}, throttled {facts['throttled']}"
    )
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    fix = f"python3 -m pip install {' '.join(runtime.PACKAGE for runtime in runtimes)} (on the device)"
    is_steady = facts["governor"] in {"performance", "unknown"}
    governor_fix = "cpupower frequency-set --governor performance (on the device)"
    findings = [
        Finding(spec.label, ok=True, detail=kind, required=True),
        Finding(f"{spec.label} state", is_steady, state, required=False, fix=governor_fix),
        Finding(f"{spec.label} runtimes", bool(set(versions) - {"numpy"}), listed or "none", required=True, fix=fix),
    ]
    if target is not None:
        difference = config.why_not_of_its_kind(target, facts, spec.label)
        detail = difference or f"is of the kind of {target.name}"
        findings.append(Finding(f"{spec.label} target", difference is None, detail, required=True, fix="another --device or --target"))
    return findings


def _check_machine() -> list[Finding]:
    facts = runner.facts()
    cpu = f"{facts['cpu_model']}, {facts['cores']} cores, {facts['instruction_set']}"
    accelerators = ", ".join(f"{kind} ({name})" for kind, name in execution.accelerators().items())
    is_quiet = (facts["load"] or 0) < facts["cores"] / 2
    is_steady = facts["governor"] in {"performance", "unknown"}
    clock = CLOCK.read_text(encoding="utf-8").strip() if CLOCK.is_file() else "unknown"
    clock_fix = "boot with clocksource=tsc; short latencies cannot be trusted with this clock"
    return [
        Finding("cpu", ok=True, detail=cpu, required=False),
        Finding("accelerator", ok=True, detail=accelerators or "none that the installed torch can use", required=False),
        Finding("load", is_quiet, f"{facts['load']}", required=False, fix="stop other processes before measuring"),
        Finding("governor", is_steady, f"{facts['governor']}", required=False, fix="cpupower frequency-set --governor performance"),
        Finding("clock", clock not in SLOW_CLOCKS, clock, required=False, fix=clock_fix),
    ]
