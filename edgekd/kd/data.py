# SPDX-License-Identifier: Apache-2.0
"""Load the splits that ``inspect`` stored as arrays, with the teacher's logits, as tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgekd.errors import RecipeError
from edgekd.kd import output_spec, views
from edgekd.kd.losses import UNLABELLED
from edgekd.kd.output_spec import MULTICLASS_OUTPUT, OutputSpec
from edgekd.kd.soft_targets import storage
from edgekd.store.arrays import open_array
from edgekd.store.digests import digest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from torch import Tensor

    from edgekd.domain.artifact import Artifact
    from edgekd.domain.recipe import Recipe
    from edgekd.kd.soft_targets.storage import SoftTargets
    from edgekd.kd.views import ViewOptions

_MIN_PROBABILITY = 1e-6  # so that a teacher that is confident and wrong still leaves the others a weight


@dataclass(frozen=True, slots=True)
class SampledSoftTargets:
    """Soft targets that stay in their files until a batch reads them: parts (file, view). Indexed like a tensor (n, C)."""

    parts: tuple[tuple[SoftTargets, int], ...]
    temperature: float

    @property
    def shape(self) -> tuple[int, int]:
        """Return the numbers of samples and classes."""
        return sum(soft_targets.header.samples for soft_targets, _ in self.parts), self.parts[0][0].header.classes

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return the logits of rows, such that their softmax at the temperature estimates the teacher's."""
        import torch

        logits = torch.empty(len(rows), self.shape[1])
        first = 0
        for soft_targets, view in self.parts:
            samples = soft_targets.header.samples
            is_in_part = (rows >= first) & (rows < first + samples)
            if bool(is_in_part.any()):
                logits[is_in_part] = torch.from_numpy(soft_targets.read(view, (rows[is_in_part] - first).numpy(), self.temperature))
            first += samples
        return logits


@dataclass(frozen=True, slots=True)
class Samples:
    """A split: the inputs of each sample, its label and the teacher's logits.

    Shapes:
        inputs: one tensor (n, ...) for each input of the student; labels: (n,) int64, -1 where there is none, or as
        ``output_spec.parse_labels`` returns them; teacher_logits: (n, C) or None. In a mixed view, labels are those of the larger
        shares, and partner_labels those of the rest: (n,) int64; shares: (n,) float32, from 0.5 to 1.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor
    teacher_logits: Tensor | SampledSoftTargets | None = None
    partner_labels: Tensor | None = None
    shares: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, rows: Tensor) -> Samples:
        """Return a batch."""
        teacher_logits = None if self.teacher_logits is None else self.teacher_logits[rows]
        partner_labels, shares = (None if item is None else item[rows] for item in (self.partner_labels, self.shares))
        return Samples(tuple(item[rows] for item in self.inputs), self.labels[rows], teacher_logits, partner_labels, shares)

    def targets(self, classes: int) -> Tensor:
        """Return what losses compare with: the labels, or the class probabilities (n, C) of a mixed view, 0 where a label is missing."""
        import torch

        if self.partner_labels is None or self.shares is None:
            return self.labels
        probabilities = torch.zeros(len(self), classes)
        for labels, shares in ((self.labels, self.shares), (self.partner_labels, 1 - self.shares)):
            probabilities.scatter_add_(1, labels.clamp(min=0)[:, None], shares[:, None])
        return probabilities * ((self.labels != UNLABELLED) & (self.partner_labels != UNLABELLED))[:, None]


def split_references(recipe: Recipe, split: str, *, labels: bool = False) -> dict[str, str]:
    """Return the inputs of a step that reads a split: its names for them -> references to artifacts."""
    references = {f"{split}.inputs.{index}": f"inspect:{split}.inputs.{index}.npy" for index in range(len(recipe.student.inputs))}
    if labels:
        references[f"{split}.labels"] = f"inspect:{split}.labels.npy"
    return references


def load_arrays(artifacts: Mapping[str, Artifact], split: str) -> list[np.ndarray]:
    """Return the inputs of a split, one array (n, ...) for each input of the student."""
    count = sum(name.startswith(f"{split}.inputs.") for name in artifacts)
    return [open_array(artifacts[f"{split}.inputs.{index}"].path).load() for index in range(count)]


@dataclass(frozen=True, slots=True)
class Ensemble:
    """How the logits of several teachers are averaged: weights, the reference teacher's first, and ``fixed`` or ``confidence``."""

    weights: tuple[float, ...]
    weighting: str


