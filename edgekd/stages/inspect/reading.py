# SPDX-License-Identifier: Apache-2.0
"""Read one split of the user's into arrays on disk, and read it again."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekd import usercode
from edgekd.errors import RecipeError
from edgekd.stages.inspect.arrays import (
    BadSampleError,
    InputWriter,
    check_labels,
    describe_rows,
    input_array,
    label_array,
    sample_digest,
    stack_labels,
)
from edgekd.store.arrays import compact

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np

    from edgekd.domain.recipe import EntryPoint, TensorSpec

LABELLED = ("train", "validation", "evaluation")
SPLITS = ("train", "validation", "calibration", "evaluation", "unlabelled")
_PAIR = 2
_REPEATED = 256  # samples of a split that are read a second time


@dataclass(frozen=True, slots=True)
class StoredSplit:
    """A split that was read and stored: a digest of each sample's inputs, and the labels (None where there are none)."""

    digests: list[bytes]
    labels: np.ndarray | None


@dataclass(frozen=True, slots=True)
class ReadSettings:
    """How splits are read.

    ``class_ids``: labels must be class ids. ``progress`` is called with the share done and a few words.
    """

    entry: EntryPoint
    specs: Sequence[TensorSpec]
    class_ids: bool
    out: Path
    progress: Callable[[float, str], None]


