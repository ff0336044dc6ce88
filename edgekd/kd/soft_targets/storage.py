# SPDX-License-Identifier: Apache-2.0
"""A teacher's answers to one split: every view of every sample in one file, read by random rows.

The file is in the safetensors format: 8 bytes (the header's length, little-endian), a JSON header filled up with spaces to a
multiple of 64 bytes, one tensor. ``__metadata__`` holds the fields of ``Header`` and ``kind`` as strings. The same header
and logits give the same bytes, in whatever chunks they come and however often the filling was interrupted.

``dense`` (up to 256 classes, or ``slots=0``): tensor ``logits`` F16 (V, n, C). Rounded to nearest: off by at most ``|x| / 2048``
(and 3e-8 near 0). Good for every loss and every temperature.

``sampled`` (above): tensor ``records`` U8 (V, n, bytes), K = ``slots``; a record is, packed and little-endian:

    exact  uint16      how many of the K entries come first and stand for themselves: the largest, largest first, at least K // 2
    share  float16     log of the weight, at T = 1, of every other entry: a draw
    ids    uint16 (K)  classes, none twice (uint32 above 65,536 classes)
    logs   float16 (K) the teacher's log-probabilities of these classes, at T = 1, of the draws too; not below -10,000

A draw has the chance ``p / weight``; the weight is what the exact entries leave over, divided by the number of draws. So the
estimate sums to 1, and its expectation is the teacher's softmax, class by class; the K largest alone would be biased.
An entry is exact if the weight would not exceed it (K // 2 are in any case, so that the top is known).

Exact: the logs, to ``|log p| / 2048`` (0.4 % of p from 3e-4 down to 1e-7), so the ratios of exact entries at every T; and ``ids[:, 0]``,
the teacher's answer. An estimate: the rest. At T = 1 it is unbiased but for that rounding. At another T a draw weighs
``p^(1/T) * weight / p``: unbiased before it is normalized, then biased the less the larger K, and the noisier the larger T
(``benchmarks/answers.py`` prints how much). A class that is not in the record reads as ``FLOOR``, a probability of 0 up to
T = 100: ``kl``, ``dkd`` and ``dist`` take it; losses of logits themselves (``mse``, a standardized ``kl``) do not: store densely
for them. Where a teacher is unsure, a draw may outweigh its answer in ``read``.

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
from typing import TYPE_CHECKING

from edgekd.errors import RecipeError
from edgekd.kd.reproducible import derive_seed, load_verified, save_verified
from edgekd.kd.soft_targets import sampling
from edgekd.store.digests import canonical

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np

    Recompute = Callable[[int, np.ndarray], np.ndarray]  # (view, rows) -> logits (len(rows), C)

SCHEMA = 1
_NUMBERS = {"views", "samples", "classes", "slots", "schema"}
MAX_DENSE = 256  # classes
FLOOR = sampling.FLOOR
SLOTS = 64  # 260 bytes a record
LARGEST = 65504.0  # float16
TOLERANCE = 1e-3  # of a row's largest logit: kernels sum in another order in another batch
SPOT_VIEWS, SPOT_ROWS = 2, 8
MAPPED_BYTES = 256 * 2**20  # a larger file is not mapped: all of it that was touched would stay resident


@dataclass(frozen=True, slots=True)
class Header:
    """What a file of answers holds; ``plan`` makes it.

    Args:
        slots: Entries of a sampled record; 0: dense.
        teacher, augment, data: SHA-256 in hex of the teacher, of the code that makes the views and of the samples.
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

    @property
    def rows(self) -> int:
        """Answers in the file: views times samples."""
        return self.views * self.samples

    @property
    def item(self) -> np.dtype[np.void] | np.dtype[np.float16]:
        """Return what the file holds of one row: a record, or C logits."""
        import numpy as np

        if not self.slots:
            return np.dtype(("<f2", (self.classes,)))
        ids = "<u2" if self.classes <= 2**16 else "<u4"
        return np.dtype([("exact", "<u2"), ("share", "<f2"), ("ids", ids, (self.slots,)), ("logs", "<f2", (self.slots,))])

    def metadata(self) -> dict[str, str]:
        """Return the fields as the file holds them."""
        return {name: str(value) for name, value in asdict(self).items()} | {"kind": "sampled" if self.slots else "dense"}


def make_header(split: str, shape: tuple[int, int, int], *, teacher: str, augment: str, data: str, slots: int | None = None) -> Header:
    """Return the header of a file of ``shape`` (V, n, C): dense up to 256 classes, else sampled, unless ``slots`` says otherwise."""
    views, samples, classes = shape
    slots = (0 if classes <= MAX_DENSE else SLOTS) if slots is None else slots
    if slots and slots not in range(2, min(classes, 2**16)):
        raise ValueError(f"slots = {slots}; expected 0 or 2 to {min(classes, 2**16) - 1} for {classes} classes")
    return Header(split, views, samples, classes, slots, teacher, augment, data)


