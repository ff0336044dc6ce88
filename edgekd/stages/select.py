# SPDX-License-Identifier: Apache-2.0
"""Select: which candidate ships, how it was ranked, and why the others do not ship. A function of numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekd.domain.candidate import Choice
from edgekd.domain.units import bytes_to_kib, ns_to_ms
from edgekd.domain.verdict import Outcome
from edgekd.stats import intervals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgekd.domain.candidate import Option
    from edgekd.domain.measurement import Measurement


def select(options: Sequence[Option], max_float_ops: int, max_size_kib: float | None = None) -> Choice:
    """Return the choice among those within the accuracy and size budgets: the fastest if all were measured, else the smallest."""
    why_not: dict[str, str] = {}
    accurate = _within_accuracy_budget(options, max_float_ops, why_not)
    if not accurate:
        best = min(options, key=lambda option: (option.drop_pp, option.candidate.id))
        why_not.pop(best.candidate.id, None)
        return Choice(best, None, best.candidate.settings[0], "smallest drop: no candidate meets the accuracy budget", why_not)
    small = _within_size_budget(accurate, max_size_kib, why_not)
    passing = [option for option in small if option.accuracy is Outcome.PASS]
    for option in small:
        if passing and option not in passing:
            why_not[option.candidate.id] = "its accuracy is inconclusive, and another candidate's is not"
    pool = passing or small
    return _fastest(pool, why_not) if all(option.measurements for option in pool) else _smallest(pool, why_not)


def _within_accuracy_budget(options: Sequence[Option], max_float_ops: int, why_not: dict[str, str]) -> list[Option]:
    accurate = []
    for option in options:
        if option.candidate.scheme.startswith("static_") and option.float_ops > max_float_ops:
            why_not[option.candidate.id] = f"{option.float_ops} ops stay float; allow with quantize.max_float_ops = {option.float_ops}"
        elif option.accuracy is Outcome.FAIL:
            why_not[option.candidate.id] = f"misses the accuracy budget (drop {option.drop_pp:.2f} pp)"
        else:
            accurate.append(option)
    return accurate


def _within_size_budget(options: Sequence[Option], max_size_kib: float | None, why_not: dict[str, str]) -> list[Option]:
    """Return the options within the size budget; all of them if none is, so that the gate fails one."""
    small = [option for option in options if max_size_kib is None or bytes_to_kib(option.size_bytes) <= max_size_kib]
    if not small:
        return list(options)
    for option in options:
        if option not in small:
            why_not[option.candidate.id] = f"too large: {bytes_to_kib(option.size_bytes):.1f} KiB exceeds the budget {max_size_kib:g} KiB"
    return small


def _smallest(pool: Sequence[Option], why_not: dict[str, str]) -> Choice:
    best = min(pool, key=lambda option: (option.size_bytes, option.candidate.id))
    for option in pool:
        if option is not best:
            why_not[option.candidate.id] = (
                f"larger: {bytes_to_kib(option.size_bytes):.1f} KiB (chosen: {bytes_to_kib(best.size_bytes):.1f} KiB)"
            )
    return Choice(best, None, best.candidate.settings[0], f"size: nothing was measured, {len(pool)} candidates", why_not)


def _fastest(pool: Sequence[Option], why_not: dict[str, str]) -> Choice:
    settings = [(option, measurement) for option in pool for measurement in option.measurements]
    fastest = min(settings, key=lambda setting: _median_ns(setting[1]))
    # of those that the measurement cannot tell from the fastest: the smallest file, then the fewest threads
    equally_fast = [setting for setting in settings if setting is fastest or _is_as_fast(setting[1], fastest[1])]
    option, measurement = min(equally_fast, key=lambda setting: (setting[0].size_bytes, setting[1].threads, setting[0].candidate.id))
    p50_ns = _median_ns(measurement)
    for other in pool:
        if other is not option:
            other_p50_ns = min(map(_median_ns, other.measurements))
            reason = "as fast, and larger" if any(setting[0] is other for setting in equally_fast) else "slower"
            why_not[other.candidate.id] = f"{reason}: p50 {ns_to_ms(other_p50_ns):.4g} ms (chosen: {ns_to_ms(p50_ns):.4g} ms)"
    rank = "the fastest" if measurement is fastest[1] else "as fast as the fastest and smaller,"
    selected_by = f"measurement: p50 {ns_to_ms(p50_ns):.4g} ms at threads = {measurement.threads}, {rank} of {len(settings)} settings"
    return Choice(option, measurement, measurement.threads, selected_by, why_not)


def _is_as_fast(measurement: Measurement, fastest: Measurement) -> bool:
    interval = intervals.ratio_of_medians(measurement.blocks_ns, fastest.blocks_ns)[1]
    return measurement.runtime == fastest.runtime and (interval is None or interval.low <= 1.0)


def _median_ns(measurement: Measurement) -> float:
    return intervals.median(measurement.samples_ns())
