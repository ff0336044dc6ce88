# SPDX-License-Identifier: Apache-2.0
"""Teacher, student, metric and augmentation, each tried on a few samples before any long work starts."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import usercode
from edgekd.domain.losses import Loss
from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from torch import nn

_PROBE = 2  # samples that models are tried on
_SCORED = 64  # samples that a metric is tried on
_TWO_AXES = 2
_TOLERANCE = 1e-2  # of the largest output: a sample alone and in a batch; rounding stays far below


@dataclass(frozen=True, slots=True)
class Bench:
    """What models are tried with: the parameters of the step, the recipe's folder, and the folder of the arrays."""

    params: Mapping[str, Any]
    recipe_dir: Path
    out: Path

    def entry(self, name: str) -> EntryPoint:
        """Return an entry that the recipe names."""
        return EntryPoint.parse(self.params[name])

    def samples(self, rows: Sequence[int], split: str = "evaluation") -> list[np.ndarray]:
        """Return inputs of a split, one array (n, ...) for each input of the student."""
        import numpy as np

        paths = [self.out / f"{split}.inputs.{index}.npy" for index in range(len(self.params["inputs"]))]
        return [np.array(np.load(path, mmap_mode="r")[list(rows)]) for path in paths]

    def probe(self) -> list[np.ndarray]:
        """Return a batch of two samples."""
        import numpy as np

        labels = np.load(self.out / "evaluation.labels.npy", mmap_mode="r")
        return self.samples([0, min(_PROBE, len(labels)) - 1])


def teacher(bench: Bench, given: Mapping[str, Any], name: str = "teacher") -> dict[str, Any]:
    """Try a teacher, and keep it: ``NAME.safetensors``, or a whole model under its suffix; return its size and outputs.

    Args:
        bench: What it is tried with.
        given: ``teacher`` (the entry of its module), ``weights``, ``file``, and ``taught`` for one that is taught here.
        name: What it is kept as.

    Raises:
        RecipeError: if it cannot be loaded or run.
    """
    from edgekd.kd import modules
    from edgekd.kd.teachers import load
    from edgekd.kd.teachers.load import load_teacher

    batch, key = bench.probe(), "teacher" if name == "teacher" else "distill.teachers"
    if given["file"] is not None:
        path = _given(bench.recipe_dir, given["file"], f"{key}.file")
        logits = load_teacher(bench.recipe_dir, None, path)(batch)
        shutil.copyfile(path, bench.out / f"{name}.{given['file'].rpartition('.')[2]}")
        return {"parameters": None, "outputs": _checked(logits, given["file"])}
    entry = EntryPoint.parse(given["teacher"])
    if given.get("taught"):
        module = _fresh(bench, entry)
        count = modules.parameter_count(module)
        _check_learns(module, entry, batch, "teacher")
    else:
        weights = _given(bench.recipe_dir, given["weights"], f"{key}.weights")
        module = modules.load_frozen_module(bench.recipe_dir, entry, weights)
        count = modules.parameter_count(module)
        modules.save_weights(module, bench.out / f"{name}.safetensors")
    return {"parameters": count, "outputs": _checked(load.teacher_from_module(module, entry)(batch), str(entry))}


def student(bench: Bench, scored: Sequence[int]) -> tuple[dict[str, Any], np.ndarray]:
    """Try the student with fresh weights; return its size and outputs, and its answers to the samples ``scored``.

    Raises:
        RecipeError: if it cannot be run, is random in eval mode, mixes samples, or has nothing that learns.
    """
    module, told = _tried(bench, bench.entry("student"), "student")
    answers = _answer(module.eval(), bench.entry("student"), bench.samples(scored))
    return told, answers


def fresh(bench: Bench, entry: EntryPoint, role: str) -> dict[str, Any]:
    """Try a further network that is trained here, with fresh weights; return its size and outputs.

    Raises:
        RecipeError: as :func:`student`.
    """
    return _tried(bench, entry, role)[1]


