# SPDX-License-Identifier: Apache-2.0
"""Splits: read from the user's data sets into arrays on disk, and checked."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekd import usercode
from edgekd.errors import RecipeError, expected_one_of
from edgekd.stages.inspect.arrays import OddSampleError, Sink, input_array, label_array, labels_of, numbers, some, stacked

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np

    from edgekd.domain.recipe import EntryPoint

LABELLED = ("train", "validation", "evaluation")
NEEDED = ("train", "validation", "calibration", "evaluation")
SPLITS = (*NEEDED, "unlabelled")
_HELD_OUT = {  # a split, and those that none of its samples may stand in
    "validation": ("train", "calibration", "unlabelled"),
    "evaluation": ("train", "calibration", "unlabelled", "validation"),
}
_PAIR = 2


@dataclass(frozen=True, slots=True)
class Kept:
    """A split that was read: a digest of each sample's inputs, and the labels (None where there are none)."""

    digests: list[bytes]
    labels: np.ndarray | None


@dataclass(frozen=True, slots=True)
class Reader:
    """How splits are read.

    ``classes``: labels must be class ids. ``tell`` hears the share done and a few words.
    """

    entry: EntryPoint
    specs: Sequence[Mapping[str, Any]]
    classes: bool
    out: Path
    tell: Callable[[float, str], None]


def named(found: object, entry: EntryPoint) -> dict[str, Any]:
    """Return the splits by name.

    Raises:
        RecipeError: if one is missing, unknown, empty or no map-style data set.
    """
    if not isinstance(found, Mapping):
        raise RecipeError(f"{entry}: returned {type(found).__name__}; expected a mapping with the splits {', '.join(NEEDED)}")
    problems = [
        f"{entry}: lacks the split '{name}'; expected {', '.join(NEEDED)}, and unlabelled if there is one"
        for name in NEEDED
        if name not in found
    ]
    problems += [f"{entry}: '{name}' is not a split; {expected_one_of(str(name), SPLITS)}" for name in found if name not in SPLITS]
    for name, data in found.items():
        if not _is_map_style(data):
            problems.append(
                f"{entry}: split '{name}' is {type(data).__name__}; expected a map-style torch data set, with __len__ and __getitem__"
            )
        elif usercode.call_user_code(len, entry, data, what=f"the length of split '{name}'") == 0:
            problems.append(f"{entry}: split '{name}' is empty; expected at least one sample")
    if problems:
        raise RecipeError(*problems)
    return dict(found)


def read(found: Mapping[str, Any], reader: Reader) -> dict[str, Kept]:
    """Write ``SPLIT.inputs.I.npy`` and, for labelled splits, ``SPLIT.labels.npy``; a split that does not exist has no samples.

    Raises:
        RecipeError: with the problems of all splits.
    """
    kept: dict[str, Kept] = {}
    problems: list[str] = []
    for name in SPLITS:
        try:
            kept[name] = _Split(name, found.get(name, ()), reader).write()
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(*problems)
    return kept


def overlaps(kept: Mapping[str, Kept], allowed: int, entry: EntryPoint) -> dict[str, dict[str, int]]:
    """Return, by split, how many of its samples stand, byte for byte, in which other split.

    Raises:
        RecipeError: if there are more than allowed, or a calibration sample is not from train.
    """
    counts: dict[str, dict[str, int]] = {name: {} for name in kept}
    problems = []
    places = {name: {digest: row for row, digest in reversed(list(enumerate(split.digests)))} for name, split in kept.items()}
    for name, others in _HELD_OUT.items():
        for other in others:
            shared = [row for row, digest in enumerate(kept[name].digests) if digest in places[other]]
            if shared:
                counts[name][other] = len(shared)
            if len(shared) > allowed:
                pairs = (f"{name}[{row}] is {other}[{places[other][kept[name].digests[row]]}]" for row in shared[:3])
                problems.append(
                    f"{entry}: splits {other} and {name} overlap: {len(shared)} of {len(kept[name].digests)} samples of {name} stand "
                    f"in {other} too ({', '.join(pairs)}); expected at most data.max_overlap = {allowed}"
                )
    strange = [row for row, digest in enumerate(kept["calibration"].digests) if digest not in places["train"]]
    if strange:
        problems.append(
            f"{entry}: calibration: {len(strange)} of {len(kept['calibration'].digests)} samples are not in train ({numbers(strange)}); "
            "expected samples of the training split, as they are there"
        )
    if problems:
        raise RecipeError(*problems)
    return counts


