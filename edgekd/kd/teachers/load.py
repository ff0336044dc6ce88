# SPDX-License-Identifier: Apache-2.0
"""Load frozen teachers: each ``teacher_...`` function returns a callable that maps a batch of inputs to float32 logits."""

from __future__ import annotations

import copy
import io
import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from edgekd import usercode
from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError, expected_one_of, printable
from edgekd.kd import modules
from edgekd.kd.teachers import safety, stored
from edgekd.kd.teachers.onnx_file import read_onnx

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    from torch import Tensor, nn

    Predict = Callable[[list[np.ndarray]], np.ndarray]  # a batch: one array (n, ...) for each input -> logits (n, C), float32


@dataclass(frozen=True, slots=True)
class ModuleTeacher:
    """A module, which is on ``device``, as a teacher: in eval mode (even if its own code leaves it), without gradients.

    With ``channels_last``, the images that it gets are in that memory format.
    """

    module: nn.Module
    entry: EntryPoint
    device: str = "cpu"
    channels_last: bool = False

    def __call__(self, batch: list[np.ndarray]) -> np.ndarray:
        """Return the logits of a batch."""
        import torch

        inputs = _tensors(batch, self.device, channels_last=self.channels_last)
        with torch.inference_mode():
            output = usercode.call_user_code(self.module.eval(), self.entry, *inputs)
        return _check_logits(output, len(batch[0]), str(self.entry))


def teacher_from_module(module: nn.Module, entry: EntryPoint, device: str = "cpu", *, channels_last: bool = False) -> ModuleTeacher:
    """Return a module, which is on ``device``, as a teacher; with ``channels_last``, its weights get that memory format too."""
    module.eval()
    for parameter in module.parameters():  # a TorchScript module has no requires_grad_
        parameter.requires_grad = False
    return ModuleTeacher(_in_memory_format(module, channels_last=channels_last), entry, device, channels_last)


def copy_teacher(teacher: Predict) -> Predict:
    """Return a teacher that another thread can run at the same time; it shares the parameters.

    A module of the user's may store tensors in itself while it runs, so it is copied; a file that is a whole model does not.
    It has to have run before: modules with ``torch.nn.utils.weight_norm`` cannot be copied until then.

    Raises:
        RecipeError: if the module cannot be copied.
    """
    import torch

    if not isinstance(teacher, ModuleTeacher) or isinstance(teacher.module, torch.jit.ScriptModule):
        return teacher
    shared = {id(parameter): parameter for parameter in teacher.module.parameters()}
    module = usercode.call_user_code(
        copy.deepcopy, teacher.entry, teacher.module, shared, what=f"copying what {teacher.entry.function}() made"
    )
    return replace(teacher, module=module)


def _in_memory_format(module: nn.Module, *, channels_last: bool) -> nn.Module:
    import torch

    return module.to(memory_format=torch.channels_last) if channels_last else module  # type: ignore[call-overload]  # an overload torch forgot


def _tensors(batch: list[np.ndarray], device: str = "cpu", *, channels_last: bool) -> list[Tensor]:
    """Return inputs as tensors, images in the memory format."""
    import torch

    image_axes = 4
    # torch.tensor copies: equal alignment gives equal bits, and the arrays may be read-only
    tensors = [torch.tensor(item, device=device) for item in batch]
    return [item.contiguous(memory_format=torch.channels_last) if channels_last and item.ndim == image_axes else item for item in tensors]


def teacher_from_torchscript(path: Path, *, channels_last: bool = False) -> Predict:
    """Return a TorchScript file as a teacher; ``channels_last`` as in :func:`teacher_from_module`.

    Raises:
        RecipeError: if it cannot be loaded.
    """
    return teacher_from_module(load_torchscript(path), EntryPoint(path.name, "forward"), channels_last=channels_last)


def load_torchscript(path: Path) -> nn.Module:
    """Return the module of a TorchScript file, in eval mode.

    Raises:
        RecipeError: if it cannot be loaded.
    """
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch recommends torch.export; such files exist
            module: nn.Module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]  # torch's own
    except (RuntimeError, ValueError) as error:
        raise RecipeError(f"{path.name}: is not a loadable TorchScript file; save it with torch.jit.save") from error
    return module.eval()


def teacher_from_exported_program(path: Path, *, channels_last: bool = False) -> Predict:
    """Return a ``torch.export`` file as a teacher; one with a fixed batch of 1 is run sample by sample.

    With ``channels_last``, its weights and the images that it gets are in that memory format.

    Raises:
        RecipeError: if it cannot be loaded, could run code, or has another fixed batch.
    """
    import torch

    module, fixed_batch = load_exported_program(path)
    entry, module = EntryPoint(path.name, "forward"), _in_memory_format(module, channels_last=channels_last)

    def predict(batch: list[np.ndarray]) -> np.ndarray:
        # an exported module has no eval mode: it was traced in one; no_grad, as its in-place checks refuse inference tensors
        with torch.no_grad():
            output = usercode.call_user_code(module, entry, *_tensors(batch, channels_last=channels_last))
        return _check_logits(output, len(batch[0]), path.name)

    return _for_any_batch(predict, fixed_batch, path.name)


