# SPDX-License-Identifier: Apache-2.0
"""The recipe: TOML to ``domain.recipe``, checked as a whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.config import distill_rules
from edgekd.config.reader import SAFE_NAME, Reader, check_once, display_path, join, read_toml
from edgekd.domain.recipe import Budget, EntryPoint, Evaluate, Quantize, Recipe, TargetOverrides, Teacher, TensorSpec
from edgekd.domain.scheme import needs_calibration
from edgekd.errors import RecipeError

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS = (".bin", ".pt", ".pth", ".safetensors")
WHOLE_MODELS = (".onnx", ".pt2", ".safetensors", ".ts")


def load_recipe(path: Path) -> Recipe:
    """Return a recipe.

    Raises:
        RecipeError: all that is wrong with it.
    """
    found = read_toml(path, "recipe", "edgekd init writes one")
    reader = Reader(display_path(path))
    tables = found.pop("target", {})
    recipe: Recipe | None = reader.table(Recipe, found)
    targets = _for_targets(reader, tables)
    _check_recipe(reader, path.parent)
    if reader.problems or recipe is None:
        raise RecipeError(*reader.problems)
    return dataclasses.replace(recipe, target=targets)


def _for_targets(reader: Reader, tables: object) -> dict[str, TargetOverrides]:
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
        read[name] = TargetOverrides(its_budget, its_quantize)
    return read


def _check_recipe(reader: Reader, folder: Path) -> None:
    """Check what one field alone cannot say, in each part that could be read."""
    _check_files(reader, folder)
    for key, teacher in reader.all_parsed(Teacher):
        given = {name for name in ("model", "weights", "file", "train") if getattr(teacher, name) is not None}
        if given not in ({"model", "weights"}, {"model", "train"}, {"file"}):
            found = " and ".join(sorted(given)) or "nothing"
            reader.problem(key, f"has {found}; expected model and weights, or model and train, or file alone")
    names: set[str] = set()
    for key, spec in reader.all_parsed(TensorSpec):
        if spec.shape[0] != 1:
            reader.problem(f"{key}.shape", f"starts with {spec.shape[0]}; expected 1, the batch axis of a model on a device")
        if spec.name in names:
            reader.problem(f"{key}.name", f"{spec.name!r} is named twice; expected a name for each input")
        names.add(spec.name)
    distill_rules.check(reader)
    _check_evaluate(reader)
    for key, quantize in reader.all_parsed(Quantize):
        _check_quantize(reader, key, quantize)


def _check_quantize(reader: Reader, key: str, quantize: Quantize) -> None:
    for field, items in (("schemes", quantize.schemes), ("runtimes", quantize.runtimes)):
        if isinstance(items, str):
            if items != "auto":
                reader.problem(f"{key}.{field}", f'{items!r}; expected "auto" or an array of {field}')
        elif not items:
            reader.problem(f"{key}.{field}", 'is empty; expected "auto" or at least one item')
        else:
            check_once(reader, f"{key}.{field}", items)
    if quantize.io == "int8" and not isinstance(quantize.schemes, str) and not any(map(needs_calibration, quantize.schemes)):
        reader.problem(f"{key}.io", "'int8', but none of the schemes is a static one; expected \"float32\", or static_wi8_ai8 in schemes")


def _check_files(reader: Reader, folder: Path) -> None:
    for key, entry in reader.all_parsed(EntryPoint):
        _check_file(reader, key, folder, entry.file)
    for key, teacher in reader.all_parsed(Teacher):
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
    for key, evaluate in reader.all_parsed(Evaluate):
        if isinstance(evaluate.metric, str):
            if evaluate.metric != "top1":
                reader.problem(f"{key}.metric", f"{evaluate.metric!r}; expected \"top1\" or 'file.py:function'")
            continue
        if evaluate.score is not None:
            reader.problem(f"{key}.score", f"excludes {key}.metric; expected one of the two")
        by_class = next((where for where, budget in reader.all_parsed(Budget) if budget.max_class_drop_pp is not None), None)
        if by_class is not None:
            needed = f'needs a score for each sample; expected {key}.metric = "top1" or {key}.score'
            reader.problem(f"{by_class}.max_class_drop_pp", needed)
