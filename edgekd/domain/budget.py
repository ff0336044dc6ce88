# SPDX-License-Identifier: Apache-2.0
"""The budget: what a product allows. Field names are the keys of ``[budget]``, and carry their units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from edgekd.domain.rules import Between, Positive


@dataclass(frozen=True, slots=True)
class Budget:
    """The product's limits; a line that is absent is not judged.

    Attributes:
        max_accuracy_drop_pp: Drop of accuracy against the teacher, in percentage points.
        min_accuracy_pct: Accuracy in percent.
        max_class_drop_pp: Drop of accuracy of any class against the teacher, in percentage points.
        max_latency_p50_ms: Median latency in milliseconds.
        max_latency_p95_ms: 95th percentile of latency in milliseconds.
        max_latency_p99_ms: 99th percentile of latency in milliseconds.
        min_speedup_x: Speed-up against the float32 teacher on the same runtime.
        max_peak_rss_mib: Peak resident memory in MiB.
        max_size_kib: Size of the model file in KiB.
    """

    max_accuracy_drop_pp: Annotated[float, Between(0, 100)] | None = None
    min_accuracy_pct: Annotated[float, Between(0, 100)] | None = None
    max_class_drop_pp: Annotated[float, Between(0, 100)] | None = None
    max_latency_p50_ms: Annotated[float, Positive] | None = None
    max_latency_p95_ms: Annotated[float, Positive] | None = None
    max_latency_p99_ms: Annotated[float, Positive] | None = None
    min_speedup_x: Annotated[float, Positive] | None = None
    max_peak_rss_mib: Annotated[float, Positive] | None = None
    max_size_kib: Annotated[float, Positive] | None = None
