# SPDX-License-Identifier: Apache-2.0
"""The target: a profile, ``targets/*.toml``. Field names are the keys of the file, and carry their units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from edgekd.domain.rules import Between, Name, NonEmpty, OneOf, OrNative, Threads
from edgekd.domain.scheme import SCHEMES

DEVICE_KINDS = ("adb", "local", "qemu", "ssh")
ARCHES = ("aarch64", "armv7l", "x86_64")


@dataclass(frozen=True, slots=True)
class Cpu:
    """The CPU.

    Attributes:
        isa: Instruction set, such as "armv8-a" or "x86-64-v3".
        core: Name of the core.
        cores: Number of cores.
        mhz: Clock in MHz.
        features: Features that the CPU must have, as in ``/proc/cpuinfo``.
        lacks: Features that the CPU must not have, because other kernels would run.
    """

    isa: Annotated[str, NonEmpty(), OrNative()]
    core: Annotated[str, NonEmpty(), OrNative()]
    cores: Annotated[int, Between(1), OrNative()]
    mhz: Annotated[int, Between(1), OrNative()]
    features: Annotated[tuple[str, ...], OrNative()] = ()
    lacks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Limits:
    """Physical limits: what one process may use on the device.

    Attributes:
        memory_mib: RAM in MiB.
        storage_mib: Storage in MiB.
    """

    memory_mib: Annotated[int, Between(1), OrNative()]
    storage_mib: Annotated[int, Between(1), OrNative()]


@dataclass(frozen=True, slots=True)
class RuntimeEntry:
    """A runtime that can execute the model on the target.

    Attributes:
        name: Name of the runtime.
        package: Distribution that provides it on the device.
        threads: Thread counts to measure; "native" is the number of cores.
        version: Version specifier of the package.
        delegate: Delegate or execution provider.
    """

    name: Annotated[str, NonEmpty()]
    package: Annotated[str, NonEmpty()]
    threads: Annotated[tuple[Annotated[int, Threads, OrNative()], ...], NonEmpty()]
    version: str | None = None
    delegate: str | None = None


@dataclass(frozen=True, slots=True)
class DeviceEntry:
    """How a device is reached. Hosts, keys and serial numbers come from the user, never from a profile.

    Attributes:
        kinds: Device kinds.
        arch: Architecture, as ``uname -m`` prints it.
        qemu_cpu: CPU model for QEMU.
    """

    kinds: Annotated[tuple[Annotated[str, OneOf("a device kind", DEVICE_KINDS)], ...], NonEmpty()]
    arch: Annotated[str, OneOf("an architecture", ARCHES), OrNative()]
    qemu_cpu: str | None = None


@dataclass(frozen=True, slots=True)
class Protocol:
    """How latency is measured.

    Attributes:
        warmup_runs: Inferences before the first that counts.
        min_runs: Minimum number of inferences of an absolute measurement.
        min_seconds: Minimum duration of an absolute measurement, in seconds.
        governor: Expected frequency governor; another one is noted in the report.
        max_temp_c: Highest temperature before a measurement, in degrees Celsius; a hotter machine is noted in the report.
    """

    warmup_runs: Annotated[int, Between(1)]
    min_runs: Annotated[int, Between(1)]
    min_seconds: Annotated[float, Between(0)]
    governor: str | None = None
    max_temp_c: Annotated[int, Between(1)] | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """A target profile, complete in itself. A value that is "native" in the file is read from this machine.

    Attributes:
        schema: Version of this format.
        name: Name of the target; that of the file in a profile of edgekd.
        title: The target in words.
        cpu: The CPU.
        limits: Physical limits.
        runtimes: Runtimes that can execute the model.
        schemes: Numeric formats that the runtimes support there.
        device: How a device is reached.
        protocol: How latency is measured.
    """

    schema: Annotated[int, Between(1, 1)]
    name: Annotated[str, Name()]
    title: Annotated[str, NonEmpty()]
    cpu: Cpu
    limits: Limits
    runtimes: Annotated[tuple[RuntimeEntry, ...], NonEmpty()]
    schemes: Annotated[tuple[Annotated[str, OneOf("a scheme", SCHEMES)], ...], NonEmpty()]
    device: DeviceEntry
    protocol: Protocol
