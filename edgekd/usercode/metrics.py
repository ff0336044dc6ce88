# SPDX-License-Identifier: Apache-2.0
"""Call the user's score function or metric, and check what it returns."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from edgekd.errors import RecipeError
from edgekd.usercode.importer import call_user_code

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from edgekd.domain.recipe import EntryPoint


def score_samples(function: Callable[..., Any], entry: EntryPoint, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the score of each sample, from 0 to 1: shape (n,), float64. The function gets copies, which it may change.

    Raises:
        RecipeError: if it raises, or returns anything else.
    """
    import numpy as np

    scores, array = _call(function, entry, outputs, labels)
    if array.shape == labels.shape[:1] and array.dtype.kind in "biuf":
        numbers: np.ndarray = array.astype(np.float64)
        if np.isfinite(numbers).all() and numbers.min() >= 0 and numbers.max() <= 1:
            return numbers
    raise RecipeError(f"{entry}: returned {_describe(scores)} for {len(labels)} samples; expected {len(labels)} scores from 0 to 1")


def score_set(function: Callable[..., Any], entry: EntryPoint, outputs: np.ndarray, labels: np.ndarray) -> float:
    """Return a metric of the whole set. The function gets copies, which it may change.

    Raises:
        RecipeError: if it raises, or returns anything but a finite number of at most 1.
    """
    import numpy as np

    value, array = _call(function, entry, outputs, labels)
    if array.ndim == 0 and array.dtype.kind in "biuf" and np.isfinite(number := float(array)) and number <= 1:
        return number
    expected = "expected one finite number for the whole set, at most 1 (0.93, not 93)"
    raise RecipeError(f"{entry}: returned {_describe(value)}; {expected}")


def _call(function: Callable[..., Any], entry: EntryPoint, outputs: np.ndarray, labels: np.ndarray) -> tuple[Any, np.ndarray]:
    """Return what the user's function returned, as it is and as an array."""
    import numpy as np

    value = call_user_code(function, entry, outputs.copy(), labels.copy())
    return value, call_user_code(np.asarray, entry, value, what=f"what {entry.function} returned")


def _describe(value: object) -> str:
    """Return the type of a value, and its shape or its start; text of the user's own types may raise."""
    name, text = type(value).__name__, ""
    with contextlib.suppress(Exception):
        shape = tuple(getattr(value, "shape", ()))
        text = f" of shape {list(shape)}" if shape else f" {str(value)[:40]}"
    return name + text
