# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from edgekd.report import text


@pytest.mark.parametrize(
    ("value", "unit", "told"),
    [
        (None, "ms", "unknown"),
        (0.0, "pp", "0 pp"),
        (10.930975, "x", "10.93x"),
        (92.5, "%", "92.5 %"),
        (0.000123456, "ms", "0.0001235 ms"),
        (-1.23456, "pp", "-1.235 pp"),
        (9999.4, "KiB", "9999 KiB"),
        (24105.3, "MiB", "24,105 MiB"),
        (3.0, "", "3"),
    ],
)
def test_a_number_has_four_digits_and_its_unit(value, unit, told):
    assert text.number(value, unit) == told


def test_a_value_is_never_rounded_out_of_its_own_interval():
    assert f"{text.number(10.930975, 'x')} {text.interval([10.9193, 10.9431])}" == "10.93x [10.92, 10.94]"


def test_a_limit_has_its_direction():
    assert text.limit({"name": "min_speedup_x", "limit": 2.0, "unit": "x"}) == ">= 2x"
    assert text.limit({"name": "max_size_kib", "limit": 64.0, "unit": "KiB"}) == "<= 64 KiB"
    assert text.limit({"name": "limit.memory_mib", "limit": None, "unit": "MiB"}) == ""


def test_a_percentile_that_the_runs_cannot_carry_is_not_told():
    assert text.percentile({"ms": 3.21, "interval": None}) == "n too small"
    assert text.percentile({"ms": 3.21, "interval": [3.0, 3.5]}) == "3.21 [3, 3.5]"


@pytest.mark.parametrize(
    ("shipped", "outcome", "excused"), [("a.tflite", "PASS", False), ("a.tflite", "INCONCLUSIVE", True), (None, "INCONCLUSIVE", False)]
)
def test_only_what_ships_without_having_passed_is_excused(shipped, outcome, excused):
    assert text.is_inconclusive_ok({"shipped": shipped, "outcome": outcome}) is excused
