# SPDX-License-Identifier: Apache-2.0
"""Recipes and target profiles: TOML to domain, all errors at once with file and key; finds profiles."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import registry
from edgekd.domain.recipe import Budget, Entry, ForTarget, Loss, Quantize, Recipe
from edgekd.domain.target import Target
from edgekd.domain.units import bytes_to_mib
from edgekd.errors import RecipeError, expected_one_of
from edgekd.reader import Reader

if TYPE_CHECKING:
    from collections.abc import Mapping

NATIVE = "native"
WEIGHTS = (".bin", ".pt", ".pth", ".safetensors")
WHOLE_MODELS = (".onnx", ".pt2", ".ts")
DEFAULT_TEMPERATURE = 4.0  # Hinton et al. and the CIFAR-100 tables since


def load_recipe(path: Path) -> Recipe:
    """Return a recipe.

    Raises:
        RecipeError: all that is wrong with it.
    """
    found = _read_toml(path, "recipe", "edgekd init writes one")
    reader = Reader(_shown(path))
    tables = found.get("target", {})
    recipe: Recipe | None = reader.table(Recipe, {key: value for key, value in found.items() if key != "target"})
    if recipe is not None:
        recipe = dataclasses.replace(recipe, distill=_with_temperatures(recipe), target=_for_targets(reader, recipe, tables))
        _check_recipe(reader, recipe, path.parent)
    if reader.problems or recipe is None:
        raise RecipeError(*reader.problems)
    return recipe


def load_target(name: str, facts: Mapping[str, Any] | None = None) -> Target:
    """Return a target profile, by name or by path; ``facts`` of this machine stand in for ``native``.

    Raises:
        RecipeError: all that is wrong with it.
    """
    path = find_target(name)
    found = _read_toml(path, "target profile", "edgekd targets lists them")
    reader = Reader(_shown(path))
    if facts is None:
        from edgekd.harness import runner

        facts = runner.facts()
    target: Target | None = reader.table(Target, _resolve_native(found, facts))
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
    if name not in target_names():
        raise RecipeError(f"target '{name}': no such profile; {expected_one_of(name, target_names())}; name your own by its path")
    return path


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
        return tomllib.loads(path.read_text(encoding="utf-8"))
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


def _shown(path: Path) -> str:
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _with_temperatures(recipe: Recipe) -> Any:
    losses = tuple(
        dataclasses.replace(loss, temperature=DEFAULT_TEMPERATURE) if loss.kind == "kl" and loss.temperature is None else loss
        for loss in recipe.distill.losses
    )
    return dataclasses.replace(recipe.distill, losses=losses)


def _for_targets(reader: Reader, recipe: Recipe, tables: object) -> dict[str, ForTarget]:
    if not isinstance(tables, dict):
        reader.problem("target", "expected tables [target.NAME.budget] and [target.NAME.quantize]")
        return {}
    read = {}
    for name, table in tables.items():
        key = f"target.{name}"
        if not isinstance(table, dict):
            reader.problem(key, f"expected the tables [{key}.budget] and [{key}.quantize]")
            continue
        for unknown in table.keys() - {"budget", "quantize"}:
            reader.problem(f"{key}.{unknown}", f"unknown key; {expected_one_of(unknown, ('budget', 'quantize'))}")
        budget = reader.table(Budget, table.get("budget", {}), f"{key}.budget", recipe.budget)
        quantize = reader.table(Quantize, table.get("quantize", {}), f"{key}.quantize", recipe.quantize)
        if budget is not None and quantize is not None:
            read[name] = ForTarget(budget, quantize)
    return read


def _check_recipe(reader: Reader, recipe: Recipe, folder: Path) -> None:
    _check_files(reader, recipe, folder)
    teacher = recipe.teacher
    given = {key for key in ("model", "weights", "file", "train") if getattr(teacher, key) is not None}
    if given not in ({"model", "weights"}, {"model", "train"}, {"file"}):
        found = " and ".join(sorted(given)) or "nothing"
        reader.problem("teacher", f"has {found}; expected model and weights, or model and train, or file alone")
    names = [spec.name for spec in recipe.student.inputs]
    for index, spec in enumerate(recipe.student.inputs):
        if spec.shape[0] != 1:
            reader.problem(
                f"student.inputs[{index}].shape", f"starts with {spec.shape[0]}; expected 1, the batch axis of a model on a device"
            )
        if names.index(spec.name) != index:
            reader.problem(f"student.inputs[{index}].name", f"'{spec.name}' is named twice; expected a name for each input")
    kinds = [loss.kind for loss in recipe.distill.losses]
    for index, loss in enumerate(recipe.distill.losses):
        _check_loss(reader, loss, f"distill.losses[{index}]", again=kinds.index(loss.kind) != index)
    _check_evaluate(reader, recipe)
    for key, quantize in [
        ("quantize", recipe.quantize),
        *((f"target.{name}.quantize", item.quantize) for name, item in recipe.target.items()),
    ]:
        if isinstance(quantize.schemes, str) and quantize.schemes != "auto":
            reader.problem(f"{key}.schemes", f"'{quantize.schemes}'; expected \"auto\" or an array of schemes")
        if isinstance(quantize.runtimes, str) and quantize.runtimes != "auto":
            reader.problem(f"{key}.runtimes", f"'{quantize.runtimes}'; expected \"auto\" or an array of runtimes")
        for field in ("schemes", "runtimes"):
            if getattr(quantize, field) == ():
                reader.problem(f"{key}.{field}", 'is empty; expected "auto" or at least one item')


def _check_files(reader: Reader, recipe: Recipe, folder: Path) -> None:
    training = recipe.teacher.train
    entries = {
        "data.splits": recipe.data.splits,
        "teacher.model": recipe.teacher.model,
        "teacher.train.augment": training.augment if training else None,
        "student.model": recipe.student.model,
        "evaluate.metric": recipe.evaluate.metric,
        "evaluate.score": recipe.evaluate.score,
    }
    for key, entry in entries.items():
        if isinstance(entry, Entry) and not (folder / entry.file).is_file():
            reader.problem(key, f"{entry.file}: no such file beside the recipe")
    for key, name, suffixes in (("weights", recipe.teacher.weights, WEIGHTS), ("file", recipe.teacher.file, WHOLE_MODELS)):
        if name is None:
            continue
        if Path(name).suffix not in suffixes:
            reader.problem(f"teacher.{key}", f"'{name}'; expected a file that ends in {', '.join(suffixes)}")
        elif not (folder / name).is_file():
            reader.problem(f"teacher.{key}", f"{name}: no such file beside the recipe")


def _check_loss(reader: Reader, loss: Loss, key: str, *, again: bool) -> None:
    if again:
        reader.problem(f"{key}.kind", f"'{loss.kind}' is there twice; expected each loss once")
    if loss.kind == "ce" and loss.temperature is not None:
        reader.problem(f"{key}.temperature", "ce has no temperature; expected it in a kl loss")


def _check_evaluate(reader: Reader, recipe: Recipe) -> None:
    metric, score = recipe.evaluate.metric, recipe.evaluate.score
    if isinstance(metric, str) and metric != "top1":
        reader.problem("evaluate.metric", f"'{metric}'; expected \"top1\" or 'file.py:function'")
    if isinstance(metric, Entry) and score is not None:
        reader.problem("evaluate.score", "excludes evaluate.metric; expected one of the two")
    budgets = [recipe.budget, *(item.budget for item in recipe.target.values())]
    if isinstance(metric, Entry) and any(budget.max_class_drop_pp is not None for budget in budgets):
        reader.problem("budget.max_class_drop_pp", 'needs a score for each sample; expected evaluate.metric = "top1" or evaluate.score')


def _check_target(reader: Reader, target: Target, path: Path) -> None:
    if path.parent == _profiles() and target.name != path.stem:
        reader.problem("name", f"'{target.name}'; expected the file's name, '{path.stem}'")
    names = [entry.name for entry in target.runtimes]
    for index, entry in enumerate(target.runtimes):
        key = f"runtimes[{index}]"
        if not registry.knows("runtimes", entry.name):
            known = registry.names("runtimes")
            reader.problem(f"{key}.name", f"'{entry.name}' is not a runtime; {expected_one_of(entry.name, known)}")
        if names.index(entry.name) != index:
            reader.problem(f"{key}.name", f"'{entry.name}' is there twice; expected each runtime once")
        if len(set(entry.threads)) != len(entry.threads):
            reader.problem(f"{key}.threads", f"{list(entry.threads)} has a number twice; expected each once")
    if len(set(target.schemes)) != len(target.schemes):
        reader.problem("schemes", "has a scheme twice; expected each once")


def _resolve_native(found: dict[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Replace ``native`` by what this machine is; a clock that cannot be read is told as 1 MHz, a fact that binds nothing."""
    stands = {
        ("cpu", "isa"): facts["instruction_set"],
        ("cpu", "core"): facts["core"],
        ("cpu", "cores"): facts["cores"],
        ("cpu", "mhz"): facts["mhz"] or 1,
        ("cpu", "features"): facts["features"],
        ("limits", "memory_mib"): int(bytes_to_mib(facts["memory_bytes"] or 0)),
        ("limits", "storage_mib"): int(bytes_to_mib(facts["storage_bytes"] or 0)),
        ("device", "arch"): facts["arch"],
    }
    read = dict(found)
    for (table, key), value in stands.items():
        if isinstance(read.get(table), dict) and read[table].get(key) == NATIVE:
            read[table] = {**read[table], key: value}
    runtimes = read.get("runtimes")
    if isinstance(runtimes, list):
        read["runtimes"] = [_resolve_threads(entry, facts["cores"]) if isinstance(entry, dict) else entry for entry in runtimes]
    return read


def _resolve_threads(entry: dict[str, Any], cores: int) -> dict[str, Any]:
    threads = entry.get("threads")
    if not isinstance(threads, list) or NATIVE not in threads:
        return entry
    return {**entry, "threads": list(dict.fromkeys(cores if item == NATIVE else item for item in threads))}
