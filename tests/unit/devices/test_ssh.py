# SPDX-License-Identifier: Apache-2.0
"""A board over ssh, behind a real sshd on the loopback address: every fault is one error, and leaves nothing on the board."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shutil
import signal
import sys
import venv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgekd import cli
from edgekd.devices import ssh
from edgekd.domain.device import DeviceSpec
from edgekd.errors import HarnessError, UnavailableError
from edgekd.ports import ProcessEnd
from edgekd.stages.measure import harness
from tests import sshd


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with sshd.running(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a file of 2.5 MiB, which is sent in three parts."""
    path = tmp_path_factory.mktemp("model") / "m.bin"
    path.write_bytes(np.random.default_rng(0).bytes(5 * 2**19))
    return path


def _use(spec, model):
    """Use each command of the protocol once."""
    with ssh.connect(spec) as connection:
        connection.versions(["numpy"])
        with connection.lease():
            path = connection.push(model)
            with connection.start() as process:
                facts = json.loads(process.exchange('{"do": "facts"}', 60))
            connection.cpu_seconds()
            assert connection.pull(path) == model.read_bytes()
    return facts["arch"]


def test_a_closed_connection_leaves_only_files_by_their_content(server, model):
    _use(server.spec, model)
    stored = sorted(path.name for path in (server.home / "edgekd" / "device").iterdir())
    assert len(stored) == 2
    assert all(len(name.partition(".")[0]) == 64 for name in stored)
    assert server.leftovers() == []


def test_a_file_is_sent_once_and_again_if_it_is_damaged(server, model, monkeypatch):
    sent, real = [], ssh.Ssh._put
    monkeypatch.setattr(ssh.Ssh, "_put", lambda self, path, name: (sent.append(name), real(self, path, name))[1])
    shutil.rmtree(server.home / "edgekd", ignore_errors=True)

    def push():
        with ssh.connect(server.spec) as connection:
            return Path(connection.push(model)), len(sent)

    path, count = push()
    assert count == 1
    assert push() == (path, 1)
    path.write_bytes(b"damaged")
    assert push() == (path, 2)
    assert path.read_bytes() == model.read_bytes()


def test_what_a_login_shell_prints_before_is_ignored(server, model):
    spec = server.with_python("noisy", f"echo welcome; echo 'edgekd was here'; exec {sys.executable} \"$@\"")
    assert _use(spec, model) == _use(server.spec, model)


def _refused(server):
    return replace(server.spec, port=9)


def _unknown_key(server):
    (server.folder / "no_hosts").write_text("")
    return server.with_config("unknown", f"UserKnownHostsFile {server.folder}/no_hosts")


def _changed_key(server):
    key = sshd.write_key(server.folder / "other_key") if not (server.folder / "other_key").exists() else None
    if key is not None:
        (server.folder / "other_hosts").write_text(f"[127.0.0.1]:{server.port} {key}\n")
    return server.with_config("changed", f"UserKnownHostsFile {server.folder}/other_hosts")


def _no_login(server):
    if not (server.folder / "other_identity").exists():
        sshd.write_key(server.folder / "other_identity")
    text = (server.folder / "config").read_text().replace(f"{server.folder}/identity", f"{server.folder}/other_identity")
    (server.folder / "no_login").write_text(text)
    return replace(server.spec, ssh_config=str(server.folder / "no_login"))


def _unresolved(server):
    return DeviceSpec("ssh", "board.invalid", ssh_config=server.spec.ssh_config)


def _no_python(server):
    return replace(server.spec, python="no-such-python")


def _old_python(server):
    greeting = 'edgekd board {\\"python\\": \\"3.7.3\\", \\"executable\\": \\"/usr/bin/python3\\"}'
    return server.with_python("old", f'echo "{greeting}"')


def _crashing_python(server):
    return server.with_python("crashing", "echo 'Illegal instruction' >&2; exit 132")


def _full_disk(server):
    return server.with_python("full", f'ulimit -f 1024; exec {sys.executable} "$@"')


