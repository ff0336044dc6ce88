# SPDX-License-Identifier: Apache-2.0
"""Measurements: raw samples, how they were taken, and on which machine. Estimates: a value with a band, and what it rests on."""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003  (a field's type)
from dataclasses import dataclass

from edgekd.domain.artifact import Json  # noqa: TC001  (a field's type)

TEACHER = "teacher"


@dataclass(frozen=True, slots=True)
class Measurement:
    """Latency of one model at one setting on one device.

    ``blocks_ns[i]`` are the raw samples of round ``i``, integer nanoseconds; in each round all subjects of a runtime
    run once, interleaved, so that round ``i`` of two measurements is a pair.
    ``subject`` is a candidate's id, or ``teacher``. ``environment`` holds the identity and state of the machine;
    a value that cannot be read is ``unknown``.
    """

    subject: str
    runtime: str
    runtime_version: str
    threads: int
    model_digest: str
    blocks_ns: tuple[tuple[int, ...], ...]
    warmup_runs: int
    load_ns: int
    first_ns: int
    peak_rss_bytes: int | None
    environment: Mapping[str, Json]
    notes: tuple[str, ...] = ()

    def samples_ns(self) -> list[int]:
        """Return all samples in order of time."""
        return [sample for block in self.blocks_ns for sample in block]


@dataclass(frozen=True, slots=True)
class Estimate:
    """Estimated latency of one model at one setting, in integer nanoseconds: a value, and the band that covers it at ``level``.

    ``tier`` says how it is known (``fitted`` or ``spec-scaled``), ``provenance`` which rows it rests on, ``notes`` what widened the band.
    """

    runtime: str
    threads: int
    value_ns: int
    low_ns: int
    high_ns: int
    level: float
    tier: str
    provenance: str
    notes: tuple[str, ...] = ()
