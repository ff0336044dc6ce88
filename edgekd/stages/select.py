# SPDX-License-Identifier: Apache-2.0
"""Select: the artifact that ships, how it was ranked, and why the others do not ship. A function of numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekd.domain.units import bytes_to_kib, ns_to_ms
from edgekd.domain.verdict import Outcome
from edgekd.stats import intervals

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgekd.domain.artifact import Candidate
    from edgekd.domain.measurement import Measurement


@dataclass(frozen=True, slots=True)
class Option:
    """A candidate with what is known of it; ``accuracy`` is the outcome of its accuracy checks, ``drop_pp`` against the teacher."""

    candidate: Candidate
    size_bytes: int
    float_ops: int
    accuracy: Outcome
    drop_pp: float
    measurements: tuple[Measurement, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """What ships: an option at a setting. ``why_not`` holds a reason for every other candidate."""

    option: Option
    measurement: Measurement | None
    threads: int
    selected_by: str
    why_not: Mapping[str, str]


def select(options: Sequence[Option], max_float_ops: int, max_size_kib: float | None = None) -> Choice:
    """Return the choice: of those within the accuracy and size budgets the fastest, by Measurement, else the smallest."""
    why_not: dict[str, str] = {}
    fit = []
    for option in options:
        if option.candidate.scheme.startswith("static_") and option.float_ops > max_float_ops:
            why_not[option.candidate.id] = f"{option.float_ops} ops stay float; allow with quantize.max_float_ops = {option.float_ops}"
        elif option.accuracy is Outcome.FAIL:
            why_not[option.candidate.id] = f"misses the accuracy budget (drop {option.drop_pp:.2f} points)"
        else:
            fit.append(option)
    if not fit:
        best = min(options, key=lambda option: (option.drop_pp, option.candidate.id))
        why_not.pop(best.candidate.id, None)
        return Choice(best, None, best.candidate.settings[0], "smallest drop: no candidate meets the accuracy budget", why_not)
    for option in _too_large(fit, max_size_kib):
        why_not[option.candidate.id] = f"too large: {bytes_to_kib(option.size_bytes):.1f} KiB exceeds the budget {max_size_kib:g} KiB"
        fit.remove(option)
    sure = [option for option in fit if option.accuracy is Outcome.PASS]
    for option in fit:
        if sure and option not in sure:
            why_not[option.candidate.id] = "its accuracy is inconclusive, and another's is not"
    pool = sure or fit
    if all(option.measurements for option in pool):
        return _by_measurement(pool, why_not)
    best = min(pool, key=lambda option: (option.size_bytes, option.candidate.id))
    for option in pool:
        if option is not best:
            why_not[option.candidate.id] = (
                f"larger: {bytes_to_kib(option.size_bytes):.1f} KiB against {bytes_to_kib(best.size_bytes):.1f} KiB"
            )
    return Choice(best, None, best.candidate.settings[0], f"size: nothing was measured, {len(pool)} candidates", why_not)


def _too_large(fit: Sequence[Option], max_size_kib: float | None) -> list[Option]:
    """Return those above the size budget, unless all are: then the gate judges one of them."""
    found = [option for option in fit if max_size_kib is not None and bytes_to_kib(option.size_bytes) > max_size_kib]
    return found if len(found) < len(fit) else []


def _by_measurement(pool: Sequence[Option], why_not: dict[str, str]) -> Choice:
    settings = [(option, measurement) for option in pool for measurement in option.measurements]
    fastest = min(settings, key=lambda item: _median_ns(item[1]))
    # as fast, as far as the measurement can tell: then the smaller file, then fewer threads
    equal = [item for item in settings if item is fastest or _is_as_fast(item[1], fastest[1])]
    option, measurement = min(equal, key=lambda item: (item[0].size_bytes, item[1].threads, item[0].candidate.id))
    middle = _median_ns(measurement)
    for other in pool:
        if other is not option:
            theirs = min(_median_ns(item) for item in other.measurements)
            word = "as fast, and larger" if any(item[0] is other for item in equal) else "slower"
            why_not[other.candidate.id] = f"{word}: p50 {ns_to_ms(theirs):.4g} ms against {ns_to_ms(middle):.4g} ms"
    rank = "the fastest" if measurement is fastest[1] else "smaller than the fastest and as fast,"
    by = f"measurement: p50 {ns_to_ms(middle):.4g} ms at threads = {measurement.threads}, {rank} of {len(settings)} settings"
    return Choice(option, measurement, measurement.threads, by, why_not)


def _is_as_fast(measurement: Measurement, fastest: Measurement) -> bool:
    interval = intervals.ratio_of_medians(measurement.blocks_ns, fastest.blocks_ns)[1]
    return measurement.runtime == fastest.runtime and interval.low <= 1.0


def _median_ns(measurement: Measurement) -> float:
    return intervals.median(measurement.samples_ns())
