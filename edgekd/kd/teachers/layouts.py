# SPDX-License-Identifier: Apache-2.0
"""How a teacher runs fastest with the same logits: device, memory format, threads, and tokens without padding.

Each choice compares logits, never times, so the same teacher and samples give the same bytes in every build. For the same reason a batch
is computed by one thread, and several batches at once: sums depend on the number of threads that share them. docs/decisions/0019-layouts.md
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from edgekd import usercode
from edgekd.errors import RecipeError
from edgekd.kd.soft_targets import storage
from edgekd.kd.teachers.load import copy_teacher, load_teacher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    import numpy as np

    from edgekd.domain.recipe import EntryPoint
    from edgekd.kd.teachers.load import Predict

    Batch = list[np.ndarray]  # one array (n, ...) for each input
    Submit = Callable[[Callable[[], Batch]], Future[np.ndarray]]  # a function that makes a batch -> its logits

MAX_LENGTHS, ROWS_PER_LENGTH = 24, 8  # padding is removed down to one of so many lengths, each checked on so many samples
_PADDING_SAMPLES = 4096  # by which padding is recognized
_MAX_TOKENS = 0.9  # share of the tokens that stay: more are not worth the checks


@dataclass(frozen=True, slots=True)
class Padding:
    """How the rows of token inputs are filled up at their end: a value for each input. ``lengths`` are those without padding to use."""

    values: tuple[Any, ...]
    lengths: tuple[int, ...]

    def remove(self, batch: Batch) -> Batch:
        """Return a batch without the padding that all of its rows have, as far as the lengths allow."""
        longest = token_lengths(batch, self).max()
        length = min((length for length in self.lengths if length >= longest), default=None)
        return [array[:, :length] for array in batch]


def load_teachers(
    recipe_dir: Path, entry: EntryPoint | None, path: Path, accelerator: str | None, threads: int, batch: Batch
) -> tuple[list[Predict], list[str]]:
    """Return the teacher once for each thread, and a warning for each layout in which it fails or returns other logits for a batch.

    A single one runs on an accelerator. On the CPU, images are in channels-last, in which convolutions are faster. Code that calls
    ``view`` on an image fails there, so only a run shows whether it works.

    Args:
        recipe_dir: The folder of the user's code.
        entry: The function that makes the module, or None for a file that is a whole model.
        path: The teacher's weights or file.
        accelerator: The one to run on, as torch names it; None for the CPU.
        threads: How many batches may run at once.
        batch: Samples on which logits are compared.

    Raises:
        RecipeError: if the teacher cannot be loaded, or fails on the CPU in the default memory format.
    """
    import numpy as np

    load = partial(load_teacher, recipe_dir, entry, path)
    teacher, warnings, image_axes = load(), [], 4
    expected = teacher(batch)
    if accelerator is not None:
        accelerated = _in_layout(lambda: load(accelerator), batch, expected)
        if not isinstance(accelerated, str):
            return [accelerated], []
        warnings.append(f"warning: the teacher runs on the CPU, not on {accelerator}: {accelerated}")
    if any(array.ndim == image_axes for array in batch) and path.suffix != ".onnx":
        channels_last = _in_layout(lambda: load(channels_last=True), batch, expected)
        if isinstance(channels_last, str):
            warnings.append(f"warning: the teacher runs in the default memory format, not in channels-last: {channels_last}")
        else:
            teacher, expected = channels_last, channels_last(batch)
    if threads == 1:
        return [teacher], warnings
    try:
        teachers = [teacher, *(copy_teacher(teacher) for _ in range(1, threads))]
        with run_in_threads(teachers, entry) as submit:
            futures = [submit(lambda: batch) for _ in teachers]
            are_equal = [np.array_equal(future.result(), expected) for future in futures]
        if all(are_equal):
            return teachers, warnings
        why = "several at once return other logits"
    except RecipeError as error:
        why = str(error)
    return [teacher], [*warnings, f"warning: the teacher runs in one thread, not in {threads}: {why}"]


@contextmanager
def run_in_threads(teachers: Sequence[Predict], entry: EntryPoint | None) -> Iterator[Submit]:
    """Yield a function that has a batch run in the background, and returns its logits to come; each teacher runs in a thread of its own.

    What is changed for user code in the whole process, the current folder, is so until all threads have ended.
    """
    idle: SimpleQueue[Predict] = SimpleQueue()
    for teacher in teachers:
        idle.put(teacher)

    def run_batch(make_batch: Callable[[], Batch]) -> np.ndarray:
        teacher = idle.get()
        try:
            return teacher(make_batch())
        finally:
            idle.put(teacher)

    pool = ThreadPoolExecutor(len(teachers))
    with usercode.running(str(entry or "the teacher")), usercode.in_recipe_dir():
        try:
            yield lambda make_batch: pool.submit(run_batch, make_batch)
        finally:
            pool.shutdown(cancel_futures=True)


def removable_padding(teacher: Predict, arrays: Sequence[np.ndarray]) -> tuple[Padding | None, list[str]]:
    """Return the padding without which a teacher returns the same logits, or None; and a note if it returns others.

    Each length is checked on the samples that just fit into it: a teacher may pool over its padding, or need rows of one length.

    Shapes:
        arrays: (n, L) each, if they are tokens.
    """
    padding = find_padding(arrays)
    if padding is None:
        return None, []
    lengths = token_lengths(arrays, padding)
    checked = []
    for length in padding.lengths:
        rows = (lengths <= length).nonzero()[0]
        rows = rows[(-lengths[rows]).argsort(kind="stable")[:ROWS_PER_LENGTH]]
        if not len(rows):
            continue
        expected = teacher([array[rows] for array in arrays])
        shorter = _in_layout(lambda: teacher, [array[rows, :length] for array in arrays], expected)
        if isinstance(shorter, str):
            return None, [f"the teacher runs on padding too, because on {length} of {arrays[0].shape[1]} tokens {shorter}"]
        checked.append(length)
    return Padding(padding.values, tuple(checked)), []


def find_padding(arrays: Sequence[np.ndarray]) -> Padding | None:
    """Return how token inputs (ids, an attention mask) are filled up, or None if they are no tokens or hardly filled up.

    Inputs are tokens if all have rows of the same length and one has whole numbers. An input is filled up by the value that its rows
    repeat most often at their end.

    Shapes:
        arrays: (n, L) each.
    """
    import numpy as np

    first = arrays[0]
    is_tokens = first.ndim == 2 and all(array.shape == first.shape for array in arrays)  # noqa: PLR2004  (n, L)
    if not is_tokens or not len(first) or all(array.dtype.kind not in "iu" for array in arrays):
        return None
    rows = np.linspace(0, len(first) - 1, min(len(first), _PADDING_SAMPLES)).astype(np.int64)
    samples, tokens = [array[rows] for array in arrays], first.shape[1]
    step = -(-tokens // MAX_LENGTHS)
    padding = Padding(tuple(map(_padding_value, samples)), tuple(range(step, tokens, step)))
    used = -(-token_lengths(samples, padding) // step) * step
    return padding if used.mean() <= _MAX_TOKENS * tokens else None


def token_lengths(arrays: Sequence[np.ndarray], padding: Padding) -> np.ndarray:
    """Return how long each row is without padding. Shapes: arrays: (n, L) each; result: (n,) int64."""
    import numpy as np

    is_token = np.logical_or.reduce([array != value for array, value in zip(arrays, padding.values, strict=True)])
    lengths: np.ndarray = np.where(is_token.any(axis=1), is_token.shape[1] - is_token[:, ::-1].argmax(axis=1), 0)
    return lengths


def _padding_value(array: np.ndarray) -> Any:
    """Return the value that the rows (n, L) repeat most often at their end; rows of a single value say nothing."""
    import numpy as np

    differs = (array != array[:, -1:])[:, ::-1]
    is_varied = differs.any(axis=1)
    if not is_varied.any():
        return array[0, -1]
    values, index = np.unique(array[is_varied, -1], return_inverse=True)
    return values[np.bincount(index, weights=differs[is_varied].argmax(axis=1)).argmax()]


def _in_layout(load: Callable[[], Predict], batch: Batch, expected: np.ndarray) -> Predict | str:
    """Return the teacher in a layout, or why it cannot be used."""
    import numpy as np

    try:
        teacher = load()
        difference = (np.abs(teacher(batch) - expected) / np.maximum(1.0, np.abs(expected).max(axis=1, keepdims=True))).max()
    except (RecipeError, RuntimeError, AssertionError) as error:  # no driver, not enough memory, an unsupported operator or view
        return str(error).splitlines()[0]
    return teacher if difference <= storage.TOLERANCE else f"its logits differ by {difference:.2g} of the largest"  # True for NaN
