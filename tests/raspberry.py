# SPDX-License-Identifier: Apache-2.0
"""A "Raspberry Pi 4" of real parts: a real sshd whose logins run ARM64 programs of a Debian folder (scripts/arm64.sh) under qemu.

It is emulated, so its times are no latency of any board. What it shows is that everything works with ARM64 code.
"""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests import sshd

ROOT = Path(os.environ.get("EDGEKD_TEST_ARM64") or Path(__file__).parents[1] / "build" / "arm64") / "root"
TOOLS = ("proot", "qemu-aarch64-static")
CORES = 4
CPUINFO = """\
processor\t: {}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

"""
LOGIN = """\
#!/bin/sh
export QEMU_CPU=cortex-a72 PATH=/usr/bin:/bin HOME=/home/pi
exec proot -q qemu-aarch64-static -r {root} -b /dev -b /proc -b {folder}/cpuinfo:/proc/cpuinfo \\
  -b {folder}/tmp -b {folder}/home -w /home/pi /bin/sh -c "$SSH_ORIGINAL_COMMAND"
"""


@contextmanager
def running(folder):
    """Start the board in an empty folder; yields its :class:`sshd.Sshd` and its device. Skip if a part is missing, but not in CI."""
    missing = [name for name in TOOLS if shutil.which(name) is None] + [str(ROOT)] * (not ROOT.is_dir())
    if missing:
        text = f"{', '.join(missing)} missing; run: apt-get install proot qemu-user-static && bash scripts/arm64.sh build/arm64"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(text)
    (folder / "cpuinfo").write_text("".join(map(CPUINFO.format, range(CORES))) + "Model\t\t: Raspberry Pi 4 Model B Rev 1.4\n")
    login = folder / "login"
    login.write_text(LOGIN.format(root=ROOT, folder=folder))
    login.chmod(0o755)
    with sshd.running(folder, f"ForceCommand {login}") as server:
        yield server, replace(server.spec, python="python3")
