# SPDX-License-Identifier: Apache-2.0
"""Checks of teacher, student and augmentation on a few samples, before any long work starts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import usercode
from edgekd.domain.losses import Loss
from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError, did_you_mean
from edgekd.kd.output_spec import OutputSpec
from edgekd.stages.inspect.teachers import check_teacher_outputs
from edgekd.store.arrays import open_array

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from torch import nn

    from edgekd.stages.inspect.params import CheckContext, TeacherParams

_FRESH_NOISE = 0.05  # the most that is added to parameters that are all the same
_LOGITS_AXES = 2
_BATCH = 64  # samples that are run alone and together
_TOLERANCE = 1e-2  # of the largest output, for a sample alone and in a batch; rounding stays far below


def check_teacher(check: CheckContext, teacher: TeacherParams, name: str) -> dict[str, Any]:
    """Run a teacher on a batch and return the number of its parameters and outputs.

    A teacher that is not trained here is stored under ``name``: as ``NAME.safetensors``, or a whole model under its suffix.

    Raises:
        RecipeError: if it cannot be loaded or run, or is not worth learning from (``stages.inspect.teachers``).
    """
    from edgekd.kd import modules
    from edgekd.kd.teachers.load import load_teacher, teacher_from_module
    from edgekd.kd.teachers.weights import load_user_weights

    if teacher.trained_here:
        return _check_network(check, EntryPoint.parse(teacher.name), "teacher")[1]
    key, parameters = "teacher" if name == "teacher" else "distill.teachers", None
    if teacher.file is not None:
        path = _model_file(check.recipe_dir, teacher.file, f"{key}.file")
        predict = load_teacher(check.recipe_dir, None, path)
        shutil.copyfile(path, check.out / f"{name}.{teacher.file.rpartition('.')[2]}")
    else:
        entry = EntryPoint.parse(teacher.name)
        module = _build(check, entry)
        weights = _model_file(check.recipe_dir, str(teacher.weights), f"{key}.weights")
        check.notes.extend(load_user_weights(module, weights, entry))
        parameters, predict = modules.parameter_count(module), teacher_from_module(module, entry)
        modules.save_weights(module, check.out / f"{name}.safetensors")
    outputs = check_teacher_outputs(check, predict, teacher.name, may_refuse=not name.startswith("checkpoint."))
    _check_extremes(check, predict)
    return {"parameters": parameters, "outputs": [int(outputs.shape[1])]}


def check_student(check: CheckContext, rows: Sequence[int]) -> tuple[dict[str, Any], np.ndarray]:
    """Check the student with fresh weights; return the number of its parameters and outputs, and its logits for evaluation ``rows``.

    Raises:
        RecipeError: as :func:`check_trainable`.
    """
    entry = EntryPoint.parse(check.params.student)
    module, summary = _check_network(check, entry, "student")
    logits = _logits(module.eval(), entry, check.samples(rows))
    _save_fresh_weights(check, module, entry)
    return summary, logits


def check_trainable(check: CheckContext, entry: EntryPoint, role: str) -> dict[str, Any]:
    """Check a network that is trained here, with fresh weights; return the number of its parameters and outputs.

    Raises:
        RecipeError: if it cannot be run, is random in eval mode, mixes samples, or has no trainable parameter.
    """
    return _check_network(check, entry, role)[1]


def check_taps(check: CheckContext) -> str | None:
    """Check the taps between student and teacher, whatever their weights; return a warning where such taps are known to hurt.

    Raises:
        RecipeError: what is wrong with them.
    """
    import torch

    from edgekd.kd.losses.taps import Network, attach_taps

    entries = {"student": EntryPoint.parse(check.params.student), "teacher": EntryPoint.parse(check.params.teacher.name)}
    student, teacher = (Network(role, _build(check, entry), entry) for role, entry in entries.items())
    terms = [Loss.from_dict(loss) for loss in check.params.tapped_losses]
    attach_taps(student, teacher, terms, [torch.tensor(array) for array in check.batch()], 0)
    harmful = sorted({term.kind for term in terms} & {"attention", "hint"})
    if not harmful or not _is_mobile(student.module) or _is_mobile(teacher.module):
        return None
    return (
        f"{' and '.join(harmful)} from a plain convolutional teacher into a depthwise (mobile) student did harm in published results: "
        "MobileNetV2 on CIFAR-100 ended 0.5 to 6 points below the student without a teacher; "
        "see with distill.baselines whether it helps here"
    )


def check_augmentation(check: CheckContext, augmentation: str) -> None:
    """Run an augmentation on two training samples, twice with the same seed.

    Raises:
        RecipeError: if it changes shapes or types, or draws from another generator than the one that it gets.
    """
    import torch

    entry = EntryPoint.parse(augmentation)
    function = usercode.load_function(check.recipe_dir, entry)
    arrays = check.samples([0, 0], "train")
    expected = [(list(array.shape), array.dtype.name) for array in arrays]

    def augment() -> list[torch.Tensor]:
        tensors = [torch.tensor(array) for array in arrays]
        inputs = tensors[0] if len(tensors) == 1 else tuple(tensors)
        result = usercode.call_user_code(function, entry, inputs, torch.Generator().manual_seed(0))
        parts = list(result) if isinstance(result, tuple | list) else [result]
        kinds = [(list(part.shape), str(part.dtype)[6:]) if isinstance(part, torch.Tensor) else None for part in parts]
        if kinds != expected:
            shapes = ", ".join(f"{dtype} {shape}" for shape, dtype in expected)
            raise RecipeError(
                f"{entry}: returned {_describe(result)}; expected a batch of the same shapes and types as its input ({shapes})"
            )
        return parts

    if not all(torch.equal(*pair) for pair in zip(augment(), augment(), strict=True)):
        raise RecipeError(f"{entry}: returns different batches for the same batch and seed; draw only from the generator that it gets")


def _check_network(check: CheckContext, entry: EntryPoint, role: str) -> tuple[nn.Module, dict[str, Any]]:
    """Check a module with fresh weights; return it, and the number of its parameters and outputs."""
    import numpy as np

    from edgekd.kd import modules
    from edgekd.kd.teachers.quality import probability_problem

    batch = check.batch()
    module = _build(check, entry).eval()
    if (problem := modules.trainable_problem(module, _build(check, entry), role)) is not None:
        raise RecipeError(f"{entry}: {problem}")
    logits = _logits(module, entry, batch)
    outputs = _output_shape(logits, str(entry))
    _check_extremes(check, lambda arrays: _logits(module, entry, arrays))
    if not np.array_equal(logits, _logits(module, entry, batch)):
        raise RecipeError(
            f"{entry}: the {role} in eval mode returns different outputs for the same input; expected the same (dropout written by hand?)"
        )
    _check_loadable(check, entry, module, (batch, logits), role)
    _check_alone(check, entry, module, role)
    doubt = probability_problem(OutputSpec(check.params.task, check.params.heads), logits, trained=False)
    if doubt is not None and doubt.is_worthless and role != "student":
        raise RecipeError(f"{entry}: the {role} {doubt.text}")
    if doubt is not None:
        check.notes.append(f"warning: the {role} {entry} {doubt.text}")
    _check_gradient(module, entry, batch, role)
    return module, {"parameters": modules.parameter_count(module), "outputs": outputs}


def _check_extremes(check: CheckContext, run: Callable[[list[np.ndarray]], object]) -> None:
    """Run a network on the samples that hold the lowest and the highest integer of each split: a token may be outside its vocabulary."""
    for index, spec in enumerate(check.params.inputs):
        for path in sorted(check.out.glob(f"*.inputs.{index}.npy")):
            stored, split = open_array(path), path.name.partition(".")[0]
            if not len(stored) or stored[:0].dtype.kind not in "iu":
                continue
            array = stored.load()
            for position in (int(array.argmin()), int(array.argmax())):
                row = position // array[0].size
                try:
                    run(check.samples([row], split))
                except RecipeError as error:
                    value = array.reshape(-1)[position]
                    raise RecipeError(f"{error} (with sample {row} of {split}, where input '{spec.name}' holds {value})") from None


def _check_alone(check: CheckContext, entry: EntryPoint, module: nn.Module, role: str) -> None:
    """Refuse a module that mixes the samples of a batch: it computes something else on a device, which runs one at a time."""
    import numpy as np

    batch = check.batch(_BATCH)
    logits = _logits(module, entry, batch)
    alone = np.concatenate([_logits(module, entry, [array[row : row + 1] for array in batch]) for row in range(_BATCH)])
    _output_shape(alone, str(entry))
    if np.abs(alone - logits).max() > _TOLERANCE * np.abs(logits).max():
        raise RecipeError(
            f"{entry}: the {role} returns different outputs for a sample alone and in a batch of {_BATCH}; expected the same "
            "(an operation over axis 0, which is the batch?)"
        )


def _save_fresh_weights(check: CheckContext, module: nn.Module, entry: EntryPoint) -> None:
    """Store the weights of a student that is not trained, for the dry run of exports and quantizers.

    Parameters that are all the same (zeros, often, in the last layer) get noise: a quantizer finds no range in them, and a
    runtime that leaves them out computes the same. The noise is positive and small, and omitted if the outputs are not finite then.
    """
    import numpy as np
    import torch

    from edgekd.kd import modules

    path = check.out / "student.fresh.safetensors"
    modules.save_weights(module, path)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point() and parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(_FRESH_NOISE * torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype))
    if np.isfinite(_logits(module.eval(), entry, check.batch())).all():
        modules.save_weights(module, path)


def _is_mobile(module: nn.Module) -> bool:
    """Return whether a network has depthwise convolutions."""
    from torch import nn

    return any(isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.groups == layer.in_channels > 1 for layer in module.modules())


def _check_loadable(
    check: CheckContext, entry: EntryPoint, module: nn.Module, example: tuple[list[np.ndarray], np.ndarray], role: str
) -> None:
    """Refuse a module that, built again with the same weights, returns other outputs: what is trained is not what would ship."""
    import numpy as np

    batch, logits = example
    other = _build(check, entry, seed=1).eval()
    usercode.call_user_code(other.load_state_dict, entry, module.state_dict(), what="load_state_dict()")
    if np.abs(_logits(other, entry, batch) - logits).max() > _TOLERANCE * np.abs(logits).max():
        raise RecipeError(
            f"{entry}: the {role} returns different outputs when it is built again with the same weights; expected the same "
            "(a random tensor outside of the state dict? use register_buffer)"
        )


def _build(check: CheckContext, entry: EntryPoint, seed: int = 0) -> nn.Module:
    from edgekd.kd import modules
    from edgekd.kd.reproducible import seed_all

    seed_all(seed)
    return modules.build_module(check.recipe_dir, entry)


def _model_file(recipe_dir: Path, name: str, key: str) -> Path:
    path = recipe_dir / name
    if path.is_file():
        if not os.access(path, os.R_OK):
            raise RecipeError(f"{key}: {name}: cannot be read; its permissions forbid it")
        return path
    siblings = [sibling.name for sibling in path.parent.iterdir() if sibling.is_file()] if path.parent.is_dir() else []
    raise RecipeError(f"{key}: {name}: no such file in {recipe_dir}{did_you_mean(Path(name).name, siblings)}")


def _logits(module: nn.Module, entry: EntryPoint, batch: list[np.ndarray]) -> np.ndarray:
    """Return a module's logits in its current mode, in float32."""
    import torch

    with torch.inference_mode():
        logits: np.ndarray = _forward(module, entry, batch).float().numpy()
    return logits