def begin(path: Path, header: Header) -> int:
    """Make the file, or find what an earlier run left of it; return how many rows are safely in it: (view, row) after (view, row)."""
    head = _header_bytes(header)
    packed = load_verified(_journal(path))
    if packed is not None and path.is_file() and path.stat().st_size == _size(header):
        with path.open("rb") as file:
            if file.read(len(head)) == head:
                return int(packed)
    _journal(path).unlink(missing_ok=True)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(_size(header))  # takes no room on the disk before it is filled
    return 0


def append(path: Path, header: Header, done: int, logits: np.ndarray) -> int:
    """Write logits (m, C) of the next rows, all of one view; return how many are now safely in the file, whatever happens next.

    Raises:
        RecipeError: if a logit is not finite, or too large for a dense file.
    """
    view, first = divmod(done, header.samples)
    if logits.shape[1:] != (header.classes,) or first + len(logits) > header.samples:
        raise ValueError(f"logits {logits.shape} after row {first} of view {view}; expected rows of one view: {header}")
    _check_finite(logits, header, first)
    packed = sampling.sample_records(logits, header.item, header.split, view, first) if header.slots else logits.astype("<f2")
    with path.open("r+b") as file:
        file.seek(len(_header_bytes(header)) + done * header.item.itemsize)
        file.write(packed.tobytes())
        file.flush()
        os.fsync(file.fileno())  # before the journal speaks of it
    done += len(logits)
    save_verified(_journal(path), str(done).encode())
    return done


def finish(path: Path, header: Header, target: Path) -> None:
    """Move the file, now whole, to where it belongs, on the same file system."""
    if (done := begin(path, header)) < header.rows:
        raise ValueError(f"{path.name}: {done} of {header.rows} rows are filled")
    path.replace(target)
    _journal(path).unlink(missing_ok=True)


def open_expected(path: Path, expected: Header, recompute: Recompute | None = None) -> SoftTargets:
    """Open a file, once it is known to hold what is expected; ``recompute`` asks the teacher anew, for a few rows of a view.

    Raises:
        RecipeError: if the file is damaged, if it holds other answers (it says which), or if the teacher now answers otherwise.
    """
    head = _header_bytes(expected)
    with path.open("rb") as file:
        found, size = file.read(2 * len(head)), os.fstat(file.fileno()).st_size
        if not found.startswith(head):
            raise RecipeError(f"{path.name}: {_difference(found, expected)}; remove it and ask the teacher again")
        if size != _size(expected):
            raise RecipeError(f"{path.name}: has {size} bytes, expected {_size(expected)}; remove it and ask the teacher again")
        answers = SoftTargets(expected, file.fileno())
    if recompute is not None:
        _check_spots(path, answers, recompute)
    return answers