def load_exported_program(path: Path) -> tuple[nn.Module, int | None]:
    """Return the module of a ``torch.export`` file, and its batch size if that is fixed.

    Raises:
        RecipeError: if it cannot be loaded, or could run code.
    """
    from torch.export.pt2_archive._package import load_pt2

    content = safety.check_exported_program(path)
    try:
        program = load_pt2(io.BytesIO(content)).exported_programs["model"]
        module = program.module(check_guards=False)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        raise RecipeError(f"{path.name}: cannot be loaded ({type(error).__name__}); save it with this version of torch") from error
    names = set(program.graph_signature.user_inputs)
    shapes = [node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    batch = next((shape[0] for shape in shapes if len(shape) > 0), None)
    return module, batch if isinstance(batch, int) else None


def teacher_from_onnx(path: Path) -> Predict:
    """Return an ONNX file as a teacher, run by ONNX Runtime with the number of threads that torch has now.

    Raises:
        RecipeError: if it cannot be loaded, has several outputs, or a fixed batch above 1.
    """
    import numpy as np
    import onnxruntime
    import torch

    errors = onnxruntime.capi.onnxruntime_pybind11_state
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # beside torch's threads
    options.use_deterministic_compute = True
    options.log_severity_level = 3
    content = read_onnx(path)
    load_errors = (errors.Fail, errors.InvalidGraph, errors.InvalidProtobuf, errors.NotImplemented, errors.InvalidArgument)
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except (*load_errors, errors.RuntimeException, errors.NoSuchFile, errors.EPFail, RuntimeError, ValueError) as error:
        raise RecipeError(f"{path.name}: ONNX Runtime cannot load it: {printable(str(error))}") from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(outputs) != 1:
        names = ", ".join(item.name for item in outputs)
        raise RecipeError(f"{path.name}: has {len(outputs)} outputs ({names}); a teacher has one, the logits (n, classes)")

    def predict(batch: list[np.ndarray]) -> np.ndarray:
        if len(batch) != len(inputs):
            raise RecipeError(f"{path.name}: has {len(inputs)} inputs; student.inputs names {len(batch)}")
        feed = {item.name: np.ascontiguousarray(value) for item, value in zip(inputs, batch, strict=True)}
        try:
            output = session.run(None, feed)[0]
        except (*load_errors, errors.RuntimeException, RuntimeError, ValueError) as error:
            raise RecipeError(f"{path.name}: ONNX Runtime failed: {printable(str(error))}") from error
        return _check_logits(output, len(batch[0]), path.name)

    batch_size = inputs[0].shape[0] if inputs and inputs[0].shape else None
    return _for_any_batch(predict, batch_size if isinstance(batch_size, int) else None, path.name)


def _for_any_batch(predict: Predict, fixed_batch: int | None, name: str) -> Predict:
    """Return a teacher for batches of any size, although its file may fix the batch size to 1."""
    import numpy as np

    if fixed_batch is None:
        return predict
    if fixed_batch != 1:
        raise RecipeError(f"{name}: has a fixed batch of {fixed_batch}; export it with a dynamic batch, or with 1")

    def predict_one_by_one(batch: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([predict([item[row : row + 1] for item in batch]) for row in range(len(batch[0]))])

    return predict_one_by_one


def _check_logits(output: Any, samples: int, name: str) -> np.ndarray:
    """Return the output of a teacher as float32 (n, C).

    Raises:
        RecipeError: if it is anything but one tensor of logits.
    """
    import numpy as np
    import torch

    if not isinstance(output, torch.Tensor | np.ndarray):
        raise RecipeError(f"teacher {name}: returned {type(output).__name__}; expected one tensor of logits (n, classes)")
    if output.ndim != 2 or len(output) != samples:  # noqa: PLR2004  (n, classes)
        raise RecipeError(
            f"teacher {name}: returned shape {list(output.shape)} for {samples} samples; expected logits [{samples}, classes]"
        )
    logits = output.float().cpu().numpy() if isinstance(output, torch.Tensor) else output
    return np.ascontiguousarray(logits, dtype=np.float32)


def load_exported_module(path: Path) -> nn.Module:
    """Return the module of a TorchScript file, or of a ``torch.export`` file (which has only the mode that it was traced in).

    Raises:
        RecipeError: if it cannot be loaded, or could run code.
    """
    return load_torchscript(path) if path.suffix == ".ts" else load_exported_program(path)[0]


def load_teacher(
    recipe_dir: Path, entry: EntryPoint | None, artifact: Path, device: str = "cpu", *, channels_last: bool = False
) -> Predict:
    """Return the frozen teacher as a callable: a batch of inputs -> float32 logits.

    Args:
        recipe_dir: The folder of the user's code.
        entry: The function that makes the module, for weights; None for a file that is a whole model.
        artifact: ``.safetensors`` (weights, or stored logits), ``.ts`` (TorchScript), ``.pt2`` (torch.export) or ``.onnx``.
        device: The device of a module made by ``entry``, as torch names it; whole models run on the CPU.
        channels_last: The memory format of images, where torch runs the teacher; the logits differ in their last bits.

    Raises:
        RecipeError: if it cannot be loaded, or could run code of its own; the callable, if the output is not logits.

    Shapes:
        inputs: one array (n, ...) for each input of the student, in order; logits: (n, C).
    """
    if entry is not None:
        module = modules.load_frozen_module(recipe_dir, entry, artifact).to(device)
        return teacher_from_module(module, entry, device, channels_last=channels_last)
    loaders: dict[str, Callable[[Path], Predict]] = {
        ".ts": partial(teacher_from_torchscript, channels_last=channels_last),
        ".pt2": partial(teacher_from_exported_program, channels_last=channels_last),
        ".onnx": teacher_from_onnx,
        ".safetensors": stored.teacher_from_stored_logits,
    }
    if artifact.suffix not in loaders:
        raise RecipeError(f"teacher.file {artifact.name}: {expected_one_of(artifact.suffix, loaders)}")
    return loaders[artifact.suffix](artifact)
