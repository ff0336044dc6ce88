# SPDX-License-Identifier: Apache-2.0
"""Which of the devices that the user named measures which target; they are asked before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgekd import config, registry
from edgekd.domain.device import ChosenDevice
from edgekd.errors import UnavailableError, UsageError
from edgekd.harness import runner

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgekd.domain.device import DeviceSpec
    from edgekd.domain.target import RuntimeEntry, Target
    from edgekd.plan import Plan
    from edgekd.ports import Connection


def choose(plan: Plan, specs: Sequence[DeviceSpec], log: Callable[[str], None]) -> dict[str, ChosenDevice]:
    """Return the device of each target that a named one fits, by the target's name.

    A device fits the targets whose profile has its kind and architecture, and whose features it has. One that fits none is an error,
    and so are two for one target. Other targets are built as they are without a device, which is logged.

    Raises:
        UsageError: if a target has two devices, or no target is reached by a device's kind.
        UnavailableError: if a device cannot be reached, differs from the profiles, or lacks a runtime.
    """
    chosen: dict[str, ChosenDevice] = {}
    for spec in specs:
        log(f"device {spec.label}: asks for its facts")
        with registry.device(spec.kind).connect(spec) as connection:
            fitting = _fitting_targets(plan.targets, connection)
            for target in fitting:
                if target.name in chosen:
                    raise UsageError(
                        f"target {target.name}: {chosen[target.name].spec.label} and {spec.label} both fit it; expected one --device for it"
                    )
                runtimes = {candidate.runtime for candidate in plan.candidates[target.name]}
                entries = [entry for entry in target.runtimes if entry.name in runtimes]
                chosen[target.name] = ChosenDevice(spec, connection.facts(), _versions(connection, entries))
                log(f"target {target.name}: is measured on {spec.label}")
                cores = chosen[target.name].facts["cores"]
                if cores != target.cpu.cores:
                    log(f"warning: {spec.label} has {cores} cores for a process, the profile {target.name} says {target.cpu.cores}")
    if specs:
        for target in plan.targets:
            if target.name not in chosen:
                log(f"target {target.name}: no device that was named fits it; it is built as without --device")
    return chosen


def check(target: Target, connection: Connection) -> None:
    """Check that a device is of a target's kind.

    Raises:
        UsageError: if the target is not reached by the device's kind.
        UnavailableError: if the device differs from the profile.
    """
    _fitting_targets([target], connection)


def check_unchanged(device: ChosenDevice, connection: Connection) -> None:
    """Check that a device is the one that the build began with.

    Raises:
        UnavailableError: if not.
    """
    before, now = (runner.identity(facts) for facts in (device.facts, connection.facts()))
    if before != now:
        changes = ", ".join(f"{key} {before[key]} -> {now[key]}" for key in before if before[key] != now[key] and key != "features")
        raise UnavailableError(
            f"device {connection.label}: is not the machine that it was when the build began ({changes or 'its CPU features changed'}); "
            "build again"
        )


def _fitting_targets(targets: Sequence[Target], connection: Connection) -> list[Target]:
    """Return the targets that a device fits.

    Raises:
        UsageError: if there is none, and none is reached by its kind.
        UnavailableError: if there is none, with the differences.
    """
    reached = [target for target in targets if connection.kind in target.device.kinds]
    if not reached:
        kinds = "; ".join(f"{target.name} is reached by {' or '.join(target.device.kinds)}" for target in targets)
        raise UsageError(f"device {connection.label}: {kinds}; expected --target with a profile whose device.kinds has {connection.kind}")
    facts = connection.facts()
    differences = {target.name: config.why_not_of_its_kind(target, facts, connection.label) for target in reached}
    fitting = [target for target in reached if differences[target.name] is None]
    if not fitting:
        text = "; ".join(str(difference) for difference in differences.values())
        raise UnavailableError(f"device {connection.label}: is not what the profile says: {text}; name another device, or another --target")
    return fitting


def _versions(connection: Connection, entries: Sequence[RuntimeEntry]) -> Mapping[str, str | None]:
    """Return the versions of runtimes on a device, by distribution.

    Raises:
        UnavailableError: if one is missing.
    """
    packages = {entry.package: _alternatives(entry) for entry in entries}
    versions: Mapping[str, Any] = connection.versions(sorted({*packages, *(name for names in packages.values() for name in names)}))
    for package, alternatives in packages.items():
        if not any(versions[name] for name in (package, *alternatives)):
            names = " or ".join(dict.fromkeys([package, *alternatives]))
            raise UnavailableError(
                f"device {connection.label}: its Python has no {names}; run there: python3 -m pip install {package}, "
                "in the Python that device uses (python = ... in devices.toml)"
            )
    return versions


def _alternatives(entry: RuntimeEntry) -> tuple[str, ...]:
    return registry.runtime(entry.name).ALTERNATIVES