def _unwritable_folder(server):
    (server.folder / "a_file").write_text("")
    return server.with_python("unwritable", f'XDG_CACHE_HOME={server.folder}/a_file exec {sys.executable} "$@"')


FAULTS = {
    _refused: r"it refused the connection \(.*port 9: Connection refused\); start sshd there, or name another port",
    _unknown_key: r"its host key is not known; check its fingerprint and accept it once: ssh -F \S+/unknown -p \d+ \S+@127.0.0.1 true",
    _changed_key: r"its host key is not the one that is known: .*remove the old key: ssh-keygen .*127.0.0.1",
    _no_login: r"it refused the login \(.*Permission denied \(publickey\).*\); edgekd asks for no password: set up a key with ssh-copy-id",
    _unresolved: r"its name is not known \(.*board.invalid.*\); expected user@host",
    _no_python: r"no-such-python cannot be run there \(.*not found\); install Python 3.9 or newer",
    _old_python: r"/usr/bin/python3 is Python 3.7.3; expected 3.9 or newer; name another with python = ... in devices.toml",
    _crashing_python: r"the connection ended \(Illegal instruction\); check it with: ssh",
    _full_disk: r"put: .*: file too large",
    _unwritable_folder: r"have: .*a_file/edgekd/device/.*: not a directory",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__[1:])
def test_a_fault_is_one_clear_error_and_leaves_nothing(server, model, fault):
    shutil.rmtree(server.home / "edgekd", ignore_errors=True)
    spec = fault(server)
    with pytest.raises(UnavailableError, match=rf"^device {spec.label}: {FAULTS[fault]}") as caught:
        _use(spec, model)
    assert "\n" not in str(caught.value)
    assert server.wait_until_clean() == []


def test_a_machine_without_ssh_says_what_to_install(server, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="ssh is not installed; run: apt-get install openssh-client"), ssh.connect(server.spec):
        pass


def test_a_runtime_that_is_missing_on_the_board_names_the_board_and_the_package(server, tmp_path):
    venv.create(tmp_path / "env")
    spec = replace(server.spec, python=str(tmp_path / "env" / "bin" / "python3"))
    subject = {"id": "m", "runtime": "onnxruntime"}
    with ssh.connect(spec) as connection, harness.start(connection, subject) as process:
        expected = (
            rf"measure: onnxruntime cannot be imported on {spec.label} \(.*No module named 'numpy'\); run on {spec.label}: pip install"
        )
        with pytest.raises(UnavailableError, match=expected):
            process.send(do="open", runtime="onnxruntime", path="m.onnx", threads=1)


def test_a_killed_runner_is_the_error_of_its_model(server):
    with ssh.connect(server.spec) as connection, harness.start(connection, {"id": "m", "runtime": "onnxruntime"}) as process:
        process.send(do="facts")
        os.kill(process.process.number, signal.SIGKILL)
        with pytest.raises(HarnessError, match="measure: m: the harness ended with SIGKILL, as the kernel does when memory runs out; last"):
            process.send(do="facts")
        with harness.start(connection, {"id": "n", "runtime": "onnxruntime"}) as other:
            assert "arch" in other.send(do="facts")


def test_a_runner_that_hangs_is_ended(server, monkeypatch):
    monkeypatch.setattr(ssh, "SIGN_OF_LIFE_S", 0.05)
    with ssh.connect(server.spec) as connection:
        with connection.start() as process:
            os.kill(process.number, signal.SIGSTOP)
            assert process.exchange('{"do": "facts"}', 0.3) == ProcessEnd(None)
        assert not Path(f"/proc/{process.number}").exists()
        assert connection.cpu_seconds() > 0


def test_a_board_that_does_not_reply_is_given_up(server, monkeypatch):
    monkeypatch.setattr(ssh, "GREETING_S", 0.2)
    monkeypatch.setattr(ssh, "SIGN_OF_LIFE_S", 0.1)
    with (
        pytest.raises(UnavailableError, match="it does not reply any more; check it with: ssh"),
        ssh.connect(server.with_python("slow", "exec sleep 3")),
    ):
        pass


