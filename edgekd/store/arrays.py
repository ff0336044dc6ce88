# SPDX-License-Identifier: Apache-2.0
"""Arrays of samples on disk: plain, or compact where few values occur, as in float32 copies of 8-bit pictures. Reading gives the same bits.

A plain file is that of ``numpy.save``. A compact one holds two arrays, one after the other: ``values`` (columns, K) of the array's type,
and ``codes`` (n, ...) of uint8 or uint16; element ``[i, c, ...]`` is ``values[c, codes[i, c, ...]]``. The columns are the channels of
pictures, each of which may be normalized in its own way: the first axis of samples that have three, if it is not longer than
``MAX_COLUMNS``. Else there is one column for all elements.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekd.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy as np

MIN_BYTES, MAX_BYTES = 2**20, 8 * 2**30  # smaller arrays are not worth it; larger ones are mapped while they are used
MAX_SHARE = 0.6  # of the plain size
MAX_COLUMNS = 4
_MAX_VALUES = 2**16  # per column
_PICTURE_AXES = 4  # with that of the samples
_BLOCK = 2**17  # elements that are converted at once: they and their indices fit into the CPU's caches


@dataclass(frozen=True, slots=True)
class StoredArray:
    """An array (n, ...) on disk. ``values`` is None for a plain file, whose array is ``stored``; else ``stored`` are the codes."""

    path: Path
    stored: np.ndarray
    values: np.ndarray | None

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, rows: slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """Return some samples, in memory."""
        import numpy as np

        if self.values is None:
            return np.array(self.stored[rows])
        codes = self.stored[rows]
        return _decode(self.values, codes, np.empty(codes.shape, self.values.dtype))

    def load(self) -> np.ndarray:
        """Return all samples: in memory if they take less than half of the free memory, otherwise mapped from a file.

        Nothing may write to the result: it is writable because torch asks for that.
        """
        import numpy as np

        dtype = self.stored.dtype if self.values is None else self.values.dtype
        free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        is_mapped = self.stored.size * dtype.itemsize > free_bytes // 2
        if self.values is None:
            return self.stored if is_mapped else np.load(self.path, allow_pickle=False)
        if not is_mapped:
            return _decode(self.values, self.stored, np.empty(self.stored.shape, dtype))
        with tempfile.TemporaryFile(dir=self.path.parent) as file:  # the mapping holds it
            return _decode(self.values, self.stored, np.memmap(file, dtype, "w+", shape=self.stored.shape))


def open_array(path: Path) -> StoredArray:
    """Open a file that ``numpy.save`` or :func:`compact` wrote."""
    import numpy as np

    with path.open("rb") as file:
        shape, dtype = _read_header(file)
        if file.tell() + int(np.prod(shape)) * dtype.itemsize == path.stat().st_size:
            return StoredArray(path, np.load(path, mmap_mode="c", allow_pickle=False), None)
        file.seek(0)
        values = np.load(file, allow_pickle=False)
        shape, dtype = _read_header(file)
        return StoredArray(path, np.memmap(path, dtype, "r", file.tell(), shape), values)


def compact(path: Path) -> None:
    """Replace a plain file by a compact one, if that takes at most 60 % of the space.

    Raises:
        StorageError: if the new file does not read back as the same bits.
    """
    import numpy as np

    array = np.load(path, mmap_mode="r", allow_pickle=False)
    values = _find_values(array) if MIN_BYTES <= array.nbytes <= MAX_BYTES else None
    if values is None:
        return
    dtype = np.dtype(np.uint8 if values.shape[1] <= 2**8 else np.uint16)
    if values.nbytes + array.size * dtype.itemsize > MAX_SHARE * array.nbytes:
        return
    temporary = path.with_suffix(".compact")
    try:
        with temporary.open("wb") as file:
            np.save(file, values)
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": array.shape}
            np.lib.format.write_array_header_1_0(file, header)
            for rows in _blocks(array):
                file.write(_encode(values, array[rows], np.empty(array[rows].shape, dtype)).data.cast("B"))
        stored = open_array(temporary)
        if not all(np.array_equal(_bits(stored[rows]), _bits(array[rows])) for rows in _blocks(array)):
            raise StorageError(f"{path.name}: its compact form reads back as other values; check the disk")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read the magic string and the header of an array; return its shape and type."""
    import numpy as np

    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return shape, dtype


def _find_values(array: np.ndarray) -> np.ndarray | None:
    """Return the values of each column (columns, K), sorted by their bits and padded with the last; None if there are too many."""
    import numpy as np

    columns: list[np.ndarray] = [np.empty(0, _bits(array[:0]).dtype)] * _column_count(array)
    for rows in _blocks(array):
        columns = [_union(column, part) for column, part in zip(columns, _split(_bits(array[rows]), len(columns)), strict=True)]
        if max(map(len, columns)) > _MAX_VALUES:
            return None
    count = max(map(len, columns))
    return np.stack([np.pad(column, (0, count - len(column)), mode="edge") for column in columns]).view(array.dtype)


def _union(known: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Return sorted unique values of both; ``numpy.unique`` takes four times as long."""
    import numpy as np

    ordered = np.sort(np.concatenate([known, part.ravel()]))
    union: np.ndarray = np.concatenate([ordered[:1], ordered[1:][ordered[1:] != ordered[:-1]]])
    return union


def _encode(values: np.ndarray, array: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Write the codes of an array's values, and return them."""
    import numpy as np

    for column, part, target in zip(_bits(values), _split(_bits(array), len(values)), _split(codes, len(values)), strict=True):
        unique, inverse = np.unique(part, return_inverse=True)
        target[...] = np.searchsorted(column, unique).astype(codes.dtype)[inverse].reshape(part.shape)
    return codes


def _decode(values: np.ndarray, codes: np.ndarray, array: np.ndarray) -> np.ndarray:
    """Write the values of codes into an array, and return it."""
    import numpy as np

    for rows in _blocks(codes):
        for column, part, target in zip(values, _split(codes[rows], len(values)), _split(array[rows], len(values)), strict=True):
            target[...] = np.take(column, part, mode="clip")  # without checks it is twice as fast; no code is out of range
    return array


def _bits(array: np.ndarray) -> np.ndarray:
    """Return the bits of numbers as unsigned integers: -0.0 is another value than 0.0."""
    return array.view(f"u{array.dtype.itemsize}")


def _column_count(array: np.ndarray) -> int:
    return array.shape[1] if array.ndim == _PICTURE_AXES and 1 <= array.shape[1] <= MAX_COLUMNS else 1


def _split(array: np.ndarray, columns: int) -> list[np.ndarray]:
    """Return the part of each column, as views."""
    return [array] if columns == 1 else [array[:, column] for column in range(columns)]


def _blocks(array: np.ndarray) -> Iterator[slice]:
    """Yield slices of rows that together are the array."""
    step = max(1, _BLOCK * len(array) // max(1, array.size))
    for start in range(0, len(array), step):
        yield slice(start, start + step)
