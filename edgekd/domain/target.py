# SPDX-License-Identifier: Apache-2.0
"""The target: a data profile, ``targets/*.toml``. Field names are the keys of the file, and carry their units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from edgekd.domain.rules import Between, Name, NonEmpty, OneOf
from edgekd.domain.scheme import SCHEMES

DEVICE_KINDS = ("adb", "local", "qemu", "ssh")
ARCHES = ("aarch64", "armv7l", "x86_64")


@dataclass(frozen=True, slots=True)
class Cpu:
    """The processor. ``features`` are names as ``/proc/cpuinfo`` spells them; ``lacks`` are those it must not have."""

    isa: Annotated[str, NonEmpty()]
    core: Annotated[str, NonEmpty()]
    cores: Annotated[int, Between(1)]
    mhz: Annotated[int, Between(1)]
    features: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Limits:
    """Physics: what one process may take on the device."""

    memory_mib: Annotated[int, Between(1)]
    storage_mib: Annotated[int, Between(1)]


@dataclass(frozen=True, slots=True)
class RuntimeEntry:
    """A runtime that may execute the model there; ``threads`` lists the settings to measure."""

    name: Annotated[str, NonEmpty()]
    package: Annotated[str, NonEmpty()]
    threads: Annotated[tuple[Annotated[int, Between(1)], ...], NonEmpty()]
    version: str | None = None
    delegate: str | None = None


@dataclass(frozen=True, slots=True)
class DeviceEntry:
    """How such a device is reached; hosts, keys and serials come from the user, never from a profile."""

    kinds: Annotated[tuple[Annotated[str, OneOf("a device kind", DEVICE_KINDS)], ...], NonEmpty()]
    arch: Annotated[str, OneOf("an architecture", ARCHES)]
    qemu_cpu: str | None = None


@dataclass(frozen=True, slots=True)
class Protocol:
    """How latency is measured; ``min_*`` bind absolute measurements."""

    warmup_runs: Annotated[int, Between(1)]
    min_runs: Annotated[int, Between(1)]
    min_seconds: Annotated[float, Between(0)]
    governor: str | None = None
    max_temp_c: Annotated[int, Between(1)] | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """One profile, complete in itself. A value that the file gives as ``native`` is read from this machine."""

    schema: Annotated[int, Between(1, 1)]
    name: Annotated[str, Name()]
    title: Annotated[str, NonEmpty()]
    cpu: Cpu
    limits: Limits
    runtimes: Annotated[tuple[RuntimeEntry, ...], NonEmpty()]
    schemes: Annotated[tuple[Annotated[str, OneOf("a scheme", SCHEMES)], ...], NonEmpty()]
    device: DeviceEntry
    protocol: Protocol
