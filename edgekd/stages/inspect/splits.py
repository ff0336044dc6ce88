# SPDX-License-Identifier: Apache-2.0
"""Splits: read from the user's data sets into arrays on disk, and checked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sized
from typing import TYPE_CHECKING, Any

from edgekd.errors import RecipeError, expected_one_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np

LABELLED = ("train", "validation", "evaluation")
NEEDED = ("train", "validation", "calibration", "evaluation")
SPLITS = (*NEEDED, "unlabelled")
_PAIRS = (
    ("train", "validation"),
    ("train", "evaluation"),
    ("validation", "evaluation"),
    ("calibration", "validation"),
    ("calibration", "evaluation"),
)


def named(found: object, where: str) -> dict[str, Any]:
    """Return the splits by name.

    Raises:
        RecipeError: if one is missing, unknown, empty or no map-style data set.
    """
    if not isinstance(found, Mapping):
        raise RecipeError(f"{where}: returned {type(found).__name__}; expected a mapping with the splits {', '.join(NEEDED)}")
    problems = [
        f"{where}: lacks the split '{name}'; expected {', '.join(NEEDED)}, and unlabelled if there is one"
        for name in NEEDED
        if name not in found
    ]
    problems += [f"{where}: '{name}' is not a split; {expected_one_of(str(name), SPLITS)}" for name in found if name not in SPLITS]
    for name, data in found.items():
        if not isinstance(data, Sized) or not hasattr(data, "__getitem__"):
            problems.append(
                f"{where}: split '{name}' is {type(data).__name__}; expected a map-style torch data set, with __len__ and __getitem__"
            )
        elif len(data) == 0:
            problems.append(f"{where}: split '{name}' is empty; expected at least one sample")
    if problems:
        raise RecipeError(*problems)
    return dict(found)


class Writer:
    """Writes one split's arrays into a folder, sample by sample, checking each."""

    def __init__(self, split: str, where: str, specs: Sequence[Mapping[str, Any]], out: Path) -> None:
        self.split, self.where, self.specs, self.out = split, f"{where}: {split}", specs, out

    def write(self, data: Any, progress: Callable[[float], None]) -> None:
        """Write ``SPLIT.inputs.I.npy`` and, for labelled splits, ``SPLIT.labels.npy``.

        Raises:
            RecipeError: if a sample does not fit the student's inputs, or differs when it is read twice.
        """
        import numpy as np

        count = len(data)
        first_inputs, first_label = self._sample(data, 0)
        arrays = [
            _reserved(self.out / f"{self.split}.inputs.{i}.npy", array.dtype, (count, *array.shape)) for i, array in enumerate(first_inputs)
        ]
        labels: list[Any] = []
        for index in range(count):
            inputs, label = (first_inputs, first_label) if index == 0 else self._sample(data, index)
            for array, item in zip(arrays, inputs, strict=True):
                array[index] = item
            labels.append(label)
            if index % 2000 == 0:
                progress(index / count)
        for index in sorted({0, count // 2, count - 1}):
            if any(not np.array_equal(array[index], item) for array, item in zip(arrays, self._sample(data, index)[0], strict=True)):
                raise RecipeError(
                    f"{self.where}: sample {index} differs when it is read twice; augmentation belongs into teacher.train.augment"
                )
        for array in arrays:
            self._check_finite(array)
            array.flush()
        if self.split in LABELLED:
            np.save(self.out / f"{self.split}.labels.npy", self._labels(labels))

    def write_nothing(self) -> None:
        """Write the arrays of a split that does not exist: no samples."""
        import numpy as np

        for index, spec in enumerate(self.specs):
            np.save(self.out / f"{self.split}.inputs.{index}.npy", np.zeros((0, *spec["shape"][1:]), spec["dtype"]))

    def _sample(self, data: Any, index: int) -> tuple[list[np.ndarray], Any]:
        try:
            item = data[index]
        except (Exception, SystemExit) as error:
            text = str(error).strip().splitlines()
            raise RecipeError(
                f"{self.where}: reading sample {index} raised {type(error).__name__}" + (f": {text[0]}" if text else "")
            ) from error
        label = None
        if self.split in LABELLED:
            if not isinstance(item, tuple | list) or len(item) != 2:  # noqa: PLR2004  (input and label)
                raise RecipeError(f"{self.where}: sample {index} is {_kind(item)}; expected a pair (input, label)")
            item, label = item
        elif isinstance(item, tuple | list) and len(item) == 2 and (len(self.specs) == 1 or isinstance(item[0], tuple | list)):  # noqa: PLR2004  (a pair)
            item = item[0]  # a label that comes along is not read
        parts = list(item) if isinstance(item, tuple | list) else [item]
        if len(parts) != len(self.specs):
            raise RecipeError(f"{self.where}: sample {index} has {len(parts)} inputs; expected {len(self.specs)}, as student.inputs says")
        return [self._array(part, spec, index) for part, spec in zip(parts, self.specs, strict=True)], label

    def _array(self, part: Any, spec: Mapping[str, Any], index: int) -> np.ndarray:
        import numpy as np

        if not hasattr(part, "shape"):
            raise RecipeError(f"{self.where}: sample {index}: input '{spec['name']}' is {_kind(part)}; expected a tensor or an array")
        array = np.asarray(part)
        wanted = tuple(spec["shape"][1:])
        if array.shape != wanted:
            raise RecipeError(
                f"{self.where}: sample {index}: input '{spec['name']}' has shape {list(array.shape)}; "
                f"expected {list(wanted)}, as student.inputs says"
            )
        if array.dtype.name != spec["dtype"]:
            raise RecipeError(
                f"{self.where}: sample {index}: input '{spec['name']}' is {array.dtype.name}; "
                f"expected {spec['dtype']}, as student.inputs says"
            )
        return array

    def _check_finite(self, array: np.ndarray) -> None:
        import numpy as np

        if array.dtype.kind != "f":
            return
        for start in range(0, len(array), 4096):
            bad = np.flatnonzero(~np.isfinite(array[start : start + 4096]).reshape(len(array[start : start + 4096]), -1).all(axis=1))
            if len(bad):
                raise RecipeError(
                    f"{self.where}: sample {start + bad[0]} has an input that is not finite (NaN or infinite); expected finite numbers"
                )

    def _labels(self, labels: list[Any]) -> np.ndarray:
        import numpy as np

        try:
            found = np.asarray([np.asarray(label) for label in labels])
        except ValueError:
            raise RecipeError(f"{self.where}: labels have different shapes; expected one class id a sample") from None
        if found.dtype.kind == "f":
            bad = np.flatnonzero(~np.isfinite(found.reshape(len(found), -1)).all(axis=1))
            if len(bad):
                raise RecipeError(f"{self.where}: label {bad[0]} is not finite (NaN or infinite); expected a class id")
        if found.dtype.kind not in "iu" or found.ndim != 1:
            shape = f" of shape {list(found.shape[1:])}" if found.ndim > 1 else ""
            raise RecipeError(f"{self.where}: labels are {found.dtype.name}{shape}; expected one whole number a sample, its class id")
        if found.min() < 0:
            raise RecipeError(f"{self.where}: label {int(np.argmin(found))} is {found.min()}; expected class ids from 0 upwards")
        return found.astype(np.int64)


def overlaps(out: Path, specs: Sequence[Mapping[str, Any]], allowed: int) -> tuple[list[str], dict[str, int]]:
    """Return the problems of samples that stand, byte for byte, in two splits, and how many were found by pair."""
    import hashlib

    import numpy as np

    digests = {}
    for split in NEEDED:
        arrays = [np.load(out / f"{split}.inputs.{i}.npy", mmap_mode="r") for i in range(len(specs))]
        digests[split] = [
            hashlib.blake2b(b"".join(array[row].tobytes() for array in arrays), digest_size=16).digest() for row in range(len(arrays[0]))
        ]
    problems, counts = [], {}
    for first, second in _PAIRS:
        inside = set(digests[first])
        shared = [row for row, item in enumerate(digests[second]) if item in inside]
        counts[f"{first}/{second}"] = len(shared)
        if len(shared) > allowed:
            rows = ", ".join(map(str, shared[:3]))
            problems.append(
                f"splits {first} and {second} overlap: {len(shared)} of {len(digests[second])} samples of {second} "
                f"(first: {rows}) stand in {first} too; "
                f"expected at most data.max_overlap = {allowed}"
            )
    train = set(digests["train"])
    strange = sum(item not in train for item in digests["calibration"])
    if strange:
        problems.append(
            f"split calibration: {strange} of {len(digests['calibration'])} samples are not in train; "
            "expected samples of the training split"
        )
    return problems, counts


def groups(data: Any, count: int, out: Path) -> int:
    """Write ``evaluation.groups.npy``: the speaker or source of each sample, or each sample its own; return how many."""
    import numpy as np

    found = getattr(data, "groups", None)
    if found is None:
        ids = np.arange(count)
    else:
        if len(found) != count:
            raise RecipeError(
                f"split evaluation: its attribute 'groups' has {len(found)} items; expected one for each of the {count} samples"
            )
        ids = np.unique(np.asarray(found), return_inverse=True)[1]
    np.save(out / "evaluation.groups.npy", ids.astype(np.int64))
    return len(np.unique(ids))


def _reserved(path: Path, dtype: Any, shape: tuple[int, ...]) -> Any:
    """Return a memory-mapped array whose room on the disk is reserved: a full disk is an error now, not a signal later."""
    import numpy as np

    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with path.open("rb+") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _kind(item: Any) -> str:
    if isinstance(item, tuple | list):
        return f"a {type(item).__name__} of {len(item)}"
    return type(item).__name__