def _kill_ssh(connection, server):
    connection.process.kill()


def _kill_session(connection, server):
    """Kill the process of sshd that serves the login."""
    (board,) = [pid for pid in server.processes() if b"exec(s)" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(Path(f"/proc/{board}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)


WRITES = 17  # of _use: the program, each command, and the three parts of the model among them; the last gives the lease back


@pytest.mark.device
@pytest.mark.parametrize(
    ("cut", "number"),
    [(_kill_ssh, number) for number in range(1, WRITES + 1)] + [(_kill_session, number) for number in range(2, WRITES + 1)],
)
def test_a_connection_that_is_cut_at_any_step_leaves_nothing_and_the_next_works(server, model, monkeypatch, cut, number):
    shutil.rmtree(server.home / "edgekd", ignore_errors=True)
    writes, real = [], ssh.Ssh._write

    def write(self, data):
        writes.append(data)
        if len(writes) == number:
            cut(self, server)
        real(self, data)

    monkeypatch.setattr(ssh.Ssh, "_write", write)
    with contextlib.ExitStack() as stack:
        if number < WRITES:
            caught = stack.enter_context(pytest.raises(UnavailableError, match="^device .*: the connection ended"))
        _use(server.spec, model)
    assert number == WRITES or "\n" not in str(caught.value)
    assert server.wait_until_clean() == []
    monkeypatch.undo()
    assert _use(server.spec, model)
    assert server.wait_until_clean() == []


@pytest.mark.device
def test_a_file_system_without_space_is_one_clear_error(server, model):
    script = f'mount -t tmpfs -o size=1m tmpfs {server.home} && exec {sys.executable} "$@"'
    spec = server.with_python("tmpfs", f"exec unshare -rm sh -c '{script}' sh \"$@\"")
    with pytest.raises(UnavailableError, match=rf"^device {spec.label}: put: \S+: no space left on device$"):
        _use(spec, model)
    assert server.wait_until_clean() == []


def test_the_cuts_are_at_every_write(server, model, monkeypatch):
    shutil.rmtree(server.home / "edgekd", ignore_errors=True)
    writes, real = [], ssh.Ssh._write
    monkeypatch.setattr(ssh.Ssh, "_write", lambda self, data: (writes.append(bytes(data[:40])), real(self, data)))
    _use(server.spec, model)
    assert len(writes) == WRITES, writes


def test_the_exit_code_of_a_board_that_cannot_be_reached_is_three(server, model, capsys, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(model.read_bytes())
    assert cli.run(["measure", str(path), "--target", "rpi4", "--device", "ssh:pi@127.0.0.1:9"]) == 3
    error = capsys.readouterr().err.splitlines()
    assert next(line for line in error if line.startswith("edgekd: ")).startswith("edgekd: device ssh:pi@127.0.0.1:9: it refused the conn")


def test_no_option_reaches_ssh_through_a_name():
    arguments = ssh.arguments(DeviceSpec("ssh", "pi@bench", 22))
    assert arguments[-2:] == ["--", "pi@bench"]
    assert "StrictHostKeyChecking=yes" in arguments
    assert "BatchMode=yes" in arguments
    assert ssh.start_command("my python; id", 7).startswith("exec 'my python; id' -c ")


def test_the_configuration_of_a_device_is_used(server, model):
    spec = server.with_config("alias", f"Host bench\n  HostName 127.0.0.1\n  Port {server.port}\nHost *")
    assert _use(replace(spec, address="bench", port=None), model)


def test_a_jump_host_of_the_configuration_is_used(server, model):
    user, alias = getpass.getuser(), f"[127.0.0.1]:{server.port}"
    jump = f"Host jump\n  HostName localhost\n  HostKeyAlias {alias}\n  Port {server.port}\n  User {user}\n"
    bench = f"Host bench\n  HostName 127.0.0.1\n  Port {server.port}\n  ProxyJump jump\nHost *"
    spec = server.with_config("jump", jump + bench)
    assert _use(replace(spec, address="bench", port=None), model)
    assert server.wait_until_clean() == []
