# SPDX-License-Identifier: Apache-2.0
"""This machine as a device."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys


def test_a_harness_ends_when_its_parent_is_killed(tmp_path):
    program = (
        "from edgekd.devices import local\n"
        "from edgekd.domain.device import DeviceSpec\n"
        "with local.connect(DeviceSpec('local')) as connection, connection.start() as process:\n"
        '    process.exchange(\'{"do": "facts"}\', 60); print(process.process.pid, flush=True); input()'
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process = os.pidfd_open(int(parent.stdout.readline()))
    os.kill(parent.pid, signal.SIGKILL)
    assert select.select([process], [], [], 30)[0]
    os.close(process)
    parent.communicate()
