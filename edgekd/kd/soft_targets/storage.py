# SPDX-License-Identifier: Apache-2.0
"""The teacher's logits for one split: every view of every sample in one file, read by random rows.

The file is in the safetensors format: 8 bytes (the length of the header, little-endian), a JSON header padded with spaces to a
multiple of 64 bytes, one tensor. ``__metadata__`` holds the fields of ``Header`` and ``kind`` as strings. The same header
and logits give the same bytes, whatever chunks they come in and however often writing was interrupted.

``dense`` (up to 256 classes, or ``slots=0``): tensor ``logits`` F16 (V, n, C), rounded to nearest: the error is at most
``|x| / 2048`` (and 3e-8 near 0). It is good for every loss and every temperature. Numbers of a regression, whose scale is any, are F32.

``sampled`` (more classes): tensor ``records`` U8 (V, n, bytes), K = ``slots``; a record is, packed and little-endian:

    exact  uint16      number of the K entries, at least K // 2, that are exact: the largest, in descending order; they come first
    share  float16     logarithm of the weight, at T = 1, of each other entry: a draw
    ids    uint16 (K)  classes, all different (uint32 above 65,536 classes)
    logs   float16 (K) the teacher's log-probabilities of these classes, at T = 1, of the draws too; not below -10,000

A draw is made with probability ``p / weight``. The weight is the probability that the exact entries leave, divided by the number of
draws. So the estimate sums to 1, and its expectation is the teacher's softmax, class by class; the K largest alone would be biased.
An entry is exact if the weight would not exceed it (K // 2 are in any case, so that the largest are always known).

Exact are the logs, up to ``|log p| / 2048`` (0.4 % of p from 3e-4 down to 1e-7), so the ratios of exact entries at every T; and
``ids[:, 0]``, the class that the teacher predicts. All else is an estimate. At T = 1 it is unbiased except for that rounding. At
another T a draw has the weight ``p^(1/T) * weight / p``: unbiased before it is normalized; then the bias shrinks with larger K, and
the noise grows with larger T (``benchmarks/soft_targets.py`` prints how much). A class that is not in the record reads as ``FLOOR``,
a probability of 0 up to T = 100: ``kl``, ``dkd`` and ``dist`` accept it; losses of logits themselves (``mse``, a standardized
``kl``) need dense files. Where a teacher is uncertain, ``read`` may return a draw that is larger than the predicted class.

Source:
    Random draws instead of the K largest: Anshumann et al., arXiv 2503.16870. One weight for all draws, made in equal
    steps along the cumulative sum: Fearnhead and Clifford, J. R. Statist. Soc. B 65 (2003) 887.
"""

from __future__ import annotations

import json
import mmap
import os
import weakref
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from edgekd.errors import RecipeError
from edgekd.kd.reproducible import derive_seed, load_verified, save_verified
from edgekd.kd.soft_targets import sampling
from edgekd.store.digests import canonical_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np

    Recompute = Callable[[int, np.ndarray], np.ndarray]  # (view, rows) -> logits (len(rows), C)

SCHEMA = 1
_INTEGERS = {"views", "samples", "classes", "slots", "schema"}
MAX_DENSE = 256  # classes
FLOOR = sampling.FLOOR
SLOTS = 64  # 260 bytes per record
LARGEST = 65504.0  # float16
TOLERANCE = 1e-3  # of a row's largest logit: kernels add in another order in another batch
SPOT_VIEWS, SPOT_ROWS = 2, 8
_FOREIGN, _REMEDY = "is not a file of soft targets", "remove it and build again"
MAPPED_BYTES = 256 * 2**20  # a larger file is not mapped: all pages that were read would stay resident


