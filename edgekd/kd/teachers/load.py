# SPDX-License-Identifier: Apache-2.0
"""Frozen teachers: each function returns a callable that answers a batch of inputs with float32 logits, and never changes."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

from edgekd import usercode
from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError, expected_one_of
from edgekd.kd import modules
from edgekd.kd.teachers import safety, stored

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    from torch import nn


def teacher_from_module(module: nn.Module, entry: EntryPoint, device: str = "cpu") -> Callable[[list[np.ndarray]], np.ndarray]:
    """Return a module as a teacher: in eval mode (also if its own code leaves it), without gradients. ``device``: where it is."""
    import torch

    module.eval()
    for parameter in module.parameters():  # a TorchScript module has no requires_grad_
        parameter.requires_grad = False

    def answer(batch: list[np.ndarray]) -> np.ndarray:
        # torch.tensor copies: equal alignment gives equal bits, and the arrays may be read-only
        with torch.inference_mode():
            found = usercode.call_user_code(module.eval(), entry, *[torch.tensor(item, device=device) for item in batch])
        return _logits(found, len(batch[0]), str(entry))

    return answer


def teacher_from_torchscript(path: Path) -> Callable[[list[np.ndarray]], np.ndarray]:
    """Return a TorchScript file as a teacher.

    Raises:
        RecipeError: if it cannot be loaded.
    """
    return teacher_from_module(load_torchscript(path), EntryPoint(path.name, "forward"))


def load_torchscript(path: Path) -> nn.Module:
    """Return the module of a TorchScript file, in eval mode.

    Raises:
        RecipeError: if it cannot be loaded.
    """
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch wants torch.export instead; such files exist
            module: nn.Module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]  # torch's own
    except (RuntimeError, ValueError) as error:
        raise RecipeError(f"{path.name}: is not a TorchScript file that can be loaded; save it with torch.jit.save") from error
    return module.eval()


def teacher_from_exported_program(path: Path) -> Callable[[list[np.ndarray]], np.ndarray]:
    """Return a ``torch.export`` file as a teacher; one with a fixed batch of 1 is asked sample by sample.

    Raises:
        RecipeError: if it cannot be loaded, could run code, or has another fixed batch.
    """
    module, fixed = load_exported_program(path)
    return _batched(_frozen_export(module, path.name), fixed, path.name)


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
    wanted = set(program.graph_signature.user_inputs)
    shapes = [node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder" and node.name in wanted]
    batch = next((shape[0] for shape in shapes if len(shape) > 0), None)
    return module, batch if isinstance(batch, int) else None


def teacher_from_onnx(path: Path) -> Callable[[list[np.ndarray]], np.ndarray]:
    """Return an ONNX file as a teacher, run by ONNX Runtime with as many threads as torch has now.

    Raises:
        RecipeError: if it cannot be loaded, has several outputs, or a fixed batch above 1.
    """
    import numpy as np
    import onnxruntime
    import torch

    errors = onnxruntime.capi.onnxruntime_pybind11_state
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.use_deterministic_compute = True
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except (errors.Fail, errors.InvalidGraph, errors.InvalidProtobuf, errors.NotImplemented, errors.InvalidArgument) as error:
        raise RecipeError(f"{path.name}: ONNX Runtime cannot load it: {str(error).splitlines()[0]}") from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(outputs) != 1:
        names = ", ".join(item.name for item in outputs)
        raise RecipeError(f"{path.name}: has {len(outputs)} outputs ({names}); a teacher has one, the logits (n, classes)")

    def answer(batch: list[np.ndarray]) -> np.ndarray:
        if len(batch) != len(inputs):
            raise RecipeError(f"{path.name}: has {len(inputs)} inputs; student.inputs names {len(batch)}")
        feed = {item.name: np.ascontiguousarray(value) for item, value in zip(inputs, batch, strict=True)}
        try:
            found = session.run(None, feed)[0]
        except (errors.Fail, errors.InvalidArgument, errors.RuntimeException) as error:
            raise RecipeError(f"{path.name}: ONNX Runtime failed: {str(error).splitlines()[0]}") from error
        return _logits(found, len(batch[0]), path.name)

    fixed = inputs[0].shape[0] if inputs and inputs[0].shape else None
    return _batched(answer, fixed if isinstance(fixed, int) else None, path.name)


def _frozen_export(module: Any, name: str) -> Callable[[list[np.ndarray]], np.ndarray]:
    import torch

    entry = EntryPoint(name, "forward")

    def answer(batch: list[np.ndarray]) -> np.ndarray:
        # an exported module has no eval mode: it was traced in one; no_grad, as its in-place checks refuse inference tensors
        with torch.no_grad():
            return _logits(usercode.call_user_code(module, entry, *[torch.tensor(item) for item in batch]), len(batch[0]), name)

    return answer


def _batched(answer: Callable[[list[np.ndarray]], np.ndarray], fixed: int | None, name: str) -> Callable[[list[np.ndarray]], np.ndarray]:
    """Return a teacher whose file fixes the batch size as one that answers any batch."""
    import numpy as np

    if fixed is None:
        return answer
    if fixed != 1:
        raise RecipeError(f"{name}: is made for a fixed batch of {fixed}; export it with a dynamic batch, or with 1")

    def one_by_one(batch: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([answer([item[row : row + 1] for item in batch]) for row in range(len(batch[0]))])

    return one_by_one


def _logits(found: Any, samples: int, name: str) -> np.ndarray:
    """Return an answer as float32 (n, C).

    Raises:
        RecipeError: if it is anything else.
    """
    import numpy as np
    import torch

    if not isinstance(found, torch.Tensor | np.ndarray):
        raise RecipeError(f"teacher {name}: answered with {type(found).__name__}; expected one tensor of logits (n, classes)")
    expected = 2
    if found.ndim != expected or len(found) != samples:
        raise RecipeError(
            f"teacher {name}: answered {samples} samples with shape {list(found.shape)}; expected logits [{samples}, classes]"
        )
    logits = found.float().cpu().numpy() if isinstance(found, torch.Tensor) else found
    return np.ascontiguousarray(logits, dtype=np.float32)


def load_exported_module(path: Path) -> nn.Module:
    """Return the module of a TorchScript file, or of a ``torch.export`` file (traced in one mode, it has no other).

    Raises:
        RecipeError: if it cannot be loaded, or could run code.
    """
    return load_torchscript(path) if path.suffix == ".ts" else load_exported_program(path)[0]


def load_teacher(
    recipe_dir: Path, entry: EntryPoint | None, artifact: Path, device: str = "cpu"
) -> Callable[[list[np.ndarray]], np.ndarray]:
    """Return the frozen teacher as a callable: a batch of inputs -> float32 logits.

    Args:
        recipe_dir: Where the user's code lies.
        entry: The function that makes the module, for weights; None for a file that is a whole model.
        artifact: ``.safetensors`` (weights, or stored answers), ``.ts`` (TorchScript), ``.pt2`` (torch.export) or ``.onnx``.
        device: Where a module made by ``entry`` is, as torch names it; what is a whole model answers on the processor.

    Raises:
        RecipeError: if it cannot be loaded, or could run code of its own; the callable, if an answer is no logits.

    Shapes:
        inputs: one array (n, ...) for each input of the student, in order; answer: (n, C).
    """
    if entry is not None:
        return teacher_from_module(modules.load_frozen_module(recipe_dir, entry, artifact).to(device), entry, device)
    kinds = {
        ".ts": teacher_from_torchscript,
        ".pt2": teacher_from_exported_program,
        ".onnx": teacher_from_onnx,
        ".safetensors": stored.teacher_from_stored_logits,
    }
    if artifact.suffix not in kinds:
        raise RecipeError(f"teacher.file {artifact.name}: {expected_one_of(artifact.suffix, kinds)}")
    return kinds[artifact.suffix](artifact)
