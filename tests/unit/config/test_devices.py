# SPDX-License-Identifier: Apache-2.0
"""Devices by name: on the command line and in ``devices.toml``."""

from __future__ import annotations

import pytest

from edgekd import config
from edgekd.domain.device import DeviceSpec
from edgekd.errors import RecipeError


@pytest.fixture(autouse=True)
def user_folder(monkeypatch, tmp_path):
    """Return the user's configuration folder, which is empty."""
    folder = tmp_path / "user" / "edgekd"
    folder.mkdir(parents=True)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder.parent))
    return folder


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("local", DeviceSpec("local")),
        ("ssh:bench-3", DeviceSpec("ssh", "bench-3")),
        ("ssh:pi@bench-3.lan", DeviceSpec("ssh", "pi@bench-3.lan")),
        ("ssh:pi@10.0.0.7:2222", DeviceSpec("ssh", "pi@10.0.0.7", 2222)),
        ("ssh:pi@[fe80::1%eth0]:22", DeviceSpec("ssh", "pi@fe80::1%eth0", 22)),
        ("ssh:[::1]", DeviceSpec("ssh", "::1")),
    ],
)
def test_a_device_on_the_command_line(text, spec):
    assert config.find_device(text) == spec


@pytest.mark.parametrize(
    "text",
    [
        "ssh:",
        "ssh:-oProxyCommand=id",
        "ssh:pi@-oProxyCommand=id",
        "ssh:-lroot@host",
        "ssh:pi@host;id",
        "ssh:pi@$(id)",
        "ssh:pi@ho st",
        "ssh:pi@host\n",
        "ssh:pi@host:0",
        "ssh:pi@host:65536",
        "ssh:pi@host:port",
        "ssh:pi@::1",
        "local:pi@host",
    ],
)
def test_an_address_that_ssh_or_a_shell_could_misread_is_refused(text):
    with pytest.raises(RecipeError, match="^device '"):
        config.find_device(text)


def test_an_unknown_kind_names_those_that_exist():
    with pytest.raises(RecipeError, match=r"^device 'shh:pi@host': 'shh' is not a device kind; expected one of local, ssh \(did you mean"):
        config.find_device("shh:pi@host")


def test_a_name_is_looked_up_beside_the_recipe_and_then_in_the_users_folder(tmp_path, user_folder):
    (tmp_path / "devices.toml").write_text('[bench-3]\nkind = "ssh"\naddress = "pi@first"\nport = 2222\nssh_config = "ssh/config"\n')
    (user_folder / "devices.toml").write_text(
        '[bench-3]\nkind = "ssh"\naddress = "pi@second"\n[bench-4]\nkind = "ssh"\naddress = "bench-4"\npython = "env/bin/python3"\n'
    )
    assert config.find_device("bench-3", tmp_path) == DeviceSpec("ssh", "pi@first", 2222, ssh_config=str(tmp_path / "ssh" / "config"))
    assert config.find_device("bench-3") == DeviceSpec("ssh", "pi@second")
    assert config.find_device("bench-4", tmp_path) == DeviceSpec("ssh", "bench-4", python="env/bin/python3")


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(RecipeError, match=r"^device 'bench-3': there is no devices.toml beside the recipe or in .*; expected local, or"):
        config.find_device("bench-3", tmp_path)
    (tmp_path / "devices.toml").write_text('[bench-4]\nkind = "ssh"\naddress = "bench-4"\n')
    with pytest.raises(RecipeError, match=r"devices.toml; expected one of bench-4, local \(did you mean 'bench-4'\?\), or ssh:user@host"):
        config.find_device("bench-3", tmp_path)


def test_all_problems_of_a_file_are_reported(tmp_path):
    (tmp_path / "devices.toml").write_text(
        '[a]\nkind = "ssh"\naddress = "-oProxyCommand=id"\n[b]\nkind = "serial"\n[c]\nkind = "ssh"\naddress = "c"\nport = 0\nhost = "c"\n'
    )
    with pytest.raises(RecipeError) as caught:
        config.find_device("a", tmp_path)
    problems = "\n".join(caught.value.problems)
    assert "a.address: '-oProxyCommand=id' is not an address" in problems
    assert "b.kind: 'serial' is not a device kind" in problems
    assert "c.port: 0 is out of range" in problems
    assert "c.host: unknown key" in problems