@dataclass(frozen=True, slots=True)
class Header:
    """The content of a file of soft targets; ``make_header`` chooses dense or sampled.

    Args:
        slots: Entries of a sampled record; 0 for a dense file.
        precision: Of a dense file's numbers, ``float16`` or ``float32``.
        teacher, augment, data: SHA-256 in hex of the teacher, of the code that makes the views, and of the samples.
    """

    split: str
    views: int
    samples: int
    classes: int
    slots: int
    teacher: str
    augment: str
    data: str
    schema: int = SCHEMA
    precision: str = "float16"

    @property
    def rows(self) -> int:
        """Return the number of rows in the file: views times samples."""
        return self.views * self.samples

    @property
    def item(self) -> np.dtype[Any]:
        """Return the type of one row: a record, or C logits."""
        import numpy as np

        if not self.slots:
            return np.dtype(("<f4" if self.precision == "float32" else "<f2", (self.classes,)))
        ids = "<u2" if self.classes <= 2**16 else "<u4"
        return np.dtype([("exact", "<u2"), ("share", "<f2"), ("ids", ids, (self.slots,)), ("logs", "<f2", (self.slots,))])

    def metadata(self) -> dict[str, str]:
        """Return the fields as they are in the file."""
        return {name: str(value) for name, value in asdict(self).items()} | {"kind": "sampled" if self.slots else "dense"}


def make_header(split: str, shape: tuple[int, int, int], *, slots: int | None = None, **fields: str) -> Header:
    """Return the header of a file of ``shape`` (V, n, C): dense up to 256 classes, sampled above, unless ``slots`` is given.

    ``fields`` are ``teacher``, ``augment``, ``data`` and ``precision``, as in ``Header``.
    """
    views, samples, classes = shape
    slots = (0 if classes <= MAX_DENSE else SLOTS) if slots is None else slots
    if slots and slots not in range(2, min(classes, 2**16)):
        raise ValueError(f"slots = {slots}; expected 0 or 2 to {min(classes, 2**16) - 1} for {classes} classes")
    return Header(split, views, samples, classes, slots, **fields)  # type: ignore[arg-type]  # all of them are text


def begin(path: Path, header: Header) -> int:
    """Create the file, or resume that of an earlier run; return how many rows are safely stored: view by view, row by row."""
    header_bytes = _header_bytes(header)
    stored_rows = load_verified(_journal(path))
    if stored_rows is not None and path.is_file() and path.stat().st_size == _size(header):
        with path.open("rb") as file:
            if file.read(len(header_bytes)) == header_bytes:
                return int(stored_rows)
    _journal(path).unlink(missing_ok=True)
    with path.open("wb") as file:
        file.write(header_bytes)
        file.truncate(_size(header))  # takes no space on the disk before it is filled
    return 0


def append(path: Path, header: Header, stored_rows: int, logits: np.ndarray) -> int:
    """Write logits (m, C) of the next rows, all of one view; return how many rows are now safely stored, even if the process is killed.

    Raises:
        RecipeError: if a logit is not finite, or too large for a dense file.
    """
    view, first = divmod(stored_rows, header.samples)
    if logits.shape[1:] != (header.classes,) or first + len(logits) > header.samples:
        raise ValueError(f"logits {logits.shape} after row {first} of view {view}; expected rows of one view: {header}")
    _check_finite(logits, header, first)
    packed = sampling.sample_records(logits, header.item, header.split, view, first) if header.slots else logits.astype(header.item.base)
    with path.open("r+b") as file:
        file.seek(len(_header_bytes(header)) + stored_rows * header.item.itemsize)
        file.write(packed.tobytes())
        file.flush()
        os.fsync(file.fileno())  # before the journal counts these rows
    stored_rows += len(logits)
    save_verified(_journal(path), str(stored_rows).encode())
    return stored_rows


def finish(path: Path, header: Header, target: Path) -> None:
    """Move the complete file to its target, on the same file system."""
    if (stored_rows := begin(path, header)) < header.rows:
        raise ValueError(f"{path.name}: {stored_rows} of {header.rows} rows are stored")
    path.replace(target)
    _journal(path).unlink(missing_ok=True)


