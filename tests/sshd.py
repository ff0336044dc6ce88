# SPDX-License-Identifier: Apache-2.0
"""A real sshd on the loopback address, with keys and folders of its own, as the user that runs the tests."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from edgekd.domain.device import DeviceSpec

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
START_S = 10


@dataclass(frozen=True)
class Sshd:
    """A running sshd. ``home`` is the cache folder of its logins, ``temporary`` their folder for temporary files and locks."""

    folder: Path
    port: int

    @property
    def home(self):
        return self.folder / "home"

    @property
    def temporary(self):
        return self.folder / "tmp"

    @property
    def spec(self):
        return DeviceSpec("ssh", f"{getpass.getuser()}@127.0.0.1", self.port, sys.executable, str(self.folder / "config"))

    def with_config(self, name, text):
        """Return a spec with a line more at the start of its ssh configuration."""
        path = self.folder / name
        path.write_text(f"{text}\n{(self.folder / 'config').read_text()}")
        return replace(self.spec, ssh_config=str(path))

    def with_python(self, name, script):
        """Return a spec whose Python is a shell script."""
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return replace(self.spec, python=str(path))

    def processes(self):
        """Return the processes of logins: they have the sshd's variables."""
        pids = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if f"EDGEKD_LOCK_DIR={self.temporary}".encode() in path.read_bytes():
                    pids.append(int(path.parent.name))
        return pids

    def leftovers(self):
        """Return what runs or lies on the device, except files that are stored by their content."""
        files = [path for folder in (self.home, self.temporary) for path in folder.rglob("*") if path.is_file()]
        stored = self.home / "edgekd" / "device"
        return [str(path) for path in files if path.parent != stored or path.suffix == ".part"] + self.processes()

    def wait_until_clean(self):
        """Wait until nothing runs or lies there; return what does after some seconds."""
        deadline = time.monotonic() + START_S
        while (left := self.leftovers()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return left


def write_key(path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return " ".join(path.with_suffix(".pub").read_text().split()[:2])


@contextmanager
def running(folder, settings=""):
    """Start an sshd in a folder; ``settings`` are further lines of its configuration. Skip if it is not installed, but not in CI."""
    if SSHD is None:
        if os.environ.get("CI"):
            pytest.fail("sshd is not installed; run: apt-get install openssh-server")
        pytest.skip("sshd is not installed; run: apt-get install openssh-server")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # it insists on it as root
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        server = Sshd(folder, probe.getsockname()[1])
    for path in (server.home, server.temporary):
        path.mkdir()
    host_key = write_key(folder / "hostkey")
    write_key(folder / "identity")
    (folder / "authorized_keys").write_text((folder / "identity.pub").read_text())
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{server.port} {host_key}\n")
    (folder / "config").write_text(
        f"IdentityFile {folder}/identity\nIdentitiesOnly yes\nIdentityAgent none\n"
        f"UserKnownHostsFile {folder}/known_hosts\nGlobalKnownHostsFile none\n"
    )
    # another home, so that the login shell reads no start-up files of the user, which may be slow
    variables = f"HOME={folder} EDGEKD_LOCK_DIR={server.temporary} TMPDIR={server.temporary} XDG_CACHE_HOME={server.home}"
    (folder / "sshd_config").write_text(
        f"{settings}\nPort {server.port}\nListenAddress 127.0.0.1\nHostKey {folder}/hostkey\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
        f"KbdInteractiveAuthentication no\nPermitRootLogin yes\nSetEnv {variables}\n"
    )
    process = subprocess.Popen([SSHD, "-D", "-f", str(folder / "sshd_config"), "-E", str(folder / "log")], stdin=subprocess.DEVNULL)
    try:
        _wait_for_port(server.port, process, folder / "log")
        yield server
    finally:
        process.terminate()
        process.wait()
        for pid in server.processes():
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def _wait_for_port(port, process, log):
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    pytest.fail(f"sshd does not listen: {log.read_text() if log.exists() else 'no log'}")
