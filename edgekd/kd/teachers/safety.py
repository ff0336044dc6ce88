# SPDX-License-Identifier: Apache-2.0
"""Safety check of ``torch.export`` files, which can otherwise run arbitrary code when they are loaded.

From the source of torch 2.13: ``torch.export.load`` unpickles weights and constants marked ``use_pickle`` and falls back to plain
pickle for example inputs; it evaluates the strings of symbolic sizes as Python, looks operators up as attributes of
``torch``, and imports modules that a tree specification names. Ordinary files need none of that. What is allowed is
listed here; everything else is refused before torch loads it.
"""

from __future__ import annotations

import ast
import io
import json
import pickle
import re
from typing import TYPE_CHECKING, Any

from edgekd.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_RECORD = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|models/model\.json"
    r"|data/(weights/(weight_\d+|model_weights_config\.json)|constants/(tensor_\d+|model_constants_config\.json)|sample_inputs/model\.pt)"
)
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|quantized_decomposed)\.\w+\.\w+|torch\.sym_\w+|math\.\w+"
    r"|torch\.ops\.higher_order\.(cond|while_loop|wrap_with_autocast|wrap_with_set_grad_enabled)"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|lt|le|gt|ge|eq|ne|and_|or_|not_|getitem)"
)
_NAME = re.compile(r"[\w.]*")
_SYMBOL = re.compile(r"[a-z]+\d+")
_ARITHMETIC = re.compile(
    r"Symbol|Integer|Float|Rational|Mul|Add|Pow|Mod|Max|Min|Abs|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|Identity|true|false"
    r"|Equality|Unequality|StrictLessThan|LessThan|StrictGreaterThan|GreaterThan|Where|ModularIndexing|PythonMod|PowByNatural"
    r"|(Floor|Clean|Ceil)Div|(Ceil|Floor|Trunc|Round)ToInt|ToFloat|TruncToFloat|FloatPow|(Float|Int)TrueDiv|[LR]Shift"
)
_TREES = {None, "builtins.tuple", "builtins.list", "builtins.dict"}
_PARSED = (ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop)
_FREE_TEXT = {
    "as_string",
    "as_strings",
    "metadata",
    "torch_version",
    "guards_code",
}  # never evaluated: guards are off


def check_exported_program(path: Path) -> bytes:
    """Return the bytes of a ``torch.export`` file after a safety check that runs nothing of it.

    Raises:
        RecipeError: if the file is damaged or holds anything but a network and its tensors.
    """
    from torch.export.pt2_archive._package import PT2ArchiveReader

    content = path.read_bytes()
    try:
        archive = PT2ArchiveReader(io.BytesIO(content))
        names = archive.get_file_names()
        unknown = [name for name in names if not _RECORD.fullmatch(name)]
        duplicates = sorted({name for name in names if names.count(name) > 1})
        records = {name: archive.read_bytes(name) for name in names if name.endswith((".json", ".pt"))}
        graph = json.loads(records["models/model.json"])
        tables = [json.loads(records[f"data/{kind}/model_{kind}_config.json"])["config"] for kind in ("weights", "constants")]
    except (RuntimeError, AssertionError, LookupError, ValueError, TypeError) as error:
        message = f"{path.name}: is not a file that torch.export.save of torch 2.9 or later wrote ({type(error).__name__}); save it again"
        raise RecipeError(message) from error
    try:
        problems = [f"it holds {name}" for name in (*unknown, *duplicates)]
        problems += [f"{name} is a pickled object" for table in tables for name, item in table.items() if _is_pickled(item)]
        problems += _example_input_problems(records["data/sample_inputs/model.pt"])
        problems += _string_problems(graph)
    except (LookupError, ValueError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise RecipeError(f"{path.name}: its tables are malformed ({type(error).__name__}); save it again") from error
    if problems:
        refusal = f"{path.name}: could run code when it is loaded, so it is refused: {problems[0]}"
        raise RecipeError(f"{refusal}; use a module with weights as the teacher, or an ONNX file")
    return content


def _is_pickled(item: dict[str, Any]) -> bool:
    return item["use_pickle"] is not False or not re.fullmatch(r"(weight|tensor)_\d+", item["path_name"])


def _example_input_problems(record: bytes) -> list[str]:
    import torch

    try:
        torch.load(io.BytesIO(record), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        return ["its example inputs are a pickle with more than tensors"]
    return []


def _string_problems(value: object, key: str = "") -> Iterator[str]:
    """Yield the strings of a graph that are not harmless; what is allowed depends on the key of the string."""
    if isinstance(value, dict):
        for name, item in value.items():
            if not _NAME.fullmatch(name):
                yield f"the name {name[:80]!r}"
            if name not in _FREE_TEXT:
                yield from _string_problems(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _string_problems(item, key)
    elif isinstance(value, str) and not _is_harmless(value, key):
        yield f"{key} {value[:80]!r}"


def _is_harmless(text: str, key: str) -> bool:
    if key == "expr_str":
        return _is_arithmetic(text)
    if key in {"in_spec", "out_spec"}:
        return _is_plain_tree(json.loads(text)[1])
    if key in {"target", "as_operator"}:
        return _OPERATOR.fullmatch(text) is not None
    return _NAME.fullmatch(text) is not None


def _is_arithmetic(text: str) -> bool:
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError):
        return False
    names = [node.id for node in nodes if isinstance(node, ast.Name)]
    strings = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)]
    return (
        all(isinstance(node, _PARSED) for node in nodes)
        and all(_ARITHMETIC.fullmatch(name) or _SYMBOL.fullmatch(name) for name in names)
        and all(isinstance(string, str) and _SYMBOL.fullmatch(string) for string in strings)
    )


def _is_plain_tree(tree: dict[str, Any]) -> bool:
    context = json.loads(tree["context"]) if tree["context"] is not None else None
    keys = context if isinstance(context, list) else []
    is_plain = context is None or isinstance(context, list)
    are_names = all(isinstance(name, int) or (isinstance(name, str) and name.isidentifier()) for name in keys)
    return tree["type"] in _TREES and is_plain and are_names and all(_is_plain_tree(child) for child in tree["children_spec"])
