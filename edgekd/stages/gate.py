# SPDX-License-Identifier: Apache-2.0
"""Gate: check each budget line and each limit of the target. A function of numbers; missing data never passes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekd.domain.units import bytes_to_kib, bytes_to_mib, ns_to_ms
from edgekd.domain.verdict import Check, Interval, Outcome, Verdict
from edgekd.stats import intervals

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgekd.domain.budget import Budget
    from edgekd.domain.candidate import Accuracy
    from edgekd.domain.measurement import Estimate, Measurement
    from edgekd.domain.target import Limits

QUANTILES = {"max_latency_p50_ms": 0.50, "max_latency_p95_ms": 0.95, "max_latency_p99_ms": 0.99}
NEEDS_GROUPS = "an interval needs samples of several groups, and a metric that is defined without any one of them"
_SEVERITY = {Outcome.PASS: 0, Outcome.INCONCLUSIVE: 1, Outcome.FAIL: 2}


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that a verdict is based on. ``unmeasured``: why there is no Measurement; ``no_estimate``: why no Estimate either."""

    accuracy: Accuracy
    parity: Mapping[str, Any]
    size_bytes: int
    measurement: Measurement | None = None
    teacher: Measurement | None = None
    estimate: Estimate | None = None
    no_estimate: str | None = None
    unmeasured: str = "it was not measured"
    advice: str = "edgekd build --remeasure"


def judge(target: str, budget: Budget, limits: Limits, evidence: Evidence) -> Verdict:
    """Return the verdict on the chosen candidate."""
    checks = accuracy_checks(budget, evidence.accuracy)
    for name, quantile in QUANTILES.items():
        limit = getattr(budget, name)
        if limit is not None:
            checks.append(_check_latency(name, quantile, limit, evidence))
    if budget.min_speedup_x is not None:
        checks.append(_check_speedup(budget.min_speedup_x, evidence))
    if budget.max_peak_rss_mib is not None:
        checks.append(_check_memory("max_peak_rss_mib", budget.max_peak_rss_mib, evidence))
    if budget.max_size_kib is not None:
        checks.append(_check_exact("max_size_kib", bytes_to_kib(evidence.size_bytes), budget.max_size_kib, "KiB", "size"))
    checks.append(_check_parity(evidence.parity))
    checks.append(_check_memory("limit.memory_mib", limits.memory_mib, evidence))
    checks.append(_check_exact("limit.storage_mib", bytes_to_mib(evidence.size_bytes), limits.storage_mib, "MiB", "size"))
    return Verdict(target, tuple(checks))


def accuracy_checks(budget: Budget, accuracy: Accuracy) -> list[Check]:
    """Return the accuracy checks, which decide which candidates are measured."""
    checks = []
    if budget.max_accuracy_drop_pp is not None:
        value, interval = 100 * accuracy.drop.value, _scale(accuracy.drop.interval, 100)
        advice = NEEDS_GROUPS if interval is None else "more evaluation samples would narrow the interval"
        checks.append(at_most("max_accuracy_drop_pp", value, interval, budget.max_accuracy_drop_pp, "pp", "accuracy drop", advice))
    if budget.min_accuracy_pct is not None:
        value, interval = 100 * accuracy.value, _scale(accuracy.interval, 100)
        needs = NEEDS_GROUPS if interval is None else None
        checks.append(at_least("min_accuracy_pct", value, interval, budget.min_accuracy_pct, "%", "accuracy", needs))
    if budget.max_class_drop_pp is not None:
        checks.append(_check_classes(budget.max_class_drop_pp, accuracy))
    if accuracy.unfit is not None:
        advice = "evaluate on the target, or on a machine with VNNI"
        checks = [Check(c.name, Outcome.INCONCLUSIVE, c.limit, c.unit, c.value, c.interval, accuracy.unfit, advice) for c in checks]
    return checks


def accuracy_outcome(budget: Budget, accuracy: Accuracy) -> Outcome:
    """Return the worst outcome of the accuracy checks; PASS if the budget has none."""
    return max((check.outcome for check in accuracy_checks(budget, accuracy)), key=_SEVERITY.__getitem__, default=Outcome.PASS)


def at_most(name: str, value: float, interval: Interval | None, limit: float, unit: str, what: str, advice: str | None = None) -> Check:
    """Check a value that must not exceed a limit, by the far end of its interval."""
    return _check_interval(name, value, interval, limit, unit, what, advice, sign=1)


def at_least(name: str, value: float, interval: Interval | None, limit: float, unit: str, what: str, advice: str | None = None) -> Check:
    """Check a value that must reach a limit, by the far end of its interval."""
    return _check_interval(name, value, interval, limit, unit, what, advice, sign=-1)


def _check_interval(
    name: str, value: float, interval: Interval | None, limit: float, unit: str, what: str, advice: str | None, *, sign: int
) -> Check:
    if interval is None or not all(map(math.isfinite, (value, interval.low, interval.high))):
        finite_value = value if math.isfinite(value) else None
        return Check(name, Outcome.INCONCLUSIVE, limit, unit, finite_value, None, f"{what} has no interval", advice)
    near, far = (interval.low, interval.high) if sign > 0 else (interval.high, interval.low)
    description = f"{what} {value:.4g} {unit} [{interval.low:.4g}, {interval.high:.4g}]"
    if sign * far <= sign * limit:
        return Check(name, Outcome.PASS, limit, unit, value, interval)
    if sign * near > sign * limit:
        verb = "exceeds" if sign > 0 else "misses"
        return Check(name, Outcome.FAIL, limit, unit, value, interval, f"{description} {verb} the budget {limit:g} {unit}")
    reason = f"the interval of {description} includes the budget {limit:g} {unit}"
    return Check(name, Outcome.INCONCLUSIVE, limit, unit, value, interval, reason, advice)


