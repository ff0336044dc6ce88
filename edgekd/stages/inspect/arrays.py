# SPDX-License-Identifier: Apache-2.0
"""Samples as arrays: check what the user's data sets return, and write it to disk chunk by chunk."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    import numpy as np

    from edgekd.domain.recipe import TensorSpec

_CHUNK_BYTES = 16 * 2**20
_CHUNK_ROWS = 4096
_DIGEST_BYTES = 16
_SHOWN = 3


class BadSampleError(Exception):
    """A sample is not what it should be; the message says what it is and what is expected."""


def sample_digest(arrays: Sequence[np.ndarray], specs: Sequence[TensorSpec]) -> bytes:
    """Return the digest of a sample's inputs, as they are stored."""
    import numpy as np

    hasher = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for array, spec in zip(arrays, specs, strict=True):
        hasher.update(np.ascontiguousarray(array, dtype=spec.dtype).data)
    return hasher.digest()


class InputWriter:
    """Writes the inputs of one split, ``SPLIT.inputs.I.npy``, chunk by chunk; a full disk is an ``OSError``.

    ``chunk_rows`` is the number of samples in a chunk. ``digests`` are of the bytes of each written sample.
    ``not_finite`` are the written samples with NaN or infinite inputs.
    """

    def __init__(self, out: Path, split: str, specs: Sequence[TensorSpec], count: int) -> None:
        import numpy as np

        self._specs = specs
        self._dtypes = [np.dtype(spec.dtype) for spec in specs]
        self._shapes = [spec.shape[1:] for spec in specs]
        row_bytes = sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in zip(self._dtypes, self._shapes, strict=True))
        self.chunk_rows = max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // row_bytes))
        self.digests: list[bytes] = []
        self.not_finite: list[int] = []
        self._files = [(out / f"{split}.inputs.{index}.npy").open("wb") for index in range(len(specs))]
        for file, dtype, shape in zip(self._files, self._dtypes, self._shapes, strict=True):
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count, *shape)}
            np.lib.format.write_array_header_1_0(file, header)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files:
            file.close()

    def add_rows(self, rows: Sequence[Sequence[np.ndarray]]) -> None:
        """Write samples, each a list of its inputs."""
        import numpy as np

        self.add([np.stack(column) for column in zip(*rows, strict=True)])

    def add(self, columns: Sequence[np.ndarray]) -> None:
        """Write samples, one array (n, ...) for each input."""
        import numpy as np

        inputs = [np.ascontiguousarray(column, dtype=dtype) for column, dtype in zip(columns, self._dtypes, strict=True)]
        finite = np.ones(len(inputs[0]), dtype=bool)
        for file, column in zip(self._files, inputs, strict=True):
            if column.dtype.kind == "f":
                finite &= np.isfinite(column).reshape(len(column), -1).all(axis=1)
            file.write(column.data.cast("B") if column.size else b"")
        self.not_finite += [len(self.digests) + int(row) for row in np.flatnonzero(~finite)]
        self.digests += [sample_digest([column[row] for column in inputs], self._specs) for row in range(len(inputs[0]))]


def input_array(part: Any, spec: TensorSpec, *, batch: bool = False) -> np.ndarray:
    """Return one input of a sample (or, with ``batch``, of many samples) as an array.

    Raises:
        BadSampleError: if it is not an array, or of another shape or type than the student's input.
    """
    array = _to_array(part, f"input '{spec.name}'", "a tensor or an array")
    shape, expected = list(array.shape[1:] if batch else array.shape), list(spec.shape[1:])
    if shape != expected:
        raise BadSampleError(
            f"input '{spec.name}' has shape {shape}; expected {expected}, the shape in student.inputs without the batch axis"
        )
    if array.dtype.name != spec.dtype:
        convert = f"convert it with .to(torch.{spec.dtype}) or .astype('{spec.dtype}')"
        raise BadSampleError(f"input '{spec.name}' is {array.dtype.name}; expected {spec.dtype}, as in student.inputs; {convert}")
    return array


def label_array(label: Any) -> np.ndarray:
    """Return a label as an array, without axes if it is a number.

    Raises:
        BadSampleError: if it is neither a number nor an array of numbers.
    """
    import numpy as np

    array = np.asarray(label) if isinstance(label, bool | int | float) else _to_array(label, "its label", "a number, a tensor or an array")
    largest = np.iinfo(np.int64).max
    if array.dtype.kind == "O" or (array.dtype.kind == "u" and array.size and array.max() > largest):
        shown = f"{label:e}" if array.dtype.kind == "O" else str(array.max())
        raise BadSampleError(f"its label is {shown}; expected at most {largest}, the largest int64")
    return array


