# SPDX-License-Identifier: Apache-2.0
"""The splits that ``inspect`` keeps as arrays, as tensors."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekd.errors import RecipeError
from edgekd.kd import output_spec, views
from edgekd.kd.losses import UNLABELLED
from edgekd.kd.output_spec import MULTICLASS_OUTPUT, OutputSpec
from edgekd.kd.soft_targets import storage
from edgekd.kd.teachers.ensemble import ensemble_logits
from edgekd.store.digests import digest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from torch import Tensor

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.recipe import Recipe
    from edgekd.kd.soft_targets.storage import SoftTargets
    from edgekd.kd.views import Augment


@dataclass(frozen=True, slots=True)
class SampledSoftTargets:
    """Answers that stay in their files until a batch asks for them, of one view each: (file, view). Reads as a tensor (n, C) would."""

    parts: tuple[tuple[SoftTargets, int], ...]
    temperature: float

    @property
    def shape(self) -> tuple[int, int]:
        """Return samples and classes."""
        return sum(kept.header.samples for kept, _ in self.parts), self.parts[0][0].header.classes

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return the logits of rows, such that their softmax at the temperature estimates the teacher's."""
        import torch

        found = torch.empty(len(rows), self.shape[1])
        first = 0
        for kept, make_view in self.parts:
            own = (rows >= first) & (rows < first + kept.header.samples)
            if bool(own.any()):
                found[own] = torch.from_numpy(kept.read(make_view, (rows[own] - first).numpy(), self.temperature))
            first += kept.header.samples
        return found


@dataclass(frozen=True, slots=True)
class Samples:
    """A split: the inputs of each sample, its class (-1 where it has none) and the teacher's logits.

    Shapes:
        inputs: one tensor (n, ...) for each input of the student; labels: (n,) int64, or as ``kd.forms`` has them;
        outputs: (n, C) or None.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor
    outputs: Tensor | SampledSoftTargets | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, rows: Tensor) -> Samples:
        """Return a batch."""
        outputs = None if self.outputs is None else self.outputs[rows]
        return Samples(tuple(item[rows] for item in self.inputs), self.labels[rows], outputs)


def split_references(recipe: Recipe, split: str, *, labels: bool = False) -> dict[str, str]:
    """Return the inputs of a step that reads a split: the step's own name -> artifact."""
    found = {f"{split}.inputs.{index}": f"inspect:{split}.inputs.{index}.npy" for index in range(len(recipe.student.inputs))}
    if labels:
        found[f"{split}.labels"] = f"inspect:{split}.labels.npy"
    return found


def load_arrays(artifacts: Mapping[str, Artifact], split: str) -> list[np.ndarray]:
    """Return the inputs of a split, one array (n, ...) for each input of the student."""
    count = sum(name.startswith(f"{split}.inputs.") for name in artifacts)
    return [_array(artifacts[f"{split}.inputs.{index}"].path) for index in range(count)]


@dataclass(frozen=True, slots=True)
class Ensemble:
    """How the answers of several teachers become one: their weights, the reference's first, and ``weights`` or ``confidence``."""

    weights: tuple[float, ...]
    weighting: str


def load_split(
    artifacts: Mapping[str, Artifact],
    split: str,
    *,
    augment: Augment | None = None,
    number: int = 0,
    ensemble: Ensemble | None = None,
    checkpoint: int | None = None,
    form: OutputSpec = MULTICLASS_OUTPUT,
    temperature: float = 1.0,
) -> Samples:
    """Return a split, or a view of it, with what the step has of it; labels that are no classes count as none.

    ``checkpoint`` is that of the reference whose answers stand for its own. ``temperature`` is that at which sampled answers are
    read.

    Raises:
        RecipeError: if answers belong to other data, or several teachers' are sampled.
    """
    import numpy as np
    import torch

    inputs = tuple(map(torch.from_numpy, load_arrays(artifacts, split)))
    classes = torch.full((len(inputs[0]),), UNLABELLED)
    if (found := artifacts.get(f"{split}.labels")) is not None:
        labels = output_spec.parse_labels(form, np.load(found.path, allow_pickle=False))
        classes = classes if labels is None else labels
    outputs = None
    if f"{split}.outputs" in artifacts:
        first = f"{split}.outputs" if checkpoint is None else f"{split}.outputs.checkpoint.{checkpoint}"
        names = [first, *(f"{split}.outputs.teacher.{index}" for index in range(0 if ensemble is None else len(ensemble.weights) - 1))]
        kept = [storage.open_soft_targets(artifacts[name].path, data=digest_of(artifacts, f"{split}.inputs.")) for name in names]
        outputs = _outputs(kept, number, classes, ensemble, temperature)
    return Samples(inputs if augment is None else views.make_view(augment, split, inputs, number), classes, outputs)


def digest_of(artifacts: Mapping[str, Artifact], start: str) -> str:
    """Return one digest of all inputs of a step whose names start alike."""
    return digest({name: item.digest for name, item in artifacts.items() if name.startswith(start)})


def _outputs(
    kept: Sequence[SoftTargets], number: int, classes: Tensor, ensemble: Ensemble | None, temperature: float
) -> Tensor | SampledSoftTargets:
    """Return the answers of a view, several teachers' as one."""
    import torch

    if kept[0].header.slots:
        if ensemble is not None:
            found = f"several teachers of {kept[0].header.classes} classes, whose answers are kept as samples"
            raise RecipeError(f'distill.teachers: {found}; expected distill.soft_target_storage = "dense"')
        return SampledSoftTargets(((kept[0], number),), temperature)
    logits = [torch.from_numpy(one.read(number, range(one.header.samples))) for one in kept]
    return logits[0] if ensemble is None else ensemble_logits(logits, ensemble.weights, classes, ensemble.weighting)


def make_view(augment: Augment, split: str, inputs: list[np.ndarray], number: int) -> list[np.ndarray]:
    """Return one view of the inputs of a split, as arrays."""
    import torch

    return [item.numpy() for item in views.make_view(augment, split, tuple(map(torch.from_numpy, inputs)), number)]


def concatenate(first: Samples, second: Samples) -> Samples:
    """Return two splits as one, the second without labels where it has none of the first's form."""
    import torch

    if isinstance(first.outputs, SampledSoftTargets) and isinstance(second.outputs, SampledSoftTargets):
        outputs: Tensor | SampledSoftTargets | None = SampledSoftTargets(
            (*first.outputs.parts, *second.outputs.parts), first.outputs.temperature
        )
    else:
        both = [item for item in (first.outputs, second.outputs) if isinstance(item, torch.Tensor)]
        outputs = torch.cat(both) if len(both) == 2 else None  # noqa: PLR2004  (one would not be enough)
    inputs = tuple(torch.cat(pair) for pair in zip(first.inputs, second.inputs, strict=True))
    none = torch.full((len(second), *first.labels.shape[1:]), float("nan") if first.labels.is_floating_point() else UNLABELLED)
    labels = second.labels if second.labels.shape[1:] == first.labels.shape[1:] else none
    return Samples(inputs, torch.cat([first.labels, labels.to(first.labels.dtype)]), outputs)


def _array(path: Path) -> np.ndarray:
    """Return an array: in memory if it takes less than half of what is free, else mapped from its file."""
    import numpy as np

    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # copy-on-write: torch wants arrays that could be written; nothing writes
    found: np.ndarray = np.load(path, mmap_mode="c" if path.stat().st_size > free_bytes // 2 else None, allow_pickle=False)
    return found