def _forward(module: nn.Module, entry: EntryPoint, batch: list[np.ndarray]) -> Any:
    import torch

    outputs = usercode.call_user_code(
        module, entry, *[torch.tensor(array) for array in batch], what=f"forward() of what {entry.function}() made"
    )
    count = len(batch[0])
    if not isinstance(outputs, torch.Tensor):
        raise RecipeError(f"{entry}: forward() returned {type(outputs).__name__}; expected one tensor of logits [{count}, classes]")
    if not outputs.is_floating_point() or outputs.ndim != _LOGITS_AXES or len(outputs) != count:
        kind = str(outputs.dtype).removeprefix("torch.")
        raise RecipeError(
            f"{entry}: forward() returned {kind} {list(outputs.shape)} for {count} samples; expected float logits [{count}, classes]"
        )
    return outputs


def _check_gradient(module: nn.Module, entry: EntryPoint, batch: list[np.ndarray], role: str) -> None:
    import torch

    with torch.enable_grad():
        outputs = _forward(module.train(), entry, batch)
    if not outputs.requires_grad:
        raise RecipeError(f"{entry}: the outputs of the {role} depend on no trainable parameter; nothing would be learned")


def _output_shape(logits: np.ndarray, name: str) -> list[int]:
    """Return the shape of one sample's output, the number of classes in a list.

    Raises:
        RecipeError: if an output is not finite.
    """
    import numpy as np

    if not np.isfinite(logits).all():
        raise RecipeError(f"{name}: returns outputs that are not finite (NaN or infinite); check the weights and the scale of the inputs")
    return [int(logits.shape[1])]


def _describe(value: object) -> str:
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__} of shape {list(shape)}" if shape is not None else f"{type(value).__name__} {str(value)[:40]}"