class SplitReader:
    """Reads one split."""

    def __init__(self, name: str, data: Any, settings: ReadSettings) -> None:
        self.name, self.data, self.settings, self.specs = name, data, settings, settings.specs
        self.where = f"{settings.entry}: {name}"
        self.count = usercode.call_user_code(len, settings.entry, data, what=f"the length of split '{name}'")
        self.bad_rows: dict[str, list[int]] = {}  # what is wrong with samples, and with which
        self.labels: list[np.ndarray] | np.ndarray = []

    def read(self) -> StoredSplit:
        """Write the arrays of the split.

        Raises:
            RecipeError: what is wrong with its samples.
        """
        with InputWriter(self.settings.out, self.name, self.specs, self.count) as writer:
            if self.count:
                columns = usercode.call_user_code(_columns, self.settings.entry, self.data, what=f"reading {self.name}")
                if columns is None:
                    self._read_samples(writer)
                else:
                    self._read_columns(writer, columns)
        problems = [f"{self.where}: {describe_rows(rows, self.count)}: {problem}" for problem, rows in self.bad_rows.items()]
        if writer.not_finite:
            samples = f"{describe_rows(writer.not_finite, self.count)} {'has' if len(writer.not_finite) == 1 else 'have'}"
            problems.append(f"{self.where}: {samples} an input that is not finite (NaN or infinite); expected finite numbers")
        labels = None
        if self.name in LABELLED and not self.bad_rows:
            try:
                labels = check_labels(stack_labels(self.labels), class_ids=self.settings.class_ids)
            except BadSampleError as error:
                problems.append(f"{self.where}: {error}")
        if problems:
            raise RecipeError(*problems)
        for index in range(len(self.specs)):
            compact(self.settings.out / f"{self.name}.inputs.{index}.npy")
        if labels is not None:
            import numpy as np

            np.save(self.settings.out / f"{self.name}.labels.npy", labels, allow_pickle=False)
        return StoredSplit(writer.digests, labels)

    def _read_columns(self, writer: InputWriter, columns: tuple[Any, ...]) -> None:
        """Read a data set that is nothing but tensors, many samples at once."""
        try:
            inputs, label = self._split_item(columns)
            arrays = [input_array(part, spec, batch=True) for part, spec in zip(inputs, self.specs, strict=True)]
            if self.name in LABELLED:
                self.labels = label_array(label)
        except BadSampleError as error:
            self.bad_rows[str(error)] = list(range(self.count))
            return
        for start in range(0, self.count, writer.chunk_rows):
            writer.add([array[start : start + writer.chunk_rows] for array in arrays])
            self._report_progress(start)

    def _read_samples(self, writer: InputWriter) -> None:
        labels = self.labels = []
        for start in range(0, self.count, writer.chunk_rows):
            rows = []
            for index in range(start, min(start + writer.chunk_rows, self.count)):
                try:
                    arrays, label = self._read_sample(index)
                except BadSampleError as error:
                    self.bad_rows.setdefault(str(error), []).append(index)
                    if index == 0:
                        return  # most likely all are like it
                    continue
                rows.append(arrays)
                if self.name in LABELLED:
                    labels.append(label)
            if self.bad_rows:
                continue  # read on to report all problems; nothing more is stored
            writer.add_rows(rows)
            self._report_progress(start)
        if not self.bad_rows:
            self._check_repeatable(writer)

    def _read_sample(self, index: int) -> tuple[list[np.ndarray], Any]:
        what = f"reading sample {index} of {self.name}"
        item = usercode.call_user_code(operator.getitem, self.settings.entry, self.data, index, what=what)
        inputs, label = self._split_item(item)
        # copies: a data set may return views of one buffer, which it fills for each sample
        arrays = [input_array(part, spec).copy() for part, spec in zip(inputs, self.specs, strict=True)]
        return arrays, label_array(label).copy() if self.name in LABELLED else None

    def _split_item(self, item: Any) -> tuple[list[Any], Any]:
        """Return the inputs and the label of a sample (or of columns): (input, label), with several inputs as a tuple or flat."""
        count = len(self.specs)
        parts = list(item) if isinstance(item, tuple | list) else [item]
        if len(parts) == _PAIR and isinstance(parts[0], tuple | list):
            inputs, label, has_label = list(parts[0]), parts[1], True
        else:
            has_label = len(parts) == count + 1
            inputs, label = (parts[:count], parts[-1]) if has_label else (parts, None)
        pair = "a pair (input, label)" if count == 1 else f"a pair (tuple of {count} inputs, label)"
        if self.name in LABELLED and not has_label:
            raise BadSampleError(f"is {_describe_type(item)}; expected {pair}")
        if len(inputs) != count:
            expected = pair if self.name in LABELLED else f"{count} input{'s' if count > 1 else ''}, or {pair}"
            raise BadSampleError(f"has {len(inputs)} inputs; expected {expected}, as in student.inputs")
        return inputs, label

    def _check_repeatable(self, writer: InputWriter) -> None:
        """Read samples from all over the split a second time, in another order.

        Raises:
            RecipeError: if one differs.
        """
        import numpy as np

        for index in _rows_to_repeat(self.count):
            arrays, label = self._read_sample(index)
            is_same_label = label is None or np.array_equal(label, self.labels[index])
            if sample_digest(arrays, self.specs) != writer.digests[index] or not is_same_label:
                raise RecipeError(
                    f"{self.where}: sample {index} differs when it is read twice; return each sample unchanged: "
                    "augmentation belongs in teacher.train.augment or distill.augment"
                )

    def first_difference(self, stored: StoredSplit) -> int | None:
        """Return the first sample compared that differs from the stored one, or None; the split has as many samples."""
        import numpy as np

        if not self.count:
            return None
        columns = usercode.call_user_code(_columns, self.settings.entry, self.data, what=f"reading {self.name}")
        rows = _rows_to_repeat(self.count) if columns is None else range(self.count)
        try:
            if columns is not None:
                inputs, column = self._split_item(columns)
                arrays = [input_array(part, spec, batch=True) for part, spec in zip(inputs, self.specs, strict=True)]
                labels = label_array(column) if self.name in LABELLED else None
            for row in rows:
                sample, label = (
                    self._read_sample(row)
                    if columns is None
                    else ([array[row] for array in arrays], None if labels is None else labels[row])
                )
                is_same_label = label is None or stored.labels is None or np.array_equal(label, stored.labels[row])
                if sample_digest(sample, self.specs) != stored.digests[row] or not is_same_label:
                    return row
        except BadSampleError:
            return 0
        return None

    def _report_progress(self, start: int) -> None:
        share = (SPLITS.index(self.name) + start / self.count) / len(SPLITS)
        self.settings.progress(share, f"{self.name}: {start} of {self.count} samples")


def _rows_to_repeat(count: int) -> list[int]:
    """Return the samples that are read a second time: the first and last, and others from all over a split, in random order."""
    import numpy as np

    drawn = np.random.default_rng(count).permutation(count)[:_REPEATED]
    return [0, *(int(row) for row in drawn), count - 1]


def _columns(data: Any) -> tuple[Any, ...] | None:
    """Return the tensors of a data set that is nothing but tensors, or a part of one; None for any other."""
    import torch
    from torch.utils.data import Subset, TensorDataset

    if type(data) is TensorDataset:
        return data.tensors
    if type(data) is Subset and (columns := _columns(data.dataset)) is not None:
        rows = torch.as_tensor(list(data.indices), dtype=torch.int64)
        return tuple(column[rows] for column in columns)
    return None


def _describe_type(item: Any) -> str:
    if isinstance(item, tuple | list):
        return f"a {type(item).__name__} of {len(item)}"
    return type(item).__name__