def stack_labels(labels: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Return the labels of all samples as one array.

    Raises:
        BadSampleError: if their shapes differ.
    """
    import numpy as np

    if isinstance(labels, np.ndarray):
        return labels
    shapes = sorted({label.shape for label in labels})
    if len(shapes) > 1:
        examples = ", ".join(str(list(shape)) for shape in shapes[:_SHOWN])
        raise BadSampleError(f"labels have different shapes ({examples}); expected the same for each sample")
    return np.stack(labels)


def check_labels(labels: np.ndarray, *, class_ids: bool) -> np.ndarray:
    """Return labels as they are stored: whole numbers as int64.

    Args:
        labels: The labels of all samples.
        class_ids: Whether they must be class ids.

    Raises:
        BadSampleError: if they are not finite, or not class ids.
    """
    import numpy as np

    if labels.dtype.kind == "f":
        not_finite = np.flatnonzero(~np.isfinite(labels).reshape(len(labels), -1).all(axis=1))
        if len(not_finite):
            more = f", and {len(not_finite) - 1} more" if len(not_finite) > 1 else ""
            expected = "a class id" if class_ids else "a finite number"
            raise BadSampleError(f"label {not_finite[0]} is not finite (NaN or infinite){more}; expected {expected}")
    if class_ids and (labels.dtype.kind not in "iu" or labels.ndim != 1):
        shape = f" of shape {list(labels.shape[1:])}" if labels.ndim > 1 else ""
        are_whole = labels.ndim == 1 and (labels.dtype.kind == "b" or bool((labels == np.round(labels)).all()))
        hint = "; convert them with .long() or .astype('int64')" if are_whole else ""
        if labels.ndim > 1:
            hint = "; remove the axis with .squeeze(-1)" if labels.shape[1:] == (1,) else "; for one-hot labels return .argmax(-1)"
        raise BadSampleError(f"labels are {labels.dtype.name}{shape}; expected one whole number per sample, its class id{hint}")
    if class_ids and len(negative := np.flatnonzero(labels < 0)):
        more = f", and {len(negative) - 1} more are negative" if len(negative) > 1 else ""
        raise BadSampleError(
            f"label {negative[0]} is {labels[negative[0]]}{more}; expected class ids from 0 upwards "
            "(samples without a class, -1 or -100, belong in the split 'unlabelled')"
        )
    return labels.astype(np.int64) if labels.dtype.kind in "iub" else labels


def describe_rows(rows: Sequence[int], count: int) -> str:
    """Return which samples, for a message.

    >>> describe_rows([3], 60), describe_rows([3, 4, 9, 12], 60)
    ('sample 3', '4 of 60 samples (3, 4, 9, ...)')
    """
    return f"sample {rows[0]}" if len(rows) == 1 else f"{len(rows)} of {count} samples ({first_rows(rows)})"


def first_rows(rows: Sequence[int]) -> str:
    """Return the first few row numbers, for a message.

    >>> first_rows([3, 4, 9, 12])
    '3, 4, 9, ...'
    """
    return ", ".join(map(str, rows[:_SHOWN])) + (", ..." if len(rows) > _SHOWN else "")


def _to_array(value: Any, what: str, expected: str) -> np.ndarray:
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_quantized or value.dtype is torch.bfloat16:
            kind = str(value.dtype if value.layout is torch.strided else value.layout).removeprefix("torch.")
            raise BadSampleError(f"{what} is a {kind} tensor; expected a plain one")
        try:
            plain: np.ndarray = value.detach().cpu().resolve_conj().resolve_neg().numpy()
        except (RuntimeError, TypeError, NotImplementedError) as error:  # on the meta device, float8, nested
            kind = f"{str(value.dtype).removeprefix('torch.')} tensor on {value.device}"
            raise BadSampleError(f"{what} is a {kind}; expected one that numpy can read") from error
        if plain.dtype.kind not in "biuf":
            raise BadSampleError(f"{what} is a {plain.dtype.name} tensor; expected real numbers")
        return plain
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        return np.asarray(value)
    kind = f"an array of {value.dtype.name}" if isinstance(value, np.ndarray | np.generic) else type(value).__name__
    raise BadSampleError(f"{what} is {kind}; expected {expected}")
