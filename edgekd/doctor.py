# SPDX-License-Identifier: Apache-2.0
"""What of the environment is missing for which work, and the command that mends it: ``edgekd doctor``."""

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
from typing import TYPE_CHECKING

from edgekd.errors import UnavailableError
from edgekd.harness import runner
from edgekd.kd.training import execution
from edgekd.store.digests import tool_version

if TYPE_CHECKING:
    from collections.abc import Sequence

BUILD = "build"
# distribution -> (module, what it is for, the command that brings it)
PACKAGES = {
    "ai-edge-litert": ("ai_edge_litert.interpreter", "measuring and evaluating .tflite", "pip install 'edgekd[litert]'"),
    "onnxruntime": ("onnxruntime", "measuring and evaluating .onnx", "pip install 'edgekd[onnx]'"),
    "torch": ("torch", BUILD, "pip install 'edgekd[build]'"),
    "onnx": ("onnx", BUILD, "pip install 'edgekd[build]'"),
    "onnxscript": ("onnxscript", BUILD, "pip install 'edgekd[build]'"),
    "onnxsim": ("onnxsim", BUILD, "pip install 'edgekd[build]'"),
    "optuna": ("optuna", BUILD, "pip install 'edgekd[build]'"),
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
    """One thing that was looked at; ``mend`` is the command, or the deed, for what is missing. ``needed``: a build cannot do without."""

    name: str
    ok: bool
    found: str
    needed: bool
    mend: str | None = None


def check(cache: Path, *, deep: bool) -> list[Finding]:
    """Return what was found; ``deep`` imports each package in a process of its own."""
    packages, tools = (_package(name, deep=deep) for name in PACKAGES), (_tool(name) for name in TOOLS)
    return [_python(), *packages, *tools, _cache(cache), _temp(), *_machine()]


def as_text(findings: Sequence[Finding]) -> str:
    """Return the findings as lines."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        mark = "ok     " if finding.ok else "MISSING" if finding.needed else "note   "
        lines.append(
            f"{mark}  {finding.name:<{width}}  {finding.found}"
            + ("" if finding.ok or not finding.mend else f"; to mend it: {finding.mend}")
        )
    return "\n".join(lines) + "\n"


def as_json(findings: Sequence[Finding]) -> str:
    """Return the findings as JSON."""
    return json.dumps([asdict(finding) for finding in findings], indent=1, sort_keys=True) + "\n"


def exit_code(findings: Sequence[Finding]) -> int:
    """Return 0, or that of a missing tool if something is missing that a build needs."""
    return 0 if all(finding.ok or not finding.needed for finding in findings) else UnavailableError.exit_code


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", sys.version_info >= (3, 11), version, needed=True, mend="install Python 3.11 or newer")


def _package(name: str, *, deep: bool) -> Finding:
    module, purpose, mend = PACKAGES[name]
    version = tool_version(name)
    if version is None:
        return Finding(name, ok=False, found=f"not installed: {purpose}", needed=True, mend=mend)
    least = _least(name)
    if least is not None and _numbers(version) < _numbers(least):
        return Finding(name, ok=False, found=f"{version}; edgekd needs at least {least}", needed=True, mend=f"{mend} --upgrade")
    if deep:
        tried = subprocess.run([sys.executable, "-P", "-c", f"import {module}"], capture_output=True, text=True, check=False)
        if tried.returncode != 0:
            said = (tried.stderr.strip().splitlines() or ["nothing said"])[-1]
            return Finding(name, ok=False, found=f"{version}, but cannot be imported: {said}", needed=True, mend=mend)
    return Finding(name, ok=True, found=version, needed=True)


def _least(name: str) -> str | None:
    """Return the lowest version that our own package declares for another."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        declared = requires("edgekd") or []
    except PackageNotFoundError:  # run from its source, without being installed
        return None
    found = (re.match(rf"{re.escape(name)}>=([0-9.]+)", line) for line in declared)
    return next((match[1] for match in found if match), None)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])[:3]))


def _tool(name: str) -> Finding:
    path = shutil.which(name)
    return Finding(name, path is not None, path or "not installed: devices that are not this machine", needed=False, mend=TOOLS[name])


def _cache(folder: Path) -> Finding:
    mend = "edgekd cache prune --max-gib 5, or set EDGEKD_CACHE to another folder"
    return _folder("cache", folder, MIN_FREE_BYTES, mend)


def _temp() -> Finding:
    return _folder("temporary", Path(tempfile.gettempdir()), MIN_TEMP_BYTES, "free space there, or set TMPDIR to another folder")


def _folder(name: str, folder: Path, least_bytes: int, mend: str) -> Finding:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    found = f"{folder}, {free / 2**30:.1f} GiB free of at least {least_bytes / 2**30:g}" + ("" if writable else ", not writable")
    return Finding(name, writable and free >= least_bytes, found, needed=True, mend=mend)


def _machine() -> list[Finding]:
    facts = runner.facts()
    found = [Finding("processor", ok=True, found=f"{facts['cpu_model']}, {facts['cores']} cores, {facts['instruction_set']}", needed=False)]
    here = ", ".join(f"{kind} ({name})" for kind, name in execution.accelerators().items())
    found.append(Finding("accelerator", ok=True, found=here or "none that the installed torch can use", needed=False))
    quiet = (facts["load"] or 0) < facts["cores"] / 2
    found.append(Finding("load", quiet, f"{facts['load']}", needed=False, mend="end other work before you measure"))
    steady = facts["governor"] in {"performance", "unknown"}
    found.append(Finding("governor", steady, f"{facts['governor']}", needed=False, mend="cpupower frequency-set --governor performance"))
    clock = CLOCK.read_text(encoding="utf-8").strip() if CLOCK.is_file() else "unknown"
    mend = "boot with clocksource=tsc; short latencies are not to be trusted with this one"
    found.append(Finding("clock", clock not in SLOW_CLOCKS, clock, needed=False, mend=mend))
    return found
