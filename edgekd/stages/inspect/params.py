# SPDX-License-Identifier: Apache-2.0
"""The parameters of the step ``inspect``, and what its checks share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgekd.store.arrays import open_array

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from edgekd.domain.artifact import Json
    from edgekd.domain.recipe import Teacher, TensorSpec


@dataclass(frozen=True, slots=True)
class TeacherParams:
    """A teacher as the recipe gives it.

    It is a module (``model``) with ``weights``, a module that edgekd trains (``trained_here``), or a ``file`` that is a whole model.
    """

    model: str | None
    weights: str | None
    file: str | None
    trained_here: bool

    @classmethod
    def from_recipe(cls, teacher: Teacher) -> TeacherParams:
        """Return the part of ``[teacher]`` or ``[[distill.teachers]]`` that the inspection uses."""
        return cls(None if teacher.model is None else str(teacher.model), teacher.weights, teacher.file, teacher.train is not None)

    @property
    def name(self) -> str:
        """Return how messages name it: its entry point or its file."""
        return str(self.model or self.file)


@dataclass(frozen=True, slots=True)
class InspectParams:
    """What may change the result of the inspection, beside the user's code and data. Entry points are ``file.py:function``.

    ``teachers``, ``assistants`` and ``sizes`` are the further networks of ``[distill]``; ``tapped_losses`` are its losses with taps,
    as ``Loss.to_dict`` returns them. ``views`` is the augmentation of ``[distill]``, ``augment`` that of ``[teacher.train]``.
    ``reads`` are the files that the recipe declares. ``metric`` is None for top-1 and for a score per sample.
    """

    splits: str
    max_overlap: int
    inputs: tuple[TensorSpec, ...]
    student: str
    task: str
    heads: tuple[int, ...]
    teacher: TeacherParams
    checkpoints: tuple[str, ...]
    teachers: tuple[TeacherParams, ...]
    assistants: tuple[str, ...]
    sizes: tuple[str, ...]
    tapped_losses: tuple[Mapping[str, Json], ...]
    pseudo_labels: bool
    metric: str | None
    score: str | None
    augment: str | None
    views: str | None
    reads: tuple[str, ...] = ()

    @property
    def needs_class_ids(self) -> bool:
        """Return whether labels must be class ids: for top-1, and to train a teacher."""
        return self.teacher.trained_here or (self.metric is None and self.score is None)

    @property
    def model_files(self) -> tuple[str, ...]:
        """Return the weights and whole models that the recipe names."""
        names = [name for teacher in (self.teacher, *self.teachers) for name in (teacher.weights, teacher.file) if name is not None]
        return (*names, *self.checkpoints)


@dataclass(frozen=True, slots=True)
class CheckContext:
    """What all checks need: the parameters of the step, the recipe's folder, and the folder of the stored arrays.

    ``notes`` collects what they warn of.
    """

    params: InspectParams
    recipe_dir: Path
    out: Path
    notes: list[str] = field(default_factory=list)

    def samples(self, rows: Sequence[int], split: str = "evaluation") -> list[np.ndarray]:
        """Return inputs of a split, one array (n, ...) for each input of the student."""
        paths = [self.out / f"{split}.inputs.{index}.npy" for index in range(len(self.params.inputs))]
        return [open_array(path)[list(rows)] for path in paths]

    def batch(self, size: int = 2) -> list[np.ndarray]:
        """Return the first samples of the evaluation split, again from the first if it has fewer."""
        import numpy as np

        labels = np.load(self.out / "evaluation.labels.npy", mmap_mode="r")
        return self.samples((np.arange(size) % len(labels)).tolist())
