# SPDX-License-Identifier: Apache-2.0
"""Target profiles: found by name or path, read, and compared with this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import registry
from edgekd.config.reader import SAFE_NAME, Reader, check_once, display_path, read_toml
from edgekd.domain.target import Target
from edgekd.domain.units import bytes_to_mib
from edgekd.errors import RecipeError, expected_one_of

if TYPE_CHECKING:
    from collections.abc import Mapping

NATIVE = "native"
PACKAGE = Path(__file__).parents[1]


def load_target(name: str, facts: Mapping[str, Any] | None = None) -> Target:
    """Return a target profile, by name or by path; ``facts`` of this machine stand in for ``native``.

    Raises:
        RecipeError: all that is wrong with it.
    """
    path = find_target(name)
    found = read_toml(path, "target profile", "edgekd targets lists them")
    reader = Reader(display_path(path))
    if _has_native(found):
        found = _resolve_native(reader, found, _facts() if facts is None else facts)
    target: Target | None = reader.table(Target, found)
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
        raise RecipeError(f"target '{name}': no such profile; {expected_one_of(name, target_names())}; name your own by its path")
    return path


def is_this_machine(target: Target, facts: Mapping[str, Any]) -> bool:
    """Return whether this machine is one of the target's kind, so that it can be measured here."""
    return why_not_this_machine(target, facts) is None


def why_not_this_machine(target: Target, facts: Mapping[str, Any]) -> str | None:
    """Return why this machine is not one of the target's kind, or None if it is."""
    if "local" not in target.device.kinds:
        return f"{target.name} is reached by {' or '.join(target.device.kinds)}, and no device was named"
    if target.device.arch != facts["arch"]:
        return f"{target.name} is {target.device.arch}, this machine is {facts['arch']}"
    have = set(facts["features"])
    if lacking := sorted(set(target.cpu.features) - have):
        return f"this machine lacks {', '.join(lacking)}, which {target.name} has"
    if surplus := sorted(set(target.cpu.lacks) & have):
        return f"this machine has {', '.join(surplus)}, which {target.name} lacks, so other kernels would run"
    return None


def _profiles() -> Path:
    packaged = PACKAGE / "_targets"  # in the wheel; a checkout has them beside the package
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
            reader.problem(f"{key}.name", f"{entry.name!r} is there twice; expected each runtime once")
        check_once(reader, f"{key}.threads", entry.threads)
    check_once(reader, "schemes", target.schemes)
    check_once(reader, "device.kinds", target.device.kinds)
    check_once(reader, "cpu.features", target.cpu.features)
    if both := sorted(set(target.cpu.features) & set(target.cpu.lacks)):
        reader.problem("cpu.lacks", f"{', '.join(both)} is in cpu.features too; expected it in one of the two")


def _facts() -> Mapping[str, Any]:
    from edgekd.harness import runner

    return runner.facts()  # type: ignore[no-any-return]  # the harness has no types


def _has_native(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_has_native, value.values()))
    return any(map(_has_native, value)) if isinstance(value, list) else value == NATIVE


def _resolve_native(reader: Reader, found: dict[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Replace ``native`` by what this machine is; a clock that cannot be read is told as 1 MHz, a fact that binds nothing."""
    stands = {
        ("cpu", "isa"): facts["instruction_set"],
        ("cpu", "core"): facts["core"],
        ("cpu", "cores"): facts["cores"],
        ("cpu", "mhz"): facts["mhz"] or 1,
        ("cpu", "features"): facts["features"],
        ("limits", "memory_mib"): facts["memory_bytes"] and int(bytes_to_mib(facts["memory_bytes"])),
        ("limits", "storage_mib"): facts["storage_bytes"] and int(bytes_to_mib(facts["storage_bytes"])),
        ("device", "arch"): facts["arch"],
    }
    read = dict(found)
    for (table, key), value in stands.items():
        if isinstance(read.get(table), dict) and read[table].get(key) == NATIVE:
            if value is None:
                reader.problem(f"{table}.{key}", "'native', but this machine does not tell it; expected a number, in a profile of your own")
            read[table] = {**read[table], key: 1 if value is None else value}
    runtimes = read.get("runtimes")
    if isinstance(runtimes, list):
        read["runtimes"] = [_resolve_threads(entry, facts["cores"]) if isinstance(entry, dict) else entry for entry in runtimes]
    return read


def _resolve_threads(entry: dict[str, Any], cores: int) -> dict[str, Any]:
    threads = entry.get("threads")
    if not isinstance(threads, list):
        return entry
    told = cores in threads  # then "native" adds nothing
    return {**entry, "threads": [cores if item == NATIVE else item for item in threads if item != NATIVE or not told]}
