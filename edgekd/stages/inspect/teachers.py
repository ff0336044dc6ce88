# SPDX-License-Identifier: Apache-2.0
"""Checks of a teacher that exists, on some hundred validation samples: is it a function of the sample, and is it worth learning from?"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from edgekd.errors import RecipeError
from edgekd.kd.output_spec import MULTICLASS, OutputSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from edgekd.stages.inspect.params import CheckContext

    Predict = Callable[[list[np.ndarray]], np.ndarray]

_SPLIT = "validation"
_SAMPLES = 512
_FIRST_BATCH, _BATCH = 8, 64  # a batch has as many samples as those before, so that a slow teacher is noticed early
_REPEATED = 4  # batches that are run twice
_SECONDS = 8.0  # a slow teacher is checked on fewer samples; the stage soft_targets judges it by all
_ROUNDING = 1e-5  # of the largest output, for the same batch twice
_TOLERANCE = 1e-2  # the same for a sample alone and in a batch


def check_teacher_outputs(check: CheckContext, predict: Predict, name: str, *, may_refuse: bool) -> np.ndarray:
    """Return a teacher's outputs for validation samples that are spread over the split; add to ``check.notes`` what is doubtful.

    A teacher that is no better than a constant is refused only where ``may_refuse`` and the labels are what its outputs predict. In
    other cases, or if that is not certain, the stage ``soft_targets`` warns of it.

    Raises:
        RecipeError: if it is random, mixes the samples of a batch, is certainly worthless, or an output is not finite or a probability.

    Shapes:
        result: (n, C).
    """
    import numpy as np

    from edgekd.kd.teachers.quality import probability_problem, quality_problems

    rows, outputs = _run(check, predict, name)
    labels = np.load(check.out / f"{_SPLIT}.labels.npy", mmap_mode="r")[rows]
    spec = OutputSpec(check.params.task, check.params.heads)
    if (problem := probability_problem(spec, outputs)) is not None:
        if problem.is_worthless:
            raise RecipeError(f"{name}: the teacher {problem.text}")
        check.notes.append(f"warning: the teacher {name} {problem.text}")
    are_predicted = check.params.needs_class_ids or spec.task != MULTICLASS
    problems = quality_problems(spec, outputs, labels) if may_refuse and are_predicted else []
    if worthless := [problem.text for problem in problems if problem.is_worthless]:
        raise RecipeError(*(f"{name}: the teacher {text}" for text in worthless))
    return outputs


def _run(check: CheckContext, predict: Predict, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return rows (n,) of the split, and the outputs (n, C) for them."""
    import numpy as np

    count = len(np.load(check.out / f"{_SPLIT}.labels.npy", mmap_mode="r"))
    rows = np.random.default_rng(0).permutation(count)[:_SAMPLES]
    started = time.monotonic()
    outputs: list[np.ndarray] = []
    done = 0
    while done < len(rows) and time.monotonic() - started <= _SECONDS:
        batch = rows[done : done + min(max(_FIRST_BATCH, done), _BATCH)]
        outputs.append(predict(check.samples(batch.tolist(), _SPLIT)))
        done += len(batch)
        _check_finite(outputs[-1], batch, name)
        if len(outputs) <= _REPEATED:
            _check_repeated(predict, check.samples(batch.tolist(), _SPLIT), outputs[-1], name)
        if len(outputs) == 1:
            _check_alone(predict, check.samples(batch.tolist(), _SPLIT), outputs[0], name)
    return rows[:done], np.concatenate(outputs)


def _check_finite(outputs: np.ndarray, rows: np.ndarray, name: str) -> None:
    import numpy as np

    not_finite = np.flatnonzero(~np.isfinite(outputs).all(axis=1))
    if len(not_finite):
        raise RecipeError(
            f"{name}: returns outputs that are not finite (NaN or infinite) for {len(not_finite)} of {len(rows)} samples, the first is "
            f"{_SPLIT}[{rows[not_finite[0]]}]; check the weights and the scale of the inputs"
        )


def _check_repeated(predict: Predict, samples: list[np.ndarray], outputs: np.ndarray, name: str) -> None:
    import numpy as np

    if np.abs(predict(samples) - outputs).max() > _ROUNDING * np.abs(outputs).max():
        raise RecipeError(
            f"{name}: the teacher in eval mode returns different outputs for the same input; expected the same (dropout without "
            "training=self.training, noise, or state that each call changes?)"
        )


def _check_alone(predict: Predict, samples: list[np.ndarray], outputs: np.ndarray, name: str) -> None:
    import numpy as np

    alone = predict([array[:1] for array in samples])
    if np.abs(alone[0] - outputs[0]).max() > _TOLERANCE * np.abs(outputs).max():
        raise RecipeError(
            f"{name}: the teacher returns different outputs for a sample alone and in a batch of {len(outputs)}; expected the same "
            "(batch norm that uses the batch, or an operation over axis 0?)"
        )
