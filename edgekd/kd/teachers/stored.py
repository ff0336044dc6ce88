# SPDX-License-Identifier: Apache-2.0
"""A teacher that is not here: its answers to samples, stored by what the samples are, so that order does not matter."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from edgekd.errors import RecipeError
from edgekd.store.digests import write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np

_NAMES = {"digests", "outputs"}
_BYTES = 16


def save_teacher_logits(path: Path, inputs: Sequence[np.ndarray], outputs: np.ndarray) -> None:
    """Write a teacher's answers, for ``teacher.file`` of a recipe; equal answers give equal bytes.

    All samples of all splits go into one file, views too if there are any. A sample is known again by its bytes, so the
    inputs must be exactly those that the recipe's splits give.

    Args:
        path: Ends in ``.safetensors``.
        inputs: One array (n, ...) for each input of the student, in order and of its type.
        outputs: Logits.

    Raises:
        RecipeError: if shapes do not fit, an answer is not finite, or a sample is there twice with two answers.

    Shapes:
        outputs: (n, C).
    """
    import numpy as np
    from safetensors.numpy import save

    if path.suffix != ".safetensors":
        raise RecipeError(f"{path.name}: stored answers end in .safetensors")
    if outputs.ndim != 2 or any(len(item) != len(outputs) for item in inputs):  # noqa: PLR2004  (n, C)
        shapes = ", ".join(str(list(item.shape)) for item in (*inputs, outputs))
        raise RecipeError(f"{path.name}: expected inputs (n, ...) and outputs (n, classes) with one n; found {shapes}")
    if not np.isfinite(outputs).all():
        raise RecipeError(f"{path.name}: an answer is not finite (NaN or infinite); expected logits")
    kept, first, places = np.unique(_digests(inputs), axis=0, return_index=True, return_inverse=True)
    other = (outputs[first][places.reshape(-1)] != outputs).any(axis=1)
    if other.any():
        row = int(other.argmax())
        raise RecipeError(f"{path.name}: sample {row} is there twice, with two answers; expected one answer for a sample")
    write_atomically(path, save({"digests": kept, "outputs": np.ascontiguousarray(outputs[first], dtype=np.float32)}))


def teacher_from_stored_logits(path: Path) -> Callable[[list[np.ndarray]], np.ndarray]:
    """Return stored answers as a teacher.

    Raises:
        RecipeError: if the file holds something else; the callable, if a sample is not among them.
    """
    from edgekd.kd import modules

    tensors = modules.read_weights(path)
    if tensors.keys() != _NAMES or not _is_answers(tensors["digests"].numpy(), tensors["outputs"].numpy()):
        raise RecipeError(
            f"{path.name}: holds no stored answers; expected a file that edgekd.save_teacher_logits wrote, or weights with a model"
        )
    keys, outputs = _keys(tensors["digests"].numpy()), tensors["outputs"].numpy()

    def answer(batch: list[np.ndarray]) -> np.ndarray:
        wanted = _keys(_digests(batch))
        places = keys.searchsorted(wanted).clip(max=len(keys) - 1)
        absent = (keys[places] != wanted).nonzero()[0]
        if len(absent):
            raise RecipeError(
                f"{path.name}: has no answer to a sample (number {absent[0]} of a batch of {len(wanted)}); it was stored for other data, "
                "another preparation of it, or other views; store the answers to all splits again with edgekd.save_teacher_logits"
            )
        found: np.ndarray = outputs[places]
        return found

    return answer


def _is_answers(digests: np.ndarray, outputs: np.ndarray) -> bool:
    shapes = digests.ndim == outputs.ndim == 2 and 0 < len(digests) == len(outputs) and digests.shape[1] == _BYTES  # noqa: PLR2004  (n, ...)
    return shapes and digests.dtype.name == "uint8" and outputs.dtype.name == "float32"


def _digests(inputs: Sequence[np.ndarray]) -> np.ndarray:
    """Return what names each sample: of its inputs' types and bytes. Shapes: (n, 16)."""
    import numpy as np

    kinds = ",".join(f"{item.dtype.name}{list(item.shape[1:])}" for item in inputs).encode()
    rows = range(len(inputs[0]))
    found = [hashlib.blake2b(kinds + b"".join(item[row].tobytes() for item in inputs), digest_size=_BYTES).digest() for row in rows]
    return np.frombuffer(b"".join(found), dtype=np.uint8).reshape(-1, _BYTES)


def _keys(digests: np.ndarray) -> np.ndarray:
    """Return digests as values that sort as their bytes do. Shapes: (n, 16) -> (n,)."""
    import numpy as np

    keys: np.ndarray = np.ascontiguousarray(digests).view(np.dtype((np.void, _BYTES))).reshape(-1)
    return keys
