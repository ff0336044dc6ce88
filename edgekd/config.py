# SPDX-License-Identifier: Apache-2.0
"""Recipes and target profiles: TOML to domain, all errors at once with file and key; finds profiles."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import distill_rules, registry
from edgekd.domain.recipe import Budget, Entry, Evaluate, ForTarget, Quantize, Recipe, Teacher, TensorSpec
from edgekd.domain.scheme import needs_calibration
from edgekd.domain.target import Target
from edgekd.domain.units import bytes_to_mib
from edgekd.errors import RecipeError, expected_one_of
from edgekd.reader import SAFE_NAME, Reader, join

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NATIVE = "native"
WEIGHTS = (".bin", ".pt", ".pth", ".safetensors")
WHOLE_MODELS = (".onnx", ".pt2", ".safetensors", ".ts")


def load_recipe(path: Path) -> Recipe:
    """Return a recipe.

    Raises:
        RecipeError: all that is wrong with it.
    """
    found = _read_toml(path, "recipe", "edgekd init writes one")
    reader = Reader(_shown(path))
    tables = found.pop("target", {})
    recipe: Recipe | None = reader.table(Recipe, found)
    targets = _for_targets(reader, tables)
    _check_recipe(reader, path.parent)
    if reader.problems or recipe is None:
        raise RecipeError(*reader.problems)
    return dataclasses.replace(recipe, target=targets)


def load_target(name: str, facts: Mapping[str, Any] | None = None) -> Target:
    """Return a target profile, by name or by path; ``facts`` of this machine stand in for ``native``.

    Raises:
        RecipeError: all that is wrong with it.
    """
    path = find_target(name)
    found = _read_toml(path, "target profile", "edgekd targets lists them")
    reader = Reader(_shown(path))
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
    packaged = Path(__file__).parent / "_targets"  # in the wheel; a checkout has them beside the package
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "targets"


def _read_toml(path: Path, what: str, advice: str) -> dict[str, Any]:
    shown = _shown(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a byte order mark
    except FileNotFoundError:
        raise RecipeError(f"{shown}: no such {what}; {advice}") from None
    except IsADirectoryError:
        raise RecipeError(f"{shown}: is a folder; expected a {what}, a TOML file") from None
    except OSError as error:
        raise RecipeError(f"{shown}: the {what} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{shown}: is not UTF-8 at byte {error.start}; expected a {what}, a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{shown}: is no TOML: {str(error)[:1].lower()}{str(error)[1:]}") from None
    except RecursionError:
        raise RecipeError(f"{shown}: is no TOML: nested too deeply") from None
    except ValueError:  # int() refuses more than 4300 digits
        raise RecipeError(f"{shown}: is no TOML: a number has too many digits") from None


def _shown(path: Path) -> str:
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except (ValueError, OSError):  # it lies elsewhere, or the current folder is gone
        return str(path)


def _for_targets(reader: Reader, tables: object) -> dict[str, ForTarget]:
    """Read ``[target.NAME.budget]`` and ``[target.NAME.quantize]`` over what the recipe has for all."""
    if not isinstance(tables, dict):
        reader.problem("target", "expected tables [target.NAME.budget] and [target.NAME.quantize]")
        return {}
    budget, quantize = reader.made.get("budget", Budget()), reader.made.get("quantize", Quantize())
    read = {}
    for name, table in tables.items():
        key = join("target", name)
        if not SAFE_NAME.fullmatch(name):
            reader.problem(key, f"no target can have the name {name!r}; expected letters, digits, '.', '_' and '-'")
        if not isinstance(table, dict):
            reader.problem(key, f"expected the tables [{key}.budget] and [{key}.quantize]")
            continue
        reader.refuse_unknown(table, ("budget", "quantize"), key)
        its_budget = reader.table(Budget, table["budget"], f"{key}.budget", budget) if "budget" in table else budget
        its_quantize = reader.table(Quantize, table["quantize"], f"{key}.quantize", quantize) if "quantize" in table else quantize
        read[name] = ForTarget(its_budget, its_quantize)
    return read


def _check_recipe(reader: Reader, folder: Path) -> None:
    """Check what one field alone cannot say, in each part that could be read."""
    _check_files(reader, folder)
    for key, teacher in reader.all_made(Teacher):
        given = {name for name in ("model", "weights", "file", "train") if getattr(teacher, name) is not None}
        if given not in ({"model", "weights"}, {"model", "train"}, {"file"}):
            found = " and ".join(sorted(given)) or "nothing"
            reader.problem(key, f"has {found}; expected model and weights, or model and train, or file alone")
    names: set[str] = set()
    for key, spec in reader.all_made(TensorSpec):
        if spec.shape[0] != 1:
            reader.problem(f"{key}.shape", f"starts with {spec.shape[0]}; expected 1, the batch axis of a model on a device")
        if spec.name in names:
            reader.problem(f"{key}.name", f"{spec.name!r} is named twice; expected a name for each input")
        names.add(spec.name)
    distill_rules.check(reader)
    _check_evaluate(reader)
    for key, quantize in reader.all_made(Quantize):
        _check_quantize(reader, key, quantize)


def _check_quantize(reader: Reader, key: str, quantize: Quantize) -> None:
    for field, items in (("schemes", quantize.schemes), ("runtimes", quantize.runtimes)):
        if isinstance(items, str):
            if items != "auto":
                reader.problem(f"{key}.{field}", f'{items!r}; expected "auto" or an array of {field}')
        elif not items:
            reader.problem(f"{key}.{field}", 'is empty; expected "auto" or at least one item')
        else:
            _check_once(reader, f"{key}.{field}", items)
    if quantize.io == "int8" and not isinstance(quantize.schemes, str) and not any(map(needs_calibration, quantize.schemes)):
        reader.problem(f"{key}.io", "'int8', but none of the schemes is a static one; expected \"float32\", or static_wi8_ai8 in schemes")


def _check_once(reader: Reader, key: str, items: Sequence[object]) -> None:
    if twice := sorted({str(item) for item in items if items.count(item) > 1}):
        reader.problem(key, f"has {', '.join(twice)} twice; expected each once")


def _check_files(reader: Reader, folder: Path) -> None:
    for key, entry in reader.all_made(Entry):
        _check_file(reader, key, folder, entry.file)
    for key, teacher in reader.all_made(Teacher):
        named = [("weights", teacher.weights, WEIGHTS), ("file", teacher.file, WHOLE_MODELS)]
        named += [(f"checkpoints[{index}]", given, WEIGHTS) for index, given in enumerate(teacher.checkpoints)]
        for name, given, suffixes in named:
            if given is None:
                continue
            if Path(given).suffix not in suffixes:
                reader.problem(f"{key}.{name}", f"{given!r}; expected a file that ends in {', '.join(suffixes)}")
            else:
                _check_file(reader, f"{key}.{name}", folder, given)


def _check_file(reader: Reader, key: str, folder: Path, name: str) -> None:
    try:
        if not (folder / name).is_file():
            reader.problem(key, f"{name!r}: no such file beside the recipe")
    except OSError as error:
        reader.problem(key, f"{name!r}: cannot be read: {error.strerror}")


def _check_evaluate(reader: Reader) -> None:
    for key, evaluate in reader.all_made(Evaluate):
        if isinstance(evaluate.metric, str):
            if evaluate.metric != "top1":
                reader.problem(f"{key}.metric", f"{evaluate.metric!r}; expected \"top1\" or 'file.py:function'")
            continue
        if evaluate.score is not None:
            reader.problem(f"{key}.score", f"excludes {key}.metric; expected one of the two")
        by_class = next((where for where, budget in reader.all_made(Budget) if budget.max_class_drop_pp is not None), None)
        if by_class is not None:
            needed = f'needs a score for each sample; expected {key}.metric = "top1" or {key}.score'
            reader.problem(f"{by_class}.max_class_drop_pp", needed)


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
        _check_once(reader, f"{key}.threads", entry.threads)
    _check_once(reader, "schemes", target.schemes)
    _check_once(reader, "device.kinds", target.device.kinds)
    _check_once(reader, "cpu.features", target.cpu.features)
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
