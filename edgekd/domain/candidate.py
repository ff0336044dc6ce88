# SPDX-License-Identifier: Apache-2.0
"""Candidates for shipping: what each is, its accuracy and latency, and which one is selected."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgekd.domain.artifact import Json
    from edgekd.domain.measurement import Estimate, Measurement
    from edgekd.domain.verdict import Difference, Interval, Outcome


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model file that the target allows: one runtime, one scheme, one rung.

    ``model_step`` writes the file and ``evaluate_step`` scores it (step ids; ``id`` is ``model_step``). ``settings`` are the
    thread counts to measure. ``quantize`` holds the parameters of the quantize step: ``scheme``, ``io`` and the runtime's
    variant for the target's CPU.
    """

    id: str
    runtime: str
    scheme: str
    rung: str
    model_step: str
    evaluate_step: str
    settings: tuple[int, ...]
    quantize: Mapping[str, Json]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """What is known about a candidate's accuracy (fractions). ``unfit``: why it does not hold for the target, or None."""

    value: float
    interval: Interval | None
    drop: Difference
    classes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    unfit: str | None = None


@dataclass(frozen=True, slots=True)
class Option:
    """A candidate to choose from. ``accuracy`` is the outcome of its accuracy checks, ``drop_pp`` the drop against the teacher.

    ``estimates`` are those of its latency, by thread count, where nothing can be measured; ``no_estimate`` says why there are none.
    """

    candidate: Candidate
    size_bytes: int
    float_ops: int
    accuracy: Outcome
    drop_pp: float
    measurements: tuple[Measurement, ...] = ()
    estimates: tuple[Estimate, ...] = ()
    no_estimate: str | None = None

    def estimate(self, threads: int) -> Estimate | None:
        """Return the estimate of its latency with so many threads, or None."""
        return next((item for item in self.estimates if item.threads == threads), None)


@dataclass(frozen=True, slots=True)
class Choice:
    """What ships: an option and a thread count. ``why_not`` holds the reason for every other candidate, by its id."""

    option: Option
    measurement: Measurement | None
    threads: int
    selected_by: str
    why_not: Mapping[str, str]
