# SPDX-License-Identifier: Apache-2.0
"""The recipe: TOML to ``domain.recipe``, checked as a whole."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from edgekd.config import distill_rules
from edgekd.config.reader import SAFE_NAME, Reader, check_unique, display_path, join_key, read_toml
from edgekd.domain.budget import Budget
from edgekd.domain.recipe import EntryPoint, Evaluate, Recipe, TargetOverrides, Teacher, TensorSpec
from edgekd.domain.scheme import Quantize, needs_calibration
from edgekd.errors import RecipeError

_MAX_AXES = 8  # of numpy, ONNX and TFLite, TFLite has the fewest
_MAX_ELEMENTS = 2**28  # of one sample of an input: 1 GiB of float32
WEIGHTS = (".bin", ".ckpt", ".pkl", ".pt", ".pth", ".safetensors", ".tar", ".th")
PROGRAMS = (".pt2", ".ts")  # whole models that can do what any program can
WHOLE_MODELS = (".onnx", ".pt2", ".safetensors", ".ts")


def load_recipe(path: Path) -> Recipe:
    """Return a recipe.

    Raises:
        RecipeError: all problems of the file.
    """
    document = read_toml(path, "recipe", "edgekd init writes one")
    reader = Reader(display_path(path))
    target_tables = document.pop("target", {})
    recipe: Recipe | None = reader.table(Recipe, document)
    targets = _read_targets(reader, target_tables)
    _check_recipe(reader, path.parent)
    if reader.problems or recipe is None:
        raise RecipeError(*reader.problems)
    return dataclasses.replace(recipe, target=targets)


def _read_targets(reader: Reader, tables: object) -> dict[str, TargetOverrides]:
    """Read ``[target.NAME.budget]`` and ``[target.NAME.quantize]``; absent keys are those of the whole recipe."""
    if not isinstance(tables, dict):
        reader.problem("target", "expected tables [target.NAME.budget] and [target.NAME.quantize]")
        return {}
    defaults = {"budget": reader.parsed.get("budget", Budget()), "quantize": reader.parsed.get("quantize", Quantize())}
    targets = {}
    for name, table in tables.items():
        key = join_key("target", name)
        if not SAFE_NAME.fullmatch(name):
            reader.problem(key, f"no target can have the name {name!r}; expected letters, digits, '.', '_' and '-'")
        if not isinstance(table, dict):
            reader.problem(key, f"expected the tables [{key}.budget] and [{key}.quantize]")
            continue
        reader.refuse_unknown(table, defaults, key)
        settings = {
            part: reader.table(type(default), table[part], f"{key}.{part}", default) if part in table else default
            for part, default in defaults.items()
        }
        targets[name] = TargetOverrides(**settings)
    return targets


def _check_recipe(reader: Reader, folder: Path) -> None:
    """Check what spans several fields, in each part that is valid."""
    _check_files(reader, folder)
    for key, teacher in reader.all_parsed(Teacher):
        sources = {name for name in ("model", "weights", "file", "train") if getattr(teacher, name) is not None}
        if sources not in ({"model", "weights"}, {"model", "train"}, {"file"}):
            listed = " and ".join(sorted(sources)) or "nothing"
            reader.problem(key, f"has {listed}; expected model and weights, or model and train, or file alone")
        _check_trust(reader, key, teacher)
    names: set[str] = set()
    for key, spec in reader.all_parsed(TensorSpec):
        _check_input(reader, key, spec)
        if not spec.name.isprintable():
            reader.problem(f"{key}.name", f"{spec.name!r} has characters that cannot be shown; expected printable ones")
        if spec.name in names:
            reader.problem(f"{key}.name", f"{spec.name!r} is the name of another input; expected a different name for each")
        names.add(spec.name)
    distill_rules.check(reader)
    _check_evaluate(reader)
    for key, quantize in reader.all_parsed(Quantize):
        _check_quantize(reader, key, quantize)


def _check_quantize(reader: Reader, key: str, quantize: Quantize) -> None:
    for field, items in (("schemes", quantize.schemes), ("runtimes", quantize.runtimes)):
        if items != "auto":
            check_unique(reader, f"{key}.{field}", items)
    if quantize.io == "int8" and quantize.schemes != "auto" and not any(map(needs_calibration, quantize.schemes)):
        reader.problem(f"{key}.io", "'int8', but none of the schemes is static; expected \"float32\", or static_wi8_ai8 in schemes")


def _check_input(reader: Reader, key: str, spec: TensorSpec) -> None:
    if spec.shape[0] != 1:
        reader.problem(f"{key}.shape", f"starts with {spec.shape[0]}; expected 1, the batch axis of a model on a device")
    if len(spec.shape) > _MAX_AXES:
        reader.problem(f"{key}.shape", f"has {len(spec.shape)} axes; expected at most {_MAX_AXES}")
    elif (elements := math.prod(spec.shape)) > _MAX_ELEMENTS:
        reader.problem(f"{key}.shape", f"has {elements} elements; expected at most {_MAX_ELEMENTS}, 1 GiB of float32 per sample")


def _check_trust(reader: Reader, key: str, teacher: Teacher) -> None:
    is_program = teacher.file is not None and Path(teacher.file).suffix in PROGRAMS
    if is_program and not teacher.trusted:
        problem = f"{teacher.file!r} is a program, which can read and write files when it runs; expected an ONNX file, or model and weights"
        reader.problem(f"{key}.file", f"{problem}; if you trust it, set {key}.trusted = true")
    if teacher.trusted and not is_program:
        reader.problem(f"{key}.trusted", f"is for a file that is a program ({', '.join(PROGRAMS)}); expected no such key")


def _check_files(reader: Reader, folder: Path) -> None:
    for key, entry in reader.all_parsed(EntryPoint):
        _check_file(reader, key, folder, entry.file)
    for key, teacher in reader.all_parsed(Teacher):
        files = [("weights", teacher.weights, WEIGHTS), ("file", teacher.file, WHOLE_MODELS)]
        files += [(f"checkpoints[{index}]", name, WEIGHTS) for index, name in enumerate(teacher.checkpoints)]
        for field, name, suffixes in files:
            if name is None:
                continue
            if name.endswith(".index.json"):
                problem = f"{name!r} is the index of weights in several files; join them: load each, update one dict, and save it"
                reader.problem(f"{key}.{field}", problem)
            elif Path(name).suffix not in suffixes:
                reader.problem(f"{key}.{field}", f"{name!r}; expected a file that ends in {', '.join(suffixes)}")
            else:
                _check_file(reader, f"{key}.{field}", folder, name)


def _check_file(reader: Reader, key: str, folder: Path, name: str) -> None:
    try:
        if (folder / name).is_dir():
            reader.problem(key, f"{name!r}: is a folder; expected a file in it")
        elif not (folder / name).is_file():
            reader.problem(key, f"{name!r}: no such file beside the recipe")
    except OSError as error:
        reader.problem(key, f"{name!r}: cannot be read: {error.strerror}")


def _check_evaluate(reader: Reader) -> None:
    for key, evaluate in reader.all_parsed(Evaluate):
        if evaluate.metric == "top1":
            continue
        if evaluate.score is not None:
            reader.problem(f"{key}.score", f"excludes {key}.metric; expected one of the two")
        by_class = next((name for name, budget in reader.all_parsed(Budget) if budget.max_class_drop_pp is not None), None)
        if by_class is not None:
            expected = f'{key}.metric = "top1" or {key}.score'
            reader.problem(f"{by_class}.max_class_drop_pp", f"needs a score for each sample; expected {expected}")