def groups(data: Any, count: int, reader: Reader) -> int:
    """Write ``evaluation.groups.npy``: the speaker or source of each sample, or each sample its own; return how many there are.

    Raises:
        RecipeError: if the data set's ``groups`` are not one name or number for each sample.
    """
    import numpy as np

    where = f"{reader.entry}: evaluation: its attribute 'groups'"
    found = usercode.call_user_code(getattr, reader.entry, data, "groups", None, what="the attribute 'groups' of evaluation")
    if found is None:
        ids = np.arange(count)
    else:
        if not hasattr(found, "__len__") or len(found) != count:
            has = f"has {len(found)} items" if hasattr(found, "__len__") else f"is {type(found).__name__}"
            raise RecipeError(f"{where} {has}; expected one name or number for each of the {count} samples")
        given = np.asarray(found)
        if given.ndim != 1 or given.dtype.kind not in "iuSU":
            raise RecipeError(f"{where} holds {given.dtype.name} of shape {list(given.shape)}; expected a name or a whole number a sample")
        ids = np.unique(given, return_inverse=True)[1]
    np.save(reader.out / "evaluation.groups.npy", ids.astype(np.int64), allow_pickle=False)
    return len(np.unique(ids))


class _Split:
    """One split while it is read."""

    def __init__(self, name: str, data: Any, reader: Reader) -> None:
        self.name, self.data, self.reader, self.specs = name, data, reader, reader.specs
        self.count = usercode.call_user_code(len, reader.entry, data, what=f"the length of split '{name}'")
        self.odd: dict[str, list[int]] = {}  # what is wrong with samples, and with which
        self.labels: list[np.ndarray] | np.ndarray = []

    def write(self) -> Kept:
        with Sink(self.reader.out, self.name, self.specs, self.count) as sink:
            if self.count:
                columns = usercode.call_user_code(_columns, self.reader.entry, self.data, what=f"reading {self.name}")
                if columns is None:
                    self._by_sample(sink)
                else:
                    self._by_column(sink, columns)
        problems = [f"{self._where()}: {some(rows, self.count)}: {text}" for text, rows in self.odd.items()]
        if sink.bad:
            has = f"{some(sink.bad, self.count)} {'has' if len(sink.bad) == 1 else 'have'}"
            problems.append(f"{self._where()}: {has} an input that is not finite (NaN or infinite); expected finite numbers")
        labels = None
        if self.name in LABELLED and not self.odd:
            try:
                labels = labels_of(stacked(self.labels), classes=self.reader.classes)
            except OddSampleError as error:
                problems.append(f"{self._where()}: {error}")
        if problems:
            raise RecipeError(*problems)
        if labels is not None:
            import numpy as np

            np.save(self.reader.out / f"{self.name}.labels.npy", labels, allow_pickle=False)
        return Kept(sink.digests, labels)

    def _by_column(self, sink: Sink, columns: tuple[Any, ...]) -> None:
        """Read a data set that is nothing but tensors, many samples at once."""
        try:
            inputs, label = self._parts(columns)
            arrays = [input_array(part, spec, batch=True) for part, spec in zip(inputs, self.specs, strict=True)]
            if self.name in LABELLED:
                self.labels = label_array(label)
        except OddSampleError as error:
            self.odd[str(error)] = list(range(self.count))
            return
        for start in range(0, self.count, sink.rows):
            sink.add([array[start : start + sink.rows] for array in arrays])
            self._tell(start)

    def _by_sample(self, sink: Sink) -> None:
        labels = self.labels = []
        for start in range(0, self.count, sink.rows):
            rows = []
            for index in range(start, min(start + sink.rows, self.count)):
                try:
                    arrays, label = self._sample(index)
                except OddSampleError as error:
                    self.odd.setdefault(str(error), []).append(index)
                    if index == 0:
                        return  # most likely all are like it
                    continue
                rows.append(arrays)
                if self.name in LABELLED:
                    labels.append(label)
            if self.odd:
                continue  # what else is wrong is told too; nothing is kept
            sink.add_rows(rows)
            self._tell(start)
        if not self.odd:
            self._read_again(sink)

    def _sample(self, index: int) -> tuple[list[np.ndarray], Any]:
        item = usercode.call_user_code(operator.getitem, self.reader.entry, self.data, index, what=f"reading sample {index} of {self.name}")
        inputs, label = self._parts(item)
        arrays = [input_array(part, spec) for part, spec in zip(inputs, self.specs, strict=True)]
        return arrays, label_array(label) if self.name in LABELLED else None

    def _parts(self, item: Any) -> tuple[list[Any], Any]:
        """Return the inputs and the label of a sample (or of columns): (input, label), with several inputs as a tuple or flat."""
        wanted = len(self.specs)
        parts = list(item) if isinstance(item, tuple | list) else [item]
        nested = len(parts) == _PAIR and isinstance(parts[0], tuple | list)
        if nested:
            inputs, label, labelled = list(parts[0]), parts[1], True
        else:
            labelled = len(parts) == wanted + 1
            inputs, label = (parts[:wanted], parts[-1]) if labelled else (parts, None)
        pair = "a pair (input, label)" if wanted == 1 else f"a pair (tuple of {wanted} inputs, label)"
        if self.name in LABELLED and not labelled:
            raise OddSampleError(f"is {_kind(item)}; expected {pair}")
        if len(inputs) != wanted:
            expected = pair if self.name in LABELLED else f"{wanted} input{'s' if wanted > 1 else ''}, or {pair}"
            raise OddSampleError(f"has {len(inputs)} inputs; expected {expected}, as student.inputs says")
        return inputs, label

    def _read_again(self, sink: Sink) -> None:
        """Read a few samples a second time.

        Raises:
            RecipeError: if one differs.
        """
        import numpy as np

        for index in sorted({0, min(3, self.count - 1), self.count // 2, self.count - 1}):
            arrays, label = self._sample(index)
            if sink.digest(arrays) != sink.digests[index] or (label is not None and not np.array_equal(label, self.labels[index])):
                raise RecipeError(
                    f"{self._where()}: sample {index} differs when it is read twice; give each sample as it is: "
                    "augmentation belongs into teacher.train.augment or distill.augment"
                )

    def _where(self) -> str:
        return f"{self.reader.entry}: {self.name}"

    def _tell(self, start: int) -> None:
        share = (SPLITS.index(self.name) + start / self.count) / len(SPLITS)
        self.reader.tell(share, f"{self.name}: {start} of {self.count} samples")


def _columns(data: Any) -> tuple[Any, ...] | None:
    """Return the tensors of a data set that is nothing but tensors, or a part of one; None for any other."""
    import torch
    from torch.utils.data import Subset, TensorDataset

    if type(data) is TensorDataset:
        return data.tensors
    if type(data) is Subset and (whole := _columns(data.dataset)) is not None:
        rows = torch.as_tensor(list(data.indices), dtype=torch.int64)
        return tuple(column[rows] for column in whole)
    return None


def _is_map_style(data: Any) -> bool:
    from torch.utils.data import IterableDataset

    odd = isinstance(data, str | bytes | Mapping | set | frozenset | IterableDataset)
    return not odd and hasattr(data, "__len__") and hasattr(data, "__getitem__")


def _kind(item: Any) -> str:
    if isinstance(item, tuple | list):
        return f"a {type(item).__name__} of {len(item)}"
    return type(item).__name__


def class_counts(labels: np.ndarray | None) -> dict[str, int] | None:
    """Return how many samples each class has, or None if the labels are no class ids."""
    import numpy as np

    if labels is None or labels.dtype != np.int64 or labels.ndim != 1:
        return None
    ids, numbers = np.unique(labels, return_counts=True)
    return {str(name): int(number) for name, number in zip(ids, numbers, strict=True)}
