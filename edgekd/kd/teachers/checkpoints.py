# SPDX-License-Identifier: Apache-2.0
"""Files of weights: what a file is, by its first bytes, and its content without running any of it."""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgekd.errors import RecipeError
from edgekd.kd.modules import read_weights

if TYPE_CHECKING:
    from pathlib import Path

# what torch.load(weights_only=True) raises for files that are damaged or hold no weights
_UNREADABLE = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, EOFError, ImportError, OSError)
_SAVE = "torch.save(model.state_dict(), path)"
_OTHER_FILES = (  # first bytes of files that are often taken for weights
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file itself; run: git lfs pull"),
    (b"<", "is a web page, not the file itself; download it again"),
    (b"\x1f\x8b", "is compressed; unpack it first: gunzip {name}"),
    (b"BZh", "is compressed; unpack it first: bunzip2 {name}"),
    (b"\xfd7zXZ", "is compressed; unpack it first: unxz {name}"),
    (b"\x28\xb5\x2f\xfd", "is compressed; unpack it first: zstd -d {name}"),
    (b"\x89HDF", f"is an HDF5 file; load it in your own code, and save the weights with {_SAVE}"),
    (b"\x93NUMPY", f"is an array of numpy; load it in your own code, and save the weights with {_SAVE}"),
)
_SCRIPT = "is a TorchScript archive, a program; name it teacher.file, with the suffix .ts and trusted = true, or save its weights: {save}"
_PROGRAM = "is a program of torch.export; name it teacher.file, with the suffix .pt2 and trusted = true, or save its weights: {save}"
# classes without code of their own that checkpoints hold beside the weights (Lightning's hyper-parameters), and how torch may load them
_HARMLESS = {"argparse.Namespace": "import argparse, torch; torch.serialization.add_safe_globals([argparse.Namespace])"}
_HEAD = 512
_TAR_MAGIC = slice(257, 262)
_MAX_EXPANSION = 8  # torch does not compress, so that weights unpack to what the file has
_FREE_BYTES = 2**24


def read_checkpoint(path: Path) -> Mapping[Any, Any]:
    """Return the mapping that a file of weights holds: a state dict, or a checkpoint with one or more in it.

    Raises:
        RecipeError: if the file is damaged, is of another kind, would run code, unpacks to far more than its size, or holds no mapping.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if problem := _describe_other(head):
        raise RecipeError(f"{path.name}: {problem.format(name=path.name)}")
    if path.suffix == ".safetensors" or _is_safetensors(head, path.stat().st_size):
        return read_weights(path)
    if head.startswith(b"PK"):
        check_archive(path)
    content = _load(path)
    if not isinstance(content, Mapping):
        raise RecipeError(f"{path.name}: holds {type(content).__name__}; expected a state dict: {_SAVE}")
    return content


def _describe_other(head: bytes) -> str | None:
    """Return what is wrong with a file that is no weights, by its first bytes."""
    if not head:
        return f"is empty; save the weights again: {_SAVE}"
    if head[_TAR_MAGIC] == b"ustar":
        return "is a tar archive; unpack it first: tar -xf {name}"
    return next((problem for magic, problem in _OTHER_FILES if head.lstrip().startswith(magic)), None)


def _is_safetensors(head: bytes, size: int) -> bool:
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size  # noqa: PLR2004  (the length of the header)


def check_archive(path: Path) -> None:
    """Check a zip archive by the sizes that it declares, and by the names of its files.

    Raises:
        RecipeError: if it is damaged, unpacks to far more than its size, or is no archive of weights.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise RecipeError(f"{path.name}: cannot be read as weights ({type(error).__name__}); save them again: {_SAVE}") from error
    size, unpacked = path.stat().st_size, sum(entry.file_size for entry in entries)
    if unpacked > _MAX_EXPANSION * size + _FREE_BYTES:
        ratio = f"{unpacked / 2**20:,.0f} MiB from {size / 2**20:,.1f} MiB"
        raise RecipeError(f"{path.name}: unpacks to {ratio}; weights that torch saves are not compressed; save them again: {_SAVE}")
    names = [entry.filename for entry in entries]
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise RecipeError(f"{path.name}: {_SCRIPT.format(save='torch.save(torch.jit.load(path).state_dict(), path)')}")
    if any(name.endswith("models/model.json") for name in names):
        raise RecipeError(f"{path.name}: {_PROGRAM.format(save='torch.save(torch.export.load(path).state_dict, path)')}")
    if names and all(name.endswith(".npy") for name in names):
        raise RecipeError(f"{path.name}: is a file of numpy.savez; load it in your own code, and save the weights with {_SAVE}")


def _load(path: Path) -> Any:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about old pickles; all that matters is raised
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        names = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"more than tensors ({names[1]})" if names else "more than tensors"
        remedy = f"save only the weights where the model was trained: {_SAVE}, or as .safetensors"
        if names and (allow := _HARMLESS.get(names[1])):
            remedy = (
                f"save only the weights: {allow}; torch.save(torch.load({path.name!r}, weights_only=True)['state_dict'], 'teacher.pth')"
            )
        raise RecipeError(f"{path.name}: holds {what} and would run code when it is loaded, so it is refused; {remedy}") from error
    except (*_UNREADABLE, struct.error, zipfile.BadZipFile, MemoryError) as error:
        raise RecipeError(f"{path.name}: cannot be read as weights ({type(error).__name__}); save model.state_dict() again") from error
