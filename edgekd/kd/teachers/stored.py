# SPDX-License-Identifier: Apache-2.0
"""Logits of a teacher that cannot run here, stored by the digests of the samples, so that their order does not matter."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from edgekd.errors import RecipeError
from edgekd.store.digests import write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy as np

_TENSORS = {"digests", "logits"}
_DIGEST_BYTES = 16
TOLERANCE = 1e-3  # of a row's largest logit: that of soft targets, whose module is in no key of inspect, export or evaluate
_ROUNDING = 1 / 2048  # of a logit, for a teacher whose logits were stored in float16


def save_teacher_logits(path: Path, inputs: Sequence[np.ndarray], logits: np.ndarray) -> None:
    """Write a teacher's logits to a file for ``teacher.file`` of a recipe; equal logits give equal bytes.

    One file has all samples of all splits, and all views if there are any. Samples are identified by their bytes, so the inputs
    must be exactly those that the splits of the recipe return. The logits of a sample that occurs twice may differ by 0.1 % of its
    largest (at least of 1, or of the largest of all) and by the rounding to float16, as in another batch; the first are stored.

    Args:
        path: Ends in ``.safetensors``.
        inputs: One array (n, ...) for each input of the student, in order and of its type.
        logits: The teacher's logits for these samples.

    Raises:
        RecipeError: if shapes do not match, a logit is not finite, or one sample has two rows of logits that differ by more.

    Shapes:
        logits: (n, C).
    """
    import numpy as np
    from safetensors.numpy import save

    if path.suffix != ".safetensors":
        raise RecipeError(f"{path.name}: is not a name for stored logits; expected one that ends in .safetensors")
    if logits.ndim != 2 or any(len(item) != len(logits) for item in inputs):  # noqa: PLR2004  (n, C)
        shapes = ", ".join(str(list(item.shape)) for item in (*inputs, logits))
        raise RecipeError(f"{path.name}: expected inputs (n, ...) and logits (n, classes) with the same n; found {shapes}")
    if not np.isfinite(logits).all():
        raise RecipeError(f"{path.name}: a logit is not finite (NaN or infinite); expected finite logits")
    digests, first, inverse = np.unique(_digests(inputs), axis=0, return_index=True, return_inverse=True)
    _check_duplicates(path.name, logits, first[inverse.reshape(-1)])
    write_atomically(path, save({"digests": digests, "logits": np.ascontiguousarray(logits[first], dtype=np.float32)}))


def _check_duplicates(name: str, logits: np.ndarray, originals: np.ndarray) -> None:
    """Refuse logits (n, C) that contradict those of the first row (n,) of the same sample."""
    import numpy as np

    rows = np.flatnonzero(originals != np.arange(len(logits)))
    first, again = logits[originals[rows]].astype(np.float64), logits[rows].astype(np.float64)
    magnitudes = np.maximum(np.abs(first), np.abs(again))
    smallest = min(1.0, float(np.abs(logits).max(initial=0.0)))  # numbers of a regression may all be small
    allowed = TOLERANCE * np.maximum(smallest, magnitudes.max(axis=1, initial=0.0, keepdims=True)) + _ROUNDING * magnitudes
    contradictions = np.argwhere(np.abs(first - again) > allowed)
    if len(contradictions):
        row, column = contradictions[0]
        raise RecipeError(
            f"{name}: sample {rows[row]} occurs twice, with different logits: {again[row, column]:.5g} and {first[row, column]:.5g} for "
            f"class {column}; allowed is a difference of {allowed[row, column]:.2g}, as between two batches or by rounding to float16; "
            "store the logits of one teacher in eval mode"
        )


def teacher_from_stored_logits(path: Path) -> Callable[[list[np.ndarray]], np.ndarray]:
    """Return stored logits as a teacher.

    Raises:
        RecipeError: if the file holds something else; the teacher, if a sample is not in the file.
    """
    from edgekd.kd import modules

    tensors = {name: tensor.numpy() for name, tensor in modules.read_weights(path).items()}
    if not _is_stored_logits(tensors):
        raise RecipeError(
            f"{path.name}: holds no stored logits; expected a file that edgekd.save_teacher_logits wrote, or weights with a model"
        )
    keys, logits = _sort_keys(tensors["digests"]), tensors["logits"]

    def predict(batch: list[np.ndarray]) -> np.ndarray:
        batch_keys = _sort_keys(_digests(batch))
        rows = keys.searchsorted(batch_keys).clip(max=len(keys) - 1)
        missing = (keys[rows] != batch_keys).nonzero()[0]
        if len(missing):
            raise RecipeError(
                f"{path.name}: has no logits for a sample (number {missing[0]} in a batch of {len(batch_keys)}): they are of other "
                "data, another preprocessing, or other views; store the logits of all splits again with edgekd.save_teacher_logits"
            )
        batch_logits: np.ndarray = logits[rows]
        return batch_logits

    return predict


def _is_stored_logits(tensors: Mapping[str, np.ndarray]) -> bool:
    if tensors.keys() != _TENSORS:
        return False
    digests, logits = tensors["digests"], tensors["logits"]
    is_shaped = digests.ndim == logits.ndim == 2 and 0 < len(digests) == len(logits) and digests.shape[1] == _DIGEST_BYTES  # noqa: PLR2004  (n, ...)
    return is_shaped and digests.dtype.name == "uint8" and logits.dtype.name == "float32"


def _digests(inputs: Sequence[np.ndarray]) -> np.ndarray:
    """Return a digest of the types and bytes of each sample's inputs. Shapes: (n, 16)."""
    import numpy as np

    types = ",".join(f"{item.dtype.name}{list(item.shape[1:])}" for item in inputs).encode()
    samples = (types + b"".join(item[row].tobytes() for item in inputs) for row in range(len(inputs[0])))
    digests = b"".join(hashlib.blake2b(sample, digest_size=_DIGEST_BYTES).digest() for sample in samples)
    return np.frombuffer(digests, dtype=np.uint8).reshape(-1, _DIGEST_BYTES)


def _sort_keys(digests: np.ndarray) -> np.ndarray:
    """Return digests as values that sort as their bytes do. Shapes: (n, 16) -> (n,)."""
    import numpy as np

    keys: np.ndarray = np.ascontiguousarray(digests).view(np.dtype((np.void, _DIGEST_BYTES))).reshape(-1)
    return keys
