# SPDX-License-Identifier: Apache-2.0
"""Intervals, differences, checks and verdicts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """The outcome of a check, or of all checks."""

    PASS = "PASS"  # noqa: S105  (an outcome, not a password)
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"

    @property
    def exit_code(self) -> int:
        """Return the exit code of a build with this outcome."""
        return {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 4}[self.value]


@dataclass(frozen=True, slots=True)
class Interval:
    """A two-sided confidence interval."""

    low: float
    high: float
    level: float = 0.95


@dataclass(frozen=True, slots=True)
class Difference:
    """First less second: value and interval as fractions, p where each sample is right or wrong.

    ``interval`` and ``p`` are None where the samples do not tell: they are all of one group, for example.
    """

    value: float
    interval: Interval | None
    p: float | None


@dataclass(frozen=True, slots=True)
class Check:
    """The result for one budget line or one limit of the target.

    ``name`` is the key of the budget (``max_accuracy_drop_pp``), ``limit.memory_mib`` or ``limit.storage_mib``, or
    ``parity``. ``value``, ``interval`` and ``limit`` are in the unit of the key. ``reason`` says why the outcome
    is not PASS; ``advice`` is the next command or the next thing to change. ``tier`` is that of an Estimate, whose band ``interval``
    then is; None for what was measured.
    """

    name: str
    outcome: Outcome
    limit: float | None
    unit: str
    value: float | None = None
    interval: Interval | None = None
    reason: str | None = None
    advice: str | None = None
    tier: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """All checks of one target. FAIL if any check fails, else INCONCLUSIVE if any is or there is none, else PASS."""

    target: str
    checks: tuple[Check, ...]

    @property
    def outcome(self) -> Outcome:
        """Return the worst outcome."""
        outcomes = {check.outcome for check in self.checks}
        if Outcome.FAIL in outcomes:
            return Outcome.FAIL
        if Outcome.INCONCLUSIVE in outcomes or not outcomes:
            return Outcome.INCONCLUSIVE
        return Outcome.PASS
