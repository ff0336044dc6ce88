# SPDX-License-Identifier: Apache-2.0
"""Devices that the user names: ``ssh:user@host:port`` on the command line, or a name in a ``devices.toml``."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

import platformdirs

from edgekd import registry
from edgekd.config.reader import SAFE_NAME, Reader, display_path, join_key, read_toml
from edgekd.domain.device import DeviceSpec
from edgekd.errors import RecipeError, expected_one_of

if TYPE_CHECKING:
    from pathlib import Path

FILE = "devices.toml"
LOCAL = "local"
# what ssh itself takes, without characters that a shell or an option parser could read otherwise
ADDRESS = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?(?:[A-Za-z0-9_][A-Za-z0-9_.-]*|[0-9A-Fa-f:]*:[0-9A-Fa-f:]*(?:%[A-Za-z0-9_.-]+)?)")
ON_COMMAND_LINE = re.compile(r"(?P<user>[^@\[\]:]*@)?(?:\[(?P<v6>[^\[\]]*)\]|(?P<host>[^@\[\]:]*))(?::(?P<port>[0-9]{1,5}))?")


def find_device(text: str, folder: Path | None = None) -> DeviceSpec:
    """Return the device that a command line names.

    Args:
        text: ``local``, ``ssh:ADDRESS[:PORT]``, or a name in a ``devices.toml``.
        folder: The recipe's. Its ``devices.toml`` comes before that of the user's configuration folder.

    Raises:
        RecipeError: if nothing has this name, or a ``devices.toml`` is wrong: all its problems.
    """
    kind, colon, address = text.partition(":")
    if colon or text == LOCAL:
        return _parse(text, kind, address)
    files = [path / FILE for path in (*([folder] if folder else []), platformdirs.user_config_path("edgekd")) if (path / FILE).is_file()]
    named: dict[str, DeviceSpec] = {}
    for path in reversed(files):
        named |= _read(path)
    if text not in named:
        nowhere = f"there is no {FILE} beside the recipe or in {platformdirs.user_config_path('edgekd')}"
        problem = f"no such name in {' and '.join(map(display_path, files))}" if files else nowhere
        known = expected_one_of(text, [*named, LOCAL]) if named else f"expected {LOCAL}"
        raise RecipeError(f"device '{text}': {problem}; {known}, or ssh:user@host[:port]")
    return named[text]


def _parse(text: str, kind: str, address: str) -> DeviceSpec:
    _check_kind(f"device '{text}'", kind)
    if kind == LOCAL:
        if address:
            raise RecipeError(f"device '{text}': this machine has no address; expected {LOCAL}")
        return DeviceSpec(LOCAL)
    match = ON_COMMAND_LINE.fullmatch(address)
    if match is None:
        raise RecipeError(f"device '{text}': {address!r} is not an address; expected ssh:user@host[:port], or ssh:user@[IPv6]:port")
    spec = DeviceSpec(kind, (match["user"] or "") + (match["v6"] or match["host"]), int(match["port"]) if match["port"] else None)
    if problem := _problem(spec):
        raise RecipeError(f"device '{text}': {problem}")
    return spec


def _check_kind(place: str, kind: str) -> None:
    if not registry.knows("devices", kind):
        raise RecipeError(f"{place}: {kind!r} is not a device kind; {expected_one_of(kind, registry.names('devices'))}")


def _problem(spec: DeviceSpec) -> str | None:
    """Return why a device cannot be reached as it is described."""
    if spec.kind == LOCAL:
        return None
    if not ADDRESS.fullmatch(spec.address):
        return f"{spec.address!r} is not an address; expected user@host, or a host of your ssh configuration"
    if spec.port is not None and not 1 <= spec.port <= 65535:  # noqa: PLR2004  (of TCP)
        return f"port {spec.port} is out of range; expected a number from 1 to 65535"
    return None


def _read(path: Path) -> dict[str, DeviceSpec]:
    """Return the devices of a file; a path of an ssh configuration is relative to it."""
    reader, named = Reader(display_path(path)), {}
    for name, table in read_toml(path, "list of devices", "a table [NAME] with kind and address for each").items():
        key = join_key("", name)
        if not SAFE_NAME.fullmatch(name):
            reader.problem(key, f"{name!r} cannot name a device; expected letters, digits, '.', '_' and '-'")
        spec: DeviceSpec | None = reader.table(DeviceSpec, table, key)
        if spec is None:
            continue
        if not registry.knows("devices", spec.kind):
            reader.problem(f"{key}.kind", f"{spec.kind!r} is not a device kind; {expected_one_of(spec.kind, registry.names('devices'))}")
        elif problem := _problem(spec):
            reader.problem(f"{key}.address", problem)
        config = None if spec.ssh_config is None else str((path.parent / spec.ssh_config).absolute())
        named[name] = dataclasses.replace(spec, ssh_config=config)
    if reader.problems:
        raise RecipeError(*reader.problems)
    return named