def open_soft_targets(path: Path, **expected: str) -> SoftTargets:
    """Open a file as it says what it holds; ``expected`` are fields of its header that must be so.

    Raises:
        RecipeError: as ``load``.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            told = file.metadata() or {}
        fields = {name: int(value) if name in _NUMBERS else value for name, value in told.items() if name != "kind"}
        header = Header(**fields)  # type: ignore[arg-type]  # a field that is not there is a TypeError
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise RecipeError(f"{path.name}: is not a file of answers; remove it and ask the teacher again") from error
    return open_expected(path, replace(header, **expected))  # type: ignore[arg-type]  # each is one of its texts


class SoftTargets:
    """The answers in a file, open for reading: mapped, or if it is large, read row by row, so that little of it is resident."""

    __slots__ = ("__weakref__", "_file", "_items", "header")

    def __init__(self, header: Header, file: int) -> None:
        import numpy as np

        self.header, self._file, self._items = header, os.dup(file), None
        weakref.finalize(self, os.close, self._file)
        if _size(header) <= MAPPED_BYTES:
            mapping = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
            self._items = np.ndarray((header.views, header.samples), header.item, mapping, len(_header_bytes(header)))

    def read(self, view: int, rows: np.ndarray | Sequence[int], temperature: float = 1.0) -> np.ndarray:
        """Return logits (m, C), float32: ``softmax(logits / temperature)`` is the teacher's, or its estimate at that temperature."""
        import numpy as np

        if not self.header.slots:
            return self.stored(view, rows).astype(np.float32)
        ids, values = self.read_sparse(view, rows, temperature)
        dense = np.full((len(ids), self.header.classes), FLOOR, dtype=np.float32)
        dense[np.arange(len(ids))[:, None], ids] = values
        return dense

    def read_sparse(self, view: int, rows: np.ndarray | Sequence[int], temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """Return of a sampled file classes (m, K), int64, the teacher's answer first, and their logits (m, K), float32, for ``read``."""
        import numpy as np

        if not self.header.slots:
            raise ValueError("a dense file is read densely")
        records = self.stored(view, rows)
        values, share = records["logs"].astype(np.float32), records["share"].astype(np.float32)[:, None]
        drawn = np.arange(self.header.slots) >= records["exact"][:, None]
        # divided by T, a draw is log p / T + share - log p
        np.copyto(values, temperature * share - (temperature - 1) * values, where=drawn)
        return records["ids"].astype(np.int64), values

    def stored(self, view: int, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """Return a copy of rows as the file holds them: float16 logits (m, C) or records (m,)."""
        import numpy as np

        wanted = np.asarray(rows, dtype=np.int64)
        if self._items is not None:
            return np.asarray(self._items[view].take(wanted, axis=0))
        item, header = self.header.item, self.header
        start, size = len(_header_bytes(header)), header.samples * item.itemsize
        first = range(start, start + header.views * size, size)[view]
        places = range(first, first + size, item.itemsize)
        # a call for each row takes a quarter of the time of the page faults that it spares
        packed = b"".join([os.pread(self._file, item.itemsize, places[row]) for row in wanted.tolist()])
        return np.ndarray(len(wanted), item, packed)


def _header_bytes(header: Header) -> bytes:
    """Return what stands before the tensor."""
    dtype, last = ("U8", header.item.itemsize) if header.slots else ("F16", header.classes)
    shape, size = [header.views, header.samples, last], header.rows * header.item.itemsize
    tensor = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    text = canonical({"__metadata__": header.metadata(), "records" if header.slots else "logits": tensor})
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def _size(header: Header) -> int:
    return len(_header_bytes(header)) + header.rows * header.item.itemsize


def _journal(path: Path) -> Path:
    return path.with_name(f"{path.name}.journal")


def _difference(found: bytes, expected: Header) -> str:
    """Return in words how a file's first bytes differ from those of the header that is expected."""
    try:
        known = json.loads(found[8 : 8 + int.from_bytes(found[:8], "little")])["__metadata__"]
        told = [f"{name} {known[name][:12]}, expected {value[:12]}" for name, value in expected.metadata().items() if known[name] != value]
    except (ValueError, KeyError, TypeError):  # no text, no JSON, not ours
        told = []
    return f"holds other answers: {'; '.join(told)}" if told else "is not a file of answers"


def _check_finite(logits: np.ndarray, header: Header, first: int) -> None:
    """Refuse what a file cannot hold."""
    import numpy as np

    limit, allowed = (np.finfo(logits.dtype).max, "") if header.slots else (LARGEST, f" within {LARGEST:.0f}, which a float16 holds")
    if np.abs(logits).max(initial=0.0) <= limit:  # NaN, if there is one, is not
        return
    row, column = np.argwhere(~(np.abs(logits) <= limit))[0]
    raise RecipeError(
        f"teacher: its answer to {header.split}[{first + row}] is {logits[row, column]} for class {column}; "
        f"expected finite logits{allowed}; check the weights and the scale of the inputs"
    )


def _check_spots(path: Path, answers: SoftTargets, recompute: Recompute) -> None:
    """Ask the teacher anew for a few rows, always the same, and compare."""
    import numpy as np

    header = answers.header
    generator = np.random.default_rng(derive_seed("spots", *header.metadata().values()))
    for view in sorted(generator.permutation(header.views)[: SPOT_VIEWS if header.samples else 0].tolist()):
        rows = np.sort(generator.permutation(header.samples)[:SPOT_ROWS])
        stored, fresh = answers.stored(view, rows), recompute(view, rows).astype(np.float64)
        bound = TOLERANCE * np.maximum(1.0, np.abs(fresh).max(axis=1, keepdims=True))
        ids = np.broadcast_to(np.arange(header.classes), fresh.shape)
        if header.slots:
            fresh -= fresh.max(axis=1, keepdims=True)
            fresh -= np.log(np.exp(fresh).sum(axis=1, keepdims=True))
            ids, stored = stored["ids"].astype(np.int64), stored["logs"]
            fresh = np.maximum(np.take_along_axis(fresh, ids, axis=1), FLOOR)
        wrong = np.argwhere(~(np.abs(stored - fresh) <= bound + np.abs(fresh) / 2048))
        if len(wrong):
            row, column = wrong[0]
            raise RecipeError(
                f"{path.name}: the teacher no longer answers as is stored: {header.split}[{rows[row]}] in view {view}, class "
                f"{ids[row, column]}: {fresh[row, column]:.5g}, stored {stored[row, column]:.5g}; remove it and ask the teacher again"
            )
