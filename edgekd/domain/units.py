# SPDX-License-Identifier: Apache-2.0
"""All conversions of units. Inside: integer nanoseconds and bytes, accuracy as a fraction; in files and reports: ms, MiB, points."""

from __future__ import annotations

NS_PER_MS = 1_000_000
BYTES_PER_KIB = 1024
BYTES_PER_MIB = 1024 * 1024
MAX_THREADS = 1024  # of one process; more than any CPU has, and few enough to start


def ns_to_ms(value_ns: float) -> float:
    """Return milliseconds.

    >>> ns_to_ms(1_500_000)
    1.5
    """
    return value_ns / NS_PER_MS


def ms_to_ns(value_ms: float) -> int:
    """Return integer nanoseconds.

    >>> ms_to_ns(1.5)
    1500000
    """
    return round(value_ms * NS_PER_MS)


def bytes_to_kib(value_bytes: float) -> float:
    """Return KiB.

    >>> bytes_to_kib(1536)
    1.5
    """
    return value_bytes / BYTES_PER_KIB


def bytes_to_mib(value_bytes: float) -> float:
    """Return MiB.

    >>> bytes_to_mib(1_572_864)
    1.5
    """
    return value_bytes / BYTES_PER_MIB


def mib_to_bytes(value_mib: float) -> int:
    """Return integer bytes.

    >>> mib_to_bytes(1.5)
    1572864
    """
    return round(value_mib * BYTES_PER_MIB)


def kib_to_bytes(value_kib: float) -> int:
    """Return integer bytes.

    >>> kib_to_bytes(1.5)
    1536
    """
    return round(value_kib * BYTES_PER_KIB)


def fraction_to_pp(value: float) -> float:
    """Return percentage points of a fraction.

    >>> fraction_to_pp(0.015)
    1.5
    """
    return value * 100.0