def open_expected(path: Path, expected: Header, recompute: Recompute | None = None) -> SoftTargets:
    """Open a file after checking that it is the expected one; ``recompute`` runs the teacher again, for a few rows of a view.

    Raises:
        RecipeError: if the file is damaged or holds other soft targets (it says how they differ), or if the teacher now returns others.
    """
    header_bytes = _header_bytes(expected)
    with path.open("rb") as file:
        start, size = file.read(2 * len(header_bytes)), os.fstat(file.fileno()).st_size
        if not start.startswith(header_bytes):
            raise RecipeError(f"{path.name}: {_difference(start, expected)}; {_REMEDY}")
        if size != _size(expected):
            raise RecipeError(f"{path.name}: has {size} bytes, expected {_size(expected)}; {_REMEDY}")
        soft_targets = SoftTargets(expected, file.fileno())
    if recompute is not None:
        _check_spots(path, soft_targets, recompute)
    return soft_targets


def open_soft_targets(path: Path, **expected: str) -> SoftTargets:
    """Open a file by the header that it has; ``expected`` are fields of the header that it must have.

    Raises:
        RecipeError: as :func:`open_expected`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
        fields = {name: int(value) if name in _INTEGERS else value for name, value in metadata.items() if name != "kind"}
        header = Header(**fields)  # type: ignore[arg-type]  # a missing field is a TypeError
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise RecipeError(f"{path.name}: {_FOREIGN}; {_REMEDY}") from error
    return open_expected(path, replace(header, **expected))  # type: ignore[arg-type]  # only text fields are given


class SoftTargets:
    """An open file of soft targets: mapped, or if it is large, read row by row, so that little of it is in memory."""

    __slots__ = ("__weakref__", "_file", "_items", "header")

    def __init__(self, header: Header, file: int) -> None:
        import numpy as np

        self.header, self._file, self._items = header, os.dup(file), None
        weakref.finalize(self, os.close, self._file)
        if _size(header) <= MAPPED_BYTES:
            mapping = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
            self._items = np.ndarray((header.views, header.samples), header.item, mapping, len(_header_bytes(header)))

    def read(self, view: int, rows: np.ndarray | Sequence[int], temperature: float = 1.0) -> np.ndarray:
        """Return logits (m, C), float32, whose ``softmax(logits / temperature)`` is the teacher's, or an estimate of it."""
        import numpy as np

        if not self.header.slots:
            return self.stored(view, rows).astype(np.float32)
        ids, values = self.read_sparse(view, rows, temperature)
        dense = np.full((len(ids), self.header.classes), FLOOR, dtype=np.float32)
        dense[np.arange(len(ids))[:, None], ids] = values
        return dense

    def read_sparse(self, view: int, rows: np.ndarray | Sequence[int], temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """Return, of a sampled file, classes (m, K), int64, the predicted one first, and their logits (m, K), float32, as in ``read``."""
        import numpy as np

        if not self.header.slots:
            raise ValueError("a dense file has no sparse rows; use read")
        records = self.stored(view, rows)
        values, share = records["logs"].astype(np.float32), records["share"].astype(np.float32)[:, None]
        is_drawn = np.arange(self.header.slots) >= records["exact"][:, None]
        # divided by T, a draw is log p / T + share - log p
        np.copyto(values, temperature * share - (temperature - 1) * values, where=is_drawn)
        return records["ids"].astype(np.int64), values

    def stored(self, view: int, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """Return a copy of rows as they are in the file: logits (m, C) or records (m,)."""
        import numpy as np

        indices = np.asarray(rows, dtype=np.int64)
        if self._items is not None:
            return np.asarray(self._items[view].take(indices, axis=0))
        item, header = self.header.item, self.header
        start, size = len(_header_bytes(header)), header.samples * item.itemsize
        view_start = range(start, start + header.views * size, size)[view]
        offsets = range(view_start, view_start + size, item.itemsize)
        # a call per row takes a quarter of the time of the page faults of a mapping
        packed = b"".join([os.pread(self._file, item.itemsize, offsets[row]) for row in indices.tolist()])
        return np.ndarray(len(indices), item, packed)


def _header_bytes(header: Header) -> bytes:
    """Return the bytes before the tensor."""
    dtype, last = ("U8", header.item.itemsize) if header.slots else (f"F{8 * header.item.base.itemsize}", header.classes)
    shape, size = [header.views, header.samples, last], header.rows * header.item.itemsize
    tensor = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    text = canonical_json({"__metadata__": header.metadata(), "records" if header.slots else "logits": tensor})
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def _size(header: Header) -> int:
    return len(_header_bytes(header)) + header.rows * header.item.itemsize


def _journal(path: Path) -> Path:
    return path.with_name(f"{path.name}.journal")


def _difference(start: bytes, expected: Header) -> str:
    """Return how the header in a file's first bytes differs from the expected one."""
    try:
        metadata = json.loads(start[8 : 8 + int.from_bytes(start[:8], "little")])["__metadata__"]
        pairs = [(name, metadata[name], value) for name, value in expected.metadata().items()]
        differences = [f"{name} {actual[:12]}, expected {value[:12]}" for name, actual, value in pairs if actual != value]
    except (ValueError, KeyError, TypeError):  # not text, not JSON, not from edgekd
        return _FOREIGN
    return f"holds other soft targets: {'; '.join(differences)}" if differences else _FOREIGN


def _check_finite(logits: np.ndarray, header: Header, first: int) -> None:
    """Raise an error if a logit cannot be stored."""
    import numpy as np

    is_half = not header.slots and header.precision == "float16"
    limit, allowed = (LARGEST, f" within {LARGEST:.0f}, the range of float16") if is_half else (np.finfo(logits.dtype).max, "")
    if np.abs(logits).max(initial=0.0) <= limit:  # False for NaN
        return
    row, column = np.argwhere(~(np.abs(logits) <= limit))[0]
    raise RecipeError(
        f"teacher: its logit for {header.split}[{first + row}] is {logits[row, column]} for class {column}; "
        f"expected finite logits{allowed}; check the weights and the scale of the inputs"
    )


def _check_spots(path: Path, soft_targets: SoftTargets, recompute: Recompute) -> None:
    """Run the teacher again on a few rows, always the same, and compare."""
    import numpy as np

    header = soft_targets.header
    generator = np.random.default_rng(derive_seed("spots", *header.metadata().values()))
    for view in sorted(generator.permutation(header.views)[: SPOT_VIEWS if header.samples else 0].tolist()):
        rows = np.sort(generator.permutation(header.samples)[:SPOT_ROWS])
        stored, fresh = soft_targets.stored(view, rows), recompute(view, rows).astype(np.float64)
        tolerance = TOLERANCE * np.maximum(1.0, np.abs(fresh).max(axis=1, keepdims=True))
        ids = np.broadcast_to(np.arange(header.classes), fresh.shape)
        if header.slots:
            fresh -= fresh.max(axis=1, keepdims=True)
            fresh -= np.log(np.exp(fresh).sum(axis=1, keepdims=True))
            ids, stored = stored["ids"].astype(np.int64), stored["logs"]
            fresh = np.maximum(np.take_along_axis(fresh, ids, axis=1), FLOOR)
        wrong = np.argwhere(~(np.abs(stored - fresh) <= tolerance + np.abs(fresh) / 2048))
        if len(wrong):
            row, column = wrong[0]
            raise RecipeError(
                f"{path.name}: the teacher no longer returns the stored logits: {header.split}[{rows[row]}] in view {view}, class "
                f"{ids[row, column]}: {fresh[row, column]:.5g}, stored {stored[row, column]:.5g}; {_REMEDY}"
            )
