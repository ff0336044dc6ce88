# SPDX-License-Identifier: Apache-2.0
"""A device that a user names: on the command line, or in a ``devices.toml``."""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003  (a field's type)
from dataclasses import dataclass
from typing import Annotated

from edgekd.domain.artifact import Json  # noqa: TC001  (a field's type)
from edgekd.domain.rules import Between, NonEmpty


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """How a device is reached. In a ``devices.toml`` it is a table with the name of the device.

    Attributes:
        kind: A device kind, such as "ssh".
        address: Where it is: user@host of ssh, or a host of the user's ssh configuration; empty for this machine.
        port: The port of ssh, if not that of the configuration.
        python: The Python on the device that has numpy and the runtime; a path that is not absolute starts at the home folder.
        ssh_config: An ssh configuration file instead of the user's own; relative to the ``devices.toml``.
    """

    kind: Annotated[str, NonEmpty()]
    address: str = ""
    port: Annotated[int, Between(1, 65535)] | None = None
    python: Annotated[str, NonEmpty()] = "python3"
    ssh_config: str | None = None

    @property
    def label(self) -> str:
        """Return how messages call the device: as on the command line.

        >>> DeviceSpec("ssh", "pi@bench-3", 2222).label
        'ssh:pi@bench-3:2222'
        """
        return ":".join([self.kind, *filter(None, [self.address]), *([str(self.port)] if self.port else [])])


@dataclass(frozen=True, slots=True)
class ChosenDevice:
    """The device that measures a target.

    Attributes:
        spec: How it is reached.
        facts: What it is, as the runner reads it there.
        versions: Of the target's runtimes there, by distribution; None for one that is not installed.
    """

    spec: DeviceSpec
    facts: Mapping[str, Json]
    versions: Mapping[str, str | None]
