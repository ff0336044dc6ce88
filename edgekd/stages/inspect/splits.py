# SPDX-License-Identifier: Apache-2.0
"""Splits: the user's data sets, checked one by one and against each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgekd import usercode
from edgekd.errors import RecipeError, expected_one_of
from edgekd.stages.inspect.arrays import first_rows
from edgekd.stages.inspect.reading import SPLITS, SplitReader

if TYPE_CHECKING:
    import numpy as np

    from edgekd.domain.recipe import EntryPoint
    from edgekd.stages.inspect.reading import ReadSettings, StoredSplit

REQUIRED = ("train", "validation", "calibration", "evaluation")
_DISJOINT = {  # a split, and those that must share no sample with it
    "validation": ("train", "calibration", "unlabelled"),
    "evaluation": ("train", "calibration", "unlabelled", "validation"),
}


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
            stored[name] = SplitReader(name, datasets.get(name, ()), settings).read()
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


def check_repeatable(datasets: Mapping[str, Any], stored: Mapping[str, StoredSplit], settings: ReadSettings) -> None:
    """Compare data sets of a second call with the stored ones: lengths, and samples from all over each split with their labels.

    A split that is all tensors is compared in full, which takes about a second per gigabyte.

    Raises:
        RecipeError: what differs: splits that depend on the time, on a generator without a seed, on the order of a folder.
    """
    problems = []
    for name, split in stored.items():
        reader = SplitReader(name, datasets.get(name, ()), settings)
        where = f"{reader.where}: "
        if reader.count != len(split.digests):
            problems.append(f"{where}has {len(split.digests)} samples, and {reader.count} when splits() is called again")
        elif (index := reader.first_difference(split)) is not None:
            problems.append(f"{where}sample {index} is another one when splits() is called again")
    if problems:
        hint = "return the same splits each time: seed generators, sort what a folder lists, leave the time out"
        raise RecipeError(*(f"{problem}; {hint}" for problem in problems))


def _is_map_style(data: Any) -> bool:
    from torch.utils.data import IterableDataset

    is_other_kind = isinstance(data, str | bytes | Mapping | set | frozenset | IterableDataset)
    return not is_other_kind and hasattr(data, "__len__") and hasattr(data, "__getitem__")