def load_split(
    artifacts: Mapping[str, Artifact],
    split: str,
    *,
    view: ViewOptions | None = None,
    number: int = 0,
    ensemble: Ensemble | None = None,
    checkpoint: int | None = None,
    output: OutputSpec = MULTICLASS_OUTPUT,
    temperature: float = 1.0,
) -> Samples:
    """Return a split with the labels and soft targets that the step has for it.

    Args:
        artifacts: The inputs of the step.
        split: The name of the split.
        view: How views are made; None if there is only one.
        number: The view that is returned.
        ensemble: How several teachers' logits are averaged; None if there is one teacher.
        checkpoint: The earlier checkpoint of the reference teacher whose logits replace its own.
        output: How labels are read; labels that do not fit it count as missing.
        temperature: The temperature for which sampled soft targets are read.

    Raises:
        RecipeError: if soft targets belong to other data, or those of several teachers are sampled.
    """
    import numpy as np
    import torch

    inputs = tuple(map(torch.from_numpy, load_arrays(artifacts, split)))
    labels = torch.full((len(inputs[0]),), UNLABELLED)
    if (artifact := artifacts.get(f"{split}.labels")) is not None:
        parsed = output_spec.parse_labels(output, np.load(artifact.path, allow_pickle=False))
        labels = labels if parsed is None else parsed
    teacher_logits = None
    if f"{split}.soft_targets" in artifacts:
        reference = f"{split}.soft_targets" if checkpoint is None else f"{split}.soft_targets.checkpoint.{checkpoint}"
        further = [] if ensemble is None else [f"{split}.soft_targets.teacher.{index}" for index in range(len(ensemble.weights) - 1)]
        data_digest = digest_of(artifacts, f"{split}.inputs.")
        soft_targets = [storage.open_soft_targets(artifacts[name].path, data=data_digest) for name in (reference, *further)]
        teacher_logits = _teacher_logits(soft_targets, number, labels, ensemble, temperature)
    if view is None:
        return Samples(inputs, labels, teacher_logits)
    samples = Samples(views.make_view(view, split, inputs, number), labels, teacher_logits)
    mixture = views.draw_mixture(view, split, len(samples), number)
    return samples if mixture is None else replace(samples, partner_labels=labels[mixture.partners], shares=mixture.shares)


def digest_of(artifacts: Mapping[str, Artifact], prefix: str) -> str:
    """Return one digest of all inputs of a step whose names have a prefix."""
    return digest({name: artifact.digest for name, artifact in artifacts.items() if name.startswith(prefix)})


def _teacher_logits(
    soft_targets: Sequence[SoftTargets], view: int, labels: Tensor, ensemble: Ensemble | None, temperature: float
) -> Tensor | SampledSoftTargets:
    """Return the logits of a view, the mean if there are several teachers."""
    import torch

    if soft_targets[0].header.slots:
        if ensemble is not None:
            classes = soft_targets[0].header.classes
            raise RecipeError(
                f"distill.teachers: several teachers of {classes} classes, whose soft targets are sampled; "
                'expected distill.soft_target_storage = "dense"'
            )
        return SampledSoftTargets(((soft_targets[0], view),), temperature)
    logits = [torch.from_numpy(item.read(view, range(item.header.samples))) for item in soft_targets]
    return logits[0] if ensemble is None else ensemble_logits(logits, ensemble.weights, labels, ensemble.weighting)


def ensemble_logits(teacher_logits: Sequence[Tensor], weights: Sequence[float], labels: Tensor, weighting: str) -> Tensor:
    """Return the weighted mean of the logits of several teachers.

    With weighting ``fixed``, ``weights`` are used as they are. With ``confidence``, a teacher's weight for a sample is multiplied by
    ``(1 - (1 / p) / sum of all teachers' 1 / p) / (teachers - 1)``, where ``p`` is its probability for the label, or for the class
    that it predicts itself where there is no label. The mean of logits is the geometric mean of the probabilities, at any
    temperature.

    Shapes:
        teacher_logits: (n, C) each; labels: (n,) int64, -1 where there is none; result: (n, C).

    Source:
        Zhang et al., arXiv 2201.00007, equation 3 (with ``exp(cross-entropy) = 1 / p``).
    """
    import torch

    logits = torch.stack(tuple(teacher_logits))
    sample_weights = torch.tensor(weights).reshape(-1, 1).repeat(1, len(labels))
    if weighting == "confidence":
        probabilities = logits.softmax(dim=2)
        classes = torch.where(labels == UNLABELLED, probabilities.argmax(dim=2), labels)
        doubt = 1 / probabilities.gather(2, classes[:, :, None])[:, :, 0].clamp(min=_MIN_PROBABILITY)
        sample_weights = sample_weights * (1 - doubt / doubt.sum(dim=0)) / (len(teacher_logits) - 1)
    return (sample_weights / sample_weights.sum(dim=0))[:, :, None].mul(logits).sum(dim=0)


def make_view(options: ViewOptions, split: str, inputs: list[np.ndarray], number: int) -> list[np.ndarray]:
    """Return one view of the inputs of a split, as arrays."""
    import torch

    return [item.numpy() for item in views.make_view(options, split, tuple(map(torch.from_numpy, inputs)), number)]


def concatenate(first: Samples, second: Samples) -> Samples:
    """Return two splits as one; labels of the second that have another shape than those of the first count as missing."""
    import torch

    teacher_logits: Tensor | SampledSoftTargets | None = None
    match first.teacher_logits, second.teacher_logits:
        case SampledSoftTargets() as sampled, SampledSoftTargets() as more:
            teacher_logits = SampledSoftTargets((*sampled.parts, *more.parts), sampled.temperature)
        case torch.Tensor() as logits, torch.Tensor() as more_logits:
            teacher_logits = torch.cat([logits, more_logits])
    inputs = tuple(torch.cat(pair) for pair in zip(first.inputs, second.inputs, strict=True))
    missing = float("nan") if first.labels.is_floating_point() else UNLABELLED
    is_same_shape = second.labels.shape[1:] == first.labels.shape[1:]
    labels = second.labels if is_same_shape else torch.full((len(second), *first.labels.shape[1:]), missing)
    labels = torch.cat([first.labels, labels.to(first.labels.dtype)])
    if first.partner_labels is None or second.partner_labels is None or first.shares is None or second.shares is None:
        return Samples(inputs, labels, teacher_logits)
    partner_labels = torch.cat([first.partner_labels, second.partner_labels])
    return Samples(inputs, labels, teacher_logits, partner_labels, torch.cat([first.shares, second.shares]))
