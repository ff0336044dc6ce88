# SPDX-License-Identifier: Apache-2.0
"""Splits: read from the user's data sets into arrays on disk, and checked."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekd import usercode
from edgekd.errors import RecipeError, expected_one_of
from edgekd.stages.inspect.arrays import (
    BadSampleError,
    InputWriter,
    check_labels,
    describe_rows,
    first_rows,
    input_array,
    label_array,
    stack_labels,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np

    from edgekd.domain.recipe import EntryPoint, TensorSpec

LABELLED = ("train", "validation", "evaluation")
REQUIRED = ("train", "validation", "calibration", "evaluation")
SPLITS = (*REQUIRED, "unlabelled")
_DISJOINT = {  # a split, and those that must share no sample with it
    "validation": ("train", "calibration", "unlabelled"),
    "evaluation": ("train", "calibration", "unlabelled", "validation"),
}
_PAIR = 2


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


def check_datasets(returned: object, entry: EntryPoint) -> dict[str, Any]:
    """Return the data sets by the name of their split.

    Raises:
        RecipeError: if a split is missing, unknown, empty or not a map-style data set.
    """
    if not isinstance(returned, Mapping):
        raise RecipeError(f"{entry}: returned {type(returned).__name__}; expected a mapping with the splits {', '.join(REQUIRED)}")
    problems = [
        f"{entry}: lacks the split '{name}'; expected {', '.join(REQUIRED)}, and unlabelled if there is one"
        for name in REQUIRED
        if name not in returned
    ]
    problems += [f"{entry}: '{name}' is not a split; {expected_one_of(str(name), SPLITS)}" for name in returned if name not in SPLITS]
    for name, data in returned.items():
        if not _is_map_style(data):
            problems.append(
                f"{entry}: split '{name}' is {type(data).__name__}; expected a map-style torch data set, with __len__ and __getitem__"
            )
        elif usercode.call_user_code(len, entry, data, what=f"the length of split '{name}'") == 0:
            problems.append(f"{entry}: split '{name}' is empty; expected at least one sample")
    if problems:
        raise RecipeError(*problems)
    return dict(returned)


def read_splits(datasets: Mapping[str, Any], settings: ReadSettings) -> dict[str, StoredSplit]:
    """Write ``SPLIT.inputs.I.npy`` and, for labelled splits, ``SPLIT.labels.npy``; a split that does not exist has no samples.

    Raises:
        RecipeError: with the problems of all splits.
    """
    stored: dict[str, StoredSplit] = {}
    problems: list[str] = []
    for name in SPLITS:
        try:
            stored[name] = _SplitReader(name, datasets.get(name, ()), settings).read()
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(*problems)
    return stored


def count_overlaps(stored: Mapping[str, StoredSplit], allowed: int, entry: EntryPoint) -> dict[str, dict[str, int]]:
    """Return, by split, how many of its samples are, byte for byte, in which other split.

    Raises:
        RecipeError: if there are more than allowed, or a calibration sample is not from train.
    """
    counts: dict[str, dict[str, int]] = {name: {} for name in stored}
    problems = []
    first_row = {name: {digest: row for row, digest in reversed(list(enumerate(split.digests)))} for name, split in stored.items()}
    for name, other_splits in _DISJOINT.items():
        digests = stored[name].digests
        for other in other_splits:
            shared = [row for row, digest in enumerate(digests) if digest in first_row[other]]
            if shared:
                counts[name][other] = len(shared)
            if len(shared) > allowed:
                pairs = (f"{name}[{row}] is {other}[{first_row[other][digests[row]]}]" for row in shared[:3])
                problems.append(
                    f"{entry}: splits {other} and {name} overlap: {len(shared)} of {len(digests)} samples of {name} are also in {other} "
                    f"({', '.join(pairs)}); expected at most data.max_overlap = {allowed}"
                )
    calibration = stored["calibration"].digests
    foreign = [row for row, digest in enumerate(calibration) if digest not in first_row["train"]]
    if foreign:
        problems.append(
            f"{entry}: calibration: {len(foreign)} of {len(calibration)} samples are not in train ({first_rows(foreign)}); "
            "expected unchanged samples of the training split"
        )
    if problems:
        raise RecipeError(*problems)
    return counts


def write_groups(data: Any, count: int, settings: ReadSettings) -> int:
    """Write ``evaluation.groups.npy``, the speaker or source of each sample (without groups, each sample is one); return their number.

    Raises:
        RecipeError: if the data set's ``groups`` are not one name or number for each sample.
    """
    import numpy as np

    where = f"{settings.entry}: evaluation: its attribute 'groups'"
    groups = usercode.call_user_code(getattr, settings.entry, data, "groups", None, what="the attribute 'groups' of evaluation")
    if groups is None:
        ids = np.arange(count)
    else:
        names = usercode.call_user_code(np.asarray, settings.entry, groups, what="the attribute 'groups' of evaluation")
        if names.ndim == 1 and names.dtype.kind == "O" and all(isinstance(name, str) for name in names):  # as a column of pandas has them
            names = names.astype(str)
        if names.ndim == 0:
            raise RecipeError(f"{where} is {type(groups).__name__}; expected one name or number for each of the {count} samples")
        if len(names) != count:
            raise RecipeError(f"{where} has {len(names)} items; expected one name or number for each of the {count} samples")
        if names.ndim != 1 or names.dtype.kind not in "iuSU":
            problem = f"holds {names.dtype.name} of shape {list(names.shape)}"
            raise RecipeError(f"{where} {problem}; expected one name or whole number per sample")
        ids = np.unique(names, return_inverse=True)[1]
    np.save(settings.out / "evaluation.groups.npy", ids.astype(np.int64), allow_pickle=False)
    return len(np.unique(ids))


def class_counts(labels: np.ndarray | None) -> dict[str, int] | None:
    """Return how many samples each class has, or None if the labels are not class ids."""
    import numpy as np

    if labels is None or labels.dtype != np.int64 or labels.ndim != 1:
        return None
    ids, counts = np.unique(labels, return_counts=True)
    return {str(name): int(count) for name, count in zip(ids, counts, strict=True)}


class _SplitReader:
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
        arrays = [input_array(part, spec) for part, spec in zip(inputs, self.specs, strict=True)]
        return arrays, label_array(label) if self.name in LABELLED else None

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
        """Read a few samples a second time.

        Raises:
            RecipeError: if one differs.
        """
        import numpy as np

        for index in sorted({0, min(3, self.count - 1), self.count // 2, self.count - 1}):
            arrays, label = self._read_sample(index)
            is_same_label = label is None or np.array_equal(label, self.labels[index])
            if writer.digest(arrays) != writer.digests[index] or not is_same_label:
                raise RecipeError(
                    f"{self.where}: sample {index} differs when it is read twice; return each sample unchanged: "
                    "augmentation belongs in teacher.train.augment or distill.augment"
                )

    def _report_progress(self, start: int) -> None:
        share = (SPLITS.index(self.name) + start / self.count) / len(SPLITS)
        self.settings.progress(share, f"{self.name}: {start} of {self.count} samples")


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


def _is_map_style(data: Any) -> bool:
    from torch.utils.data import IterableDataset

    is_other_kind = isinstance(data, str | bytes | Mapping | set | frozenset | IterableDataset)
    return not is_other_kind and hasattr(data, "__len__") and hasattr(data, "__getitem__")


def _describe_type(item: Any) -> str:
    if isinstance(item, tuple | list):
        return f"a {type(item).__name__} of {len(item)}"
    return type(item).__name__
