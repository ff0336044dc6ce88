# SPDX-License-Identifier: Apache-2.0
"""What of the environment is missing for which work, and the command that mends it: ``edgekd doctor``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from edgekd.digests import tool_version
from edgekd.errors import UnavailableError
from edgekd.harness import runner

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

BUILD = "build"
# distribution -> (module, what it is for, the command that brings it)
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


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; ``mend`` is the command for what is missing. ``needed``: a build cannot do without."""

    name: str
    ok: bool
    found: str
    needed: bool
    mend: str | None = None


def check(cache: Path, *, deep: bool) -> list[Finding]:
    """Return what was found; ``deep`` imports each package in a process of its own."""
    return [_python(), *(_package(name, deep=deep) for name in PACKAGES), *(_tool(name) for name in TOOLS), _cache(cache), *_machine()]


def as_text(findings: Sequence[Finding]) -> str:
    """Return the findings as lines."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        mark = "ok     " if finding.ok else "MISSING" if finding.needed else "absent "
        lines.append(
            f"{mark}  {finding.name:<{width}}  {finding.found}" + ("" if finding.ok or not finding.mend else f"; run: {finding.mend}")
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
    if deep:
        tried = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=False)
        if tried.returncode != 0:
            said = (tried.stderr.strip().splitlines() or ["nothing said"])[-1]
            return Finding(name, ok=False, found=f"{version}, but cannot be imported: {said}", needed=True, mend=mend)
    return Finding(name, ok=True, found=version, needed=True)


def _tool(name: str) -> Finding:
    path = shutil.which(name)
    return Finding(name, path is not None, path or "not installed: devices that are not this machine", needed=False, mend=TOOLS[name])


def _cache(folder: Path) -> Finding:
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    ok = os.access(there, os.W_OK) and free >= MIN_FREE_BYTES
    found = f"{folder}, {free / 2**30:.1f} GiB free" + ("" if os.access(there, os.W_OK) else ", not writable")
    return Finding("cache", ok, found, needed=True, mend="edgekd cache prune --max-gib 5, or set EDGEKD_CACHE to another folder")


def _machine() -> list[Finding]:
    facts = runner.facts()
    found = [Finding("processor", ok=True, found=f"{facts['cpu_model']}, {facts['cores']} cores, {facts['instruction_set']}", needed=False)]
    quiet = (facts["load"] or 0) < facts["cores"] / 2
    found.append(Finding("load", quiet, f"{facts['load']}", needed=False, mend="end other work before you measure"))
    steady = facts["governor"] in {"performance", "unknown"}
    found.append(Finding("governor", steady, f"{facts['governor']}", needed=False, mend="cpupower frequency-set --governor performance"))
    return found