def taps(bench: Bench) -> str | None:
    """Try the taps between student and teacher; weights do not matter for that. Return a warning where they are known to hurt.

    Raises:
        RecipeError: what is wrong with them.
    """
    import torch

    from edgekd.kd.losses.taps import Network, attach_taps

    made = [Network(role, _fresh(bench, bench.entry(role)), bench.entry(role)) for role in ("student", "teacher")]
    terms = [Loss.from_dict(told) for told in bench.params["taps"]]
    attach_taps(made[0], made[1], terms, [torch.tensor(array) for array in bench.probe()], 0)
    harmful = sorted({term.kind for term in terms} & {"attention", "hint"})
    if not harmful or not _is_mobile(made[0].module) or _is_mobile(made[1].module):
        return None
    return (
        f"{' and '.join(harmful)} from a plain convolutional teacher into a depthwise (mobile) student did harm in published results: "
        "MobileNetV2 on CIFAR-100 ended 0.5 to 6 points below the student alone; see with distill.baselines whether it helps here"
    )


def _is_mobile(module: nn.Module) -> bool:
    """Return whether a network has depthwise convolutions."""
    from torch import nn

    return any(isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.groups == layer.in_channels > 1 for layer in module.modules())


def _tried(bench: Bench, entry: EntryPoint, role: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return a module with fresh weights that was found fit to be trained, and its size and outputs."""
    import numpy as np

    from edgekd.kd import modules

    batch = bench.probe()
    module = _fresh(bench, entry).eval()
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise RecipeError(f"{entry}: the {role} has no parameter that can be trained")
    together = _answer(module, entry, batch)
    outputs = _checked(together, str(entry))
    if not np.array_equal(together, _answer(module, entry, batch)):
        raise RecipeError(f"{entry}: the {role} in eval mode gives two answers to one input; expected the same (dropout by hand?)")
    alone = _answer(module, entry, [array[:1] for array in batch])
    _checked(alone, str(entry))
    if np.abs(alone[0] - together[0]).max() > _TOLERANCE * np.abs(together).max():
        raise RecipeError(
            f"{entry}: the {role} answers a sample differently alone and in a batch of two; expected the same "
            "(an operation over axis 0, which is the batch?)"
        )
    _check_learns(module, entry, batch, role)
    return module, {"parameters": modules.parameter_count(module), "outputs": outputs}


def metric(bench: Bench, outputs: np.ndarray, labels: np.ndarray) -> None:
    """Try the user's score function and metric on a student's answers.

    Raises:
        RecipeError: if one returns something else than scores.
    """
    import numpy as np

    if bench.params["score"] is not None:
        entry = bench.entry("score")
        found = usercode.call_user_code(usercode.load_function(bench.recipe_dir, entry), entry, outputs.copy(), labels.copy())
        array = usercode.call_user_code(np.asarray, entry, found, what="what score returned")
        if array.shape != labels.shape[:1] or array.dtype.kind not in "biuf" or not _is_share(array.astype(np.float64)):
            raise RecipeError(f"{entry}: returned {_told(found)} for {len(labels)} samples; expected {len(labels)} scores from 0 to 1")
    if bench.params["metric"] is not None:
        entry = bench.entry("metric")
        found = usercode.call_user_code(usercode.load_function(bench.recipe_dir, entry), entry, outputs.copy(), labels.copy())
        array = usercode.call_user_code(np.asarray, entry, found, what="what metric returned")
        if array.ndim != 0 or array.dtype.kind not in "biuf" or not np.isfinite(array.astype(np.float64)) or array > 1:
            raise RecipeError(f"{entry}: returned {_told(found)}; expected one finite number for the whole set, 1 at most (0.93, not 93)")


def augment(bench: Bench, name: str) -> None:
    """Try an augmentation, the teacher's (``augment``) or the views' (``views``), on two training samples.

    Raises:
        RecipeError: if it changes shapes or types, or draws from another generator than the one it is given.
    """
    import torch

    entry = bench.entry(name)
    function = usercode.load_function(bench.recipe_dir, entry)
    arrays = bench.samples([0, 0], "train")
    wanted = [(list(array.shape), array.dtype.name) for array in arrays]

    def made() -> list[torch.Tensor]:
        tensors = [torch.tensor(array) for array in arrays]
        given = tensors[0] if len(tensors) == 1 else tuple(tensors)
        found = usercode.call_user_code(function, entry, given, torch.Generator().manual_seed(0))
        parts = list(found) if isinstance(found, tuple | list) else [found]
        kinds = [(list(part.shape), str(part.dtype)[6:]) if isinstance(part, torch.Tensor) else None for part in parts]
        if kinds != wanted:
            told = ", ".join(f"{name} {shape}" for shape, name in wanted)
            raise RecipeError(f"{entry}: returned {_told(found)}; expected a batch of the same shapes and types as it was given ({told})")
        return parts

    if not all(torch.equal(*pair) for pair in zip(made(), made(), strict=True)):
        raise RecipeError(f"{entry}: gives two answers to one batch and one seed; draw only from the generator that it is given")


def scored_rows(labels: np.ndarray) -> list[int]:
    """Return the samples that a metric is tried on: some of each class, as many metrics fail without; then the first ones."""
    import numpy as np

    if labels.dtype != np.int64 or labels.ndim != 1:
        return list(range(min(_SCORED, len(labels))))
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(labels[order]) > 0])
    members = np.split(order, starts[1:])
    each = max(1, _SCORED // len(members))
    return sorted(int(row) for rows in members for row in rows[:each])


def _fresh(bench: Bench, entry: EntryPoint) -> nn.Module:
    from edgekd.kd import modules
    from edgekd.kd.reproducible import seed_all

    seed_all(0)
    return modules.build_module(bench.recipe_dir, entry)


def _given(recipe_dir: Path, name: str, key: str) -> Path:
    path = recipe_dir / name
    if path.is_file():
        if not os.access(path, os.R_OK):
            raise RecipeError(f"{key}: {name}: cannot be read; its permissions forbid it")
        return path
    beside = [found.name for found in path.parent.iterdir() if found.is_file()] if path.parent.is_dir() else []
    raise RecipeError(f"{key}: {name}: no such file in {recipe_dir}{did_you_mean(Path(name).name, beside)}")


def _answer(module: nn.Module, entry: EntryPoint, batch: list[np.ndarray]) -> np.ndarray:
    """Return a module's answer, as it is, in float32."""
    import torch

    with torch.inference_mode():
        found = _forward(module, entry, batch)
        answer: np.ndarray = found.float().numpy()
    return answer


def _forward(module: nn.Module, entry: EntryPoint, batch: list[np.ndarray]) -> Any:
    import torch

    found = usercode.call_user_code(
        module, entry, *[torch.tensor(array) for array in batch], what=f"forward() of what {entry.function}() made"
    )
    count = len(batch[0])
    if not isinstance(found, torch.Tensor):
        raise RecipeError(f"{entry}: forward() returned {type(found).__name__}; expected one tensor of logits [{count}, classes]")
    if not found.is_floating_point() or found.ndim != _TWO_AXES or len(found) != count:
        kind = str(found.dtype).removeprefix("torch.")
        raise RecipeError(f"{entry}: answered {count} samples with {kind} {list(found.shape)}; expected float logits [{count}, classes]")
    return found


def _check_learns(module: nn.Module, entry: EntryPoint, batch: list[np.ndarray], name: str) -> None:
    import torch

    with torch.enable_grad():
        found = _forward(module.train(), entry, batch)
    if not found.requires_grad:
        raise RecipeError(f"{entry}: the answers of the {name} depend on no parameter that can be trained; nothing would be learned")


def _checked(logits: np.ndarray, what: str) -> list[int]:
    """Return the number of classes as a list, the shape of one answer."""
    import numpy as np

    if not np.isfinite(logits).all():
        raise RecipeError(f"{what}: gives outputs that are not finite (NaN or infinite); check the weights and the scale of the inputs")
    return [int(logits.shape[1])]


def _is_share(values: np.ndarray) -> bool:
    import numpy as np

    return bool(np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1)


def _told(found: object) -> str:
    shape = getattr(found, "shape", None)
    return f"{type(found).__name__} of shape {list(shape)}" if shape is not None else f"{type(found).__name__} {str(found)[:40]}"