def _check_classes(limit: float, accuracy: Accuracy) -> Check:
    """Return the check of the class that is furthest from its budget."""
    if not accuracy.classes:
        return Check("max_class_drop_pp", Outcome.INCONCLUSIVE, limit, "pp", reason="there are no scores by class")
    checks = [
        at_most(
            "max_class_drop_pp",
            100 * row["drop"],
            None if row["interval"] is None else Interval(100 * row["interval"][0], 100 * row["interval"][1]),
            limit,
            "pp",
            f"drop in class {label}",
        )
        for label, row in accuracy.classes.items()
    ]
    return max(checks, key=lambda check: (_SEVERITY[check.outcome], check.value or 0.0))


def _check_latency(name: str, quantile: float, limit: float, evidence: Evidence) -> Check:
    if evidence.measurement is None:
        return _check_estimate(name, limit, evidence)
    samples = evidence.measurement.samples_ns()
    value, interval = intervals.quantile_interval(samples, quantile)
    if interval is None:
        reason = f"{len(samples)} runs are too few for a p{quantile * 100:g}; it needs {intervals.runs_needed(quantile)}"
        return Check(name, Outcome.INCONCLUSIVE, limit, "ms", reason=reason, advice="raise protocol.min_runs in the profile")
    interval_ms = Interval(ns_to_ms(interval.low), ns_to_ms(interval.high), interval.level)
    return at_most(name, ns_to_ms(value), interval_ms, limit, "ms", f"latency p{quantile * 100:g}", "measure longer: protocol.min_seconds")


def _check_estimate(name: str, limit: float, evidence: Evidence) -> Check:
    """Check a latency that was not measured: an estimate whose whole band is outside of the budget fails it, and none passes it."""
    estimate, why = evidence.estimate, f"not measured, as {evidence.unmeasured}"
    if estimate is None:
        reason = f"latency is unknown: {'; '.join(filter(None, (evidence.unmeasured, evidence.no_estimate)))}"
        return Check(name, Outcome.INCONCLUSIVE, limit, "ms", reason=reason, advice=evidence.advice)
    band = Interval(ns_to_ms(estimate.low_ns), ns_to_ms(estimate.high_ns), estimate.level)
    outcome = Outcome.FAIL if band.low > limit else Outcome.INCONCLUSIVE
    relation = "is above" if band.low > limit else "is below" if band.high <= limit else "includes"
    reason = f"{why}; the estimate's {100 * band.level:.0f} % band {relation} the budget {limit:g} ms"
    reason += "" if outcome is Outcome.FAIL else ", but an estimate passes nothing"
    return Check(name, outcome, limit, "ms", ns_to_ms(estimate.value_ns), band, reason, evidence.advice, estimate.tier)


def _check_speedup(limit: float, evidence: Evidence) -> Check:
    if evidence.measurement is None or evidence.teacher is None:
        missing = evidence.unmeasured if evidence.measurement is None else "the teacher was not measured on this runtime"
        return Check("min_speedup_x", Outcome.INCONCLUSIVE, limit, "x", reason=f"speed-up is unknown: {missing}", advice=evidence.advice)
    value, interval = intervals.ratio_of_medians(evidence.teacher.blocks_ns, evidence.measurement.blocks_ns)
    return at_least("min_speedup_x", value, interval, limit, "x", "speed-up", "measure longer: protocol.min_seconds")


def _check_memory(name: str, limit: float, evidence: Evidence) -> Check:
    peak = None if evidence.measurement is None else evidence.measurement.peak_rss_bytes
    if peak is None:
        reason = f"peak memory is unknown: {evidence.unmeasured}"
        return Check(name, Outcome.INCONCLUSIVE, limit, "MiB", reason=reason, advice=evidence.advice)
    return _check_exact(name, bytes_to_mib(peak), limit, "MiB", "peak memory")


def _check_exact(name: str, value: float, limit: float, unit: str, what: str) -> Check:
    if not math.isfinite(value):
        return Check(name, Outcome.INCONCLUSIVE, limit, unit, reason=f"{what} is unknown")
    if value <= limit:
        return Check(name, Outcome.PASS, limit, unit, value)
    return Check(name, Outcome.FAIL, limit, unit, value, reason=f"{what} {value:.4g} {unit} exceeds {limit:g} {unit}")


def _check_parity(parity: Mapping[str, Any]) -> Check:
    error, tolerance = parity["max_abs_error"], parity["tolerance"]
    if parity["ok"]:
        return Check("parity", Outcome.PASS, tolerance, "abs", error)
    reason = f"the exported model differs from PyTorch by {'nan' if error is None else f'{error:.3g}'}; allowed is {tolerance:.3g}"
    return Check("parity", Outcome.FAIL, tolerance, "abs", error, reason=reason)


def _scale(interval: Interval | None, factor: float) -> Interval | None:
    return None if interval is None else Interval(factor * interval.low, factor * interval.high, interval.level)
