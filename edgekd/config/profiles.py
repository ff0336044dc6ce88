# SPDX-License-Identifier: Apache-2.0
"""Target profiles: looked up by name or path, read, and compared with this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import registry
from edgekd.config.reader import SAFE_NAME, Reader, check_unique, display_path, read_toml
from edgekd.domain.target import Target
from edgekd.domain.units import bytes_to_mib
from edgekd.errors import RecipeError, expected_one_of

if TYPE_CHECKING:
    from collections.abc import Mapping

NATIVE = "native"
PACKAGE = Path(__file__).parents[1]


def load_target(name: str, facts: Mapping[str, Any] | None = None) -> Target:
    """Return a target profile, by name or by path; ``facts`` of this machine replace ``native``.

    Raises:
        RecipeError: all problems of the file.
    """
    path = find_target(name)
    document = read_toml(path, "target profile", "edgekd targets lists them")
    reader = Reader(display_path(path))
    if _has_native(document):
        document = _resolve_native(reader, document, _machine_facts() if facts is None else facts)
    target: Target | None = reader.table(Target, document)
    if target is not None:
        _check_target(reader, target, path)
    if reader.problems or target is None:
        raise RecipeError(*reader.problems)
    return target


def target_names() -> tuple[str, ...]:
    """Return the names of the profiles that edgekd ships, sorted."""
    return tuple(sorted(path.stem for path in _profiles().glob("*.toml")))


def find_target(name: str) -> Path:
    """Return the file of a target: a path if it looks like one, else a shipped profile's name.

    Raises:
        RecipeError: if there is no such profile.
    """
    if os.sep in name or name.endswith(".toml"):
        return Path(name)
    path = _profiles() / f"{name}.toml"
    if not SAFE_NAME.fullmatch(name) or not path.is_file():
        raise RecipeError(
            f"target '{name}': no such profile; {expected_one_of(name, target_names())}; for a profile of your own, use its path"
        )
    return path


def is_this_machine(target: Target, facts: Mapping[str, Any]) -> bool:
    """Return whether this machine is of the target's kind, so that latency can be measured on it."""
    return why_not_this_machine(target, facts) is None


def why_not_this_machine(target: Target, facts: Mapping[str, Any]) -> str | None:
    """Return why this machine is not of the target's kind, or None if it is."""
    if "local" not in target.device.kinds:
        return f"{target.name} is reached by {' or '.join(target.device.kinds)}, and no device was named"
    return why_not_of_its_kind(target, facts, "this machine")


def why_not_of_its_kind(target: Target, facts: Mapping[str, Any], machine: str) -> str | None:
    """Return how a machine, by its facts, differs from the target's profile, or None: its architecture, else all other differences."""
    if target.device.arch != facts["arch"]:
        return f"{target.name} is {target.device.arch}, {machine} is {facts['arch']}"
    features, differences = set(facts["features"]), []
    if missing := sorted(set(target.cpu.features) - features):
        differences.append(f"{machine} lacks {', '.join(missing)}, which {target.name} has")
    if surplus := sorted(set(target.cpu.lacks) & features):
        differences.append(f"{machine} has {', '.join(surplus)}, which {target.name} lacks, so other kernels would run")
    return "; ".join(differences) or None


def _profiles() -> Path:
    packaged = PACKAGE / "_targets"  # in the wheel; in a checkout they are beside the package
    return packaged if packaged.is_dir() else PACKAGE.parent / "targets"


def _check_target(reader: Reader, target: Target, path: Path) -> None:
    if path.parent == _profiles() and target.name != path.stem:
        reader.problem("name", f"'{target.name}'; expected the file's name, '{path.stem}'")
    names = [entry.name for entry in target.runtimes]
    for index, entry in enumerate(target.runtimes):
        key = f"runtimes[{index}]"
        if not registry.knows("runtimes", entry.name):
            known = registry.names("runtimes")
            reader.problem(f"{key}.name", f"{entry.name!r} is not a runtime; {expected_one_of(entry.name, known)}")
        if names.index(entry.name) != index:
            reader.problem(f"{key}.name", f"{entry.name!r} occurs twice; expected each runtime once")
        check_unique(reader, f"{key}.threads", entry.threads)
    check_unique(reader, "schemes", target.schemes)
    check_unique(reader, "device.kinds", target.device.kinds)
    check_unique(reader, "cpu.features", target.cpu.features)
    if both := sorted(set(target.cpu.features) & set(target.cpu.lacks)):
        reader.problem("cpu.lacks", f"{', '.join(both)} is in cpu.features too; expected it in one of the two")


def _machine_facts() -> Mapping[str, Any]:
    from edgekd.harness import runner

    return runner.facts()  # type: ignore[no-any-return]  # the harness has no types


def _has_native(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_has_native, value.values()))
    return any(map(_has_native, value)) if isinstance(value, list) else value == NATIVE


def _resolve_native(reader: Reader, document: dict[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Replace ``native`` by what this machine is; a clock that cannot be read is 1 MHz, which constrains nothing."""
    values = {
        ("cpu", "isa"): facts["instruction_set"],
        ("cpu", "core"): facts["core"],
        ("cpu", "cores"): facts["cores"],
        ("cpu", "mhz"): facts["mhz"] or 1,
        ("cpu", "features"): facts["features"],
        ("limits", "memory_mib"): facts["memory_bytes"] and int(bytes_to_mib(facts["memory_bytes"])),
        ("limits", "storage_mib"): facts["storage_bytes"] and int(bytes_to_mib(facts["storage_bytes"])),
        ("device", "arch"): facts["arch"],
    }
    resolved = dict(document)
    for (name, key), value in values.items():
        table = resolved.get(name)
        if isinstance(table, dict) and table.get(key) == NATIVE:
            if value is None:
                problem = "'native', but this value cannot be read on this machine; expected a number, in a profile of your own"
                reader.problem(f"{name}.{key}", problem)
            resolved[name] = {**table, key: 1 if value is None else value}
    runtimes = resolved.get("runtimes")
    if isinstance(runtimes, list):
        resolved["runtimes"] = [_resolve_threads(entry, facts["cores"]) if isinstance(entry, dict) else entry for entry in runtimes]
    return resolved


def _resolve_threads(entry: dict[str, Any], cores: int) -> dict[str, Any]:
    threads = entry.get("threads")
    if not isinstance(threads, list):
        return entry
    is_listed = cores in threads  # then "native" adds nothing
    return {**entry, "threads": [cores if item == NATIVE else item for item in threads if item != NATIVE or not is_listed]}
