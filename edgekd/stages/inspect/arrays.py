# SPDX-License-Identifier: Apache-2.0
"""Samples as arrays: what the user's data sets give is checked, and written to disk as it comes."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    import numpy as np

_CHUNK_BYTES = 16 * 2**20
_CHUNK_ROWS = 4096
_DIGEST_BYTES = 16
_SHOWN = 3


class OddSampleError(Exception):
    """A sample is not what it should be; the text says what it is and what was expected."""


class Sink:
    """Writes the inputs of one split, ``SPLIT.inputs.I.npy``, chunk by chunk; a full disk is an ``OSError``.

    ``rows`` is how many samples make a chunk, ``digests`` are of each sample's bytes, ``bad`` are the samples that are
    not finite.
    """

    def __init__(self, out: Path, split: str, specs: Sequence[Mapping[str, Any]], count: int) -> None:
        import numpy as np

        self._dtypes = [np.dtype(spec["dtype"]) for spec in specs]
        self._shapes = [tuple(spec["shape"][1:]) for spec in specs]
        row_bytes = sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in zip(self._dtypes, self._shapes, strict=True))
        self.rows = max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // row_bytes))
        self.digests: list[bytes] = []
        self.bad: list[int] = []
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

        made = [np.ascontiguousarray(column, dtype=dtype) for column, dtype in zip(columns, self._dtypes, strict=True)]
        finite = np.ones(len(made[0]), dtype=bool)
        for file, column in zip(self._files, made, strict=True):
            if column.dtype.kind == "f":
                finite &= np.isfinite(column).reshape(len(column), -1).all(axis=1)
            file.write(column.data.cast("B") if column.size else b"")
        self.bad += [len(self.digests) + int(row) for row in np.flatnonzero(~finite)]
        self.digests += [self.digest([column[row] for column in made]) for row in range(len(made[0]))]

    def digest(self, arrays: Sequence[np.ndarray]) -> bytes:
        """Return the digest of a sample's inputs."""
        import numpy as np

        found = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        for array, dtype in zip(arrays, self._dtypes, strict=True):
            found.update(np.ascontiguousarray(array, dtype=dtype).data)
        return found.digest()


def input_array(part: Any, spec: Mapping[str, Any], *, batch: bool = False) -> np.ndarray:
    """Return one input of a sample (or, with ``batch``, of many samples) as an array.

    Raises:
        OddSampleError: if it is no array, or of another shape or type than the student's input.
    """
    found = _array(part, f"input '{spec['name']}'", "a tensor or an array")
    shape, wanted = list(found.shape[1:] if batch else found.shape), list(spec["shape"][1:])
    expected = f"expected {wanted}, as student.inputs says without the batch axis"
    if shape != wanted:
        raise OddSampleError(f"input '{spec['name']}' has shape {shape}; {expected}")
    if found.dtype.name != spec["dtype"]:
        convert = f"convert it with .to(torch.{spec['dtype']}) or .astype('{spec['dtype']}')"
        raise OddSampleError(f"input '{spec['name']}' is {found.dtype.name}; expected {spec['dtype']}, as student.inputs says; {convert}")
    return found


def label_array(label: Any) -> np.ndarray:
    """Return a label as an array, without axes if it is a number.

    Raises:
        OddSampleError: if it is no number and no array of them.
    """
    import numpy as np

    if isinstance(label, bool | int | float):
        return np.asarray(label)
    return _array(label, "its label", "a number, a tensor or an array")


def stacked(parts: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Return the labels of all samples as one array.

    Raises:
        OddSampleError: if their shapes differ.
    """
    import numpy as np

    if isinstance(parts, np.ndarray):
        return parts
    shapes = sorted({part.shape for part in parts})
    if len(shapes) > 1:
        told = ", ".join(str(list(shape)) for shape in shapes[:_SHOWN])
        raise OddSampleError(f"labels have different shapes ({told}); expected the same for each sample")
    return np.stack(parts)


def labels_of(found: np.ndarray, *, classes: bool) -> np.ndarray:
    """Return labels as they are kept: whole numbers as int64.

    Args:
        found: The labels of all samples.
        classes: Whether they must be class ids.

    Raises:
        OddSampleError: if they are not finite, or no class ids.
    """
    import numpy as np

    if found.dtype.kind == "f":
        bad = np.flatnonzero(~np.isfinite(found).reshape(len(found), -1).all(axis=1))
        if len(bad):
            more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
            expected = "a class id" if classes else "a finite number"
            raise OddSampleError(f"label {bad[0]} is not finite (NaN or infinite){more}; expected {expected}")
    if classes and (found.dtype.kind not in "iu" or found.ndim != 1):
        shape = f" of shape {list(found.shape[1:])}" if found.ndim > 1 else ""
        whole = found.ndim == 1 and (found.dtype.kind == "b" or bool((found == np.round(found)).all()))
        hint = "; convert them with .long() or .astype('int64')" if whole else ""
        raise OddSampleError(f"labels are {found.dtype.name}{shape}; expected one whole number a sample, its class id{hint}")
    if classes and len(negative := np.flatnonzero(found < 0)):
        more = f", and {len(negative) - 1} more are negative" if len(negative) > 1 else ""
        raise OddSampleError(
            f"label {negative[0]} is {found[negative[0]]}{more}; expected class ids from 0 upwards "
            "(samples without a class belong into the split 'unlabelled')"
        )
    return found.astype(np.int64) if found.dtype.kind in "iub" else found


def some(rows: Sequence[int], count: int) -> str:
    """Return which samples, in words.

    >>> some([3], 60), some([3, 4, 9, 12], 60)
    ('sample 3', '4 of 60 samples (3, 4, 9, ...)')
    """
    return f"sample {rows[0]}" if len(rows) == 1 else f"{len(rows)} of {count} samples ({numbers(rows)})"


def numbers(rows: Sequence[int]) -> str:
    """Return the first few numbers.

    >>> numbers([3, 4, 9, 12])
    '3, 4, 9, ...'
    """
    return ", ".join(map(str, rows[:_SHOWN])) + (", ..." if len(rows) > _SHOWN else "")


def _array(value: Any, what: str, expected: str) -> np.ndarray:
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_quantized or value.dtype is torch.bfloat16:
            kind = str(value.dtype if value.layout is torch.strided else value.layout).removeprefix("torch.")
            raise OddSampleError(f"{what} is a {kind} tensor; expected a plain one")
        plain: np.ndarray = value.detach().cpu().resolve_conj().resolve_neg().numpy()
        return plain
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        return np.asarray(value)
    kind = f"an array of {value.dtype.name}" if isinstance(value, np.ndarray | np.generic) else type(value).__name__
    raise OddSampleError(f"{what} is {kind}; expected {expected}")
