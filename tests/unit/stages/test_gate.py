# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekd.domain.budget import Budget
from edgekd.domain.candidate import Accuracy
from edgekd.domain.measurement import Estimate, Measurement
from edgekd.domain.target import Limits
from edgekd.domain.verdict import Difference, Interval, Outcome
from edgekd.stages import gate

LIMITS = Limits(memory_mib=64, storage_mib=1)
PARITY = {"ok": True, "max_abs_error": 1e-6, "tolerance": 1e-3}


def measurement(ns=1_000_000, runs=300, peak=32 * 2**20, subject="c"):
    block = tuple(ns + index for index in range(10))
    return Measurement(subject, "litert", "2.3", 1, "d", (block,) * (runs // 10), 20, 1, 1, peak, {})


def accuracy(drop=0.005, low=0.001, high=0.009, classes=None, unfit=None):
    return Accuracy(0.92, Interval(0.91, 0.93), Difference(drop, Interval(low, high), None), classes or {}, unfit)


def judge(budget=None, **changed):
    evidence = {
        "accuracy": accuracy(),
        "parity": PARITY,
        "size_bytes": 10 * 1024,
        "measurement": measurement(),
        "teacher": measurement(5_000_000),
    }
    return gate.judge("board", budget or Budget(), LIMITS, gate.Evidence(**{**evidence, **changed}))


def estimate(low, high):
    return Estimate("litert", 1, 4_000_000, int(low * 1e6), int(high * 1e6), 0.8, "fitted", "12 rows")


def find_check(verdict, name):
    return next(item for item in verdict.checks if item.name == name)


@pytest.mark.parametrize(
    ("interval", "outcome"),
    [
        ((0.001, 0.009), Outcome.PASS),
        ((0.001, 0.0101), Outcome.INCONCLUSIVE),
        ((0.0101, 0.03), Outcome.FAIL),
        ((-0.01, 0.01), Outcome.PASS),
    ],
)
def test_accuracy_drop_is_judged_by_the_far_end(interval, outcome):
    check = find_check(
        judge(Budget(max_accuracy_drop_pp=1.0), accuracy=accuracy(low=interval[0], high=interval[1])), "max_accuracy_drop_pp"
    )
    assert check.outcome is outcome
    assert (check.reason is None) == (outcome is Outcome.PASS)


@pytest.mark.parametrize(
    ("value", "interval"), [(0.0, None), (math.nan, Interval(0, 0)), (0.0, Interval(math.nan, 0)), (0.0, Interval(-math.inf, 0))]
)
def test_a_missing_number_of_accuracy_is_inconclusive(value, interval):
    unknown = Accuracy(value, interval, Difference(value, interval, None), {"3": {"drop": value, "interval": None}})
    verdict = judge(Budget(max_accuracy_drop_pp=99, min_accuracy_pct=0, max_class_drop_pp=99), accuracy=unknown)
    for name in ("max_accuracy_drop_pp", "min_accuracy_pct", "max_class_drop_pp"):
        assert find_check(verdict, name).outcome is Outcome.INCONCLUSIVE, name
    assert find_check(verdict, "max_accuracy_drop_pp").reason == "accuracy drop has no interval"
    if interval is None:
        assert find_check(verdict, "min_accuracy_pct").advice == gate.NEEDS_GROUPS


@pytest.mark.parametrize("size", [math.nan, math.inf])
def test_a_missing_size_is_inconclusive(size):
    assert find_check(judge(size_bytes=size), "limit.storage_mib").outcome is Outcome.INCONCLUSIVE


def test_one_round_gives_no_speedup():
    once = [replace(measurement(ns), blocks_ns=((ns, ns + 1),)) for ns in (1_000_000, 5_000_000)]
    check = find_check(judge(Budget(min_speedup_x=2), measurement=once[0], teacher=once[1]), "min_speedup_x")
    assert (check.outcome, check.reason) == (Outcome.INCONCLUSIVE, "speed-up has no interval")


@pytest.mark.parametrize(("floor", "outcome"), [(90.9, Outcome.PASS), (92.0, Outcome.INCONCLUSIVE), (93.1, Outcome.FAIL)])
def test_the_lowest_allowed_accuracy(floor, outcome):
    assert find_check(judge(Budget(min_accuracy_pct=floor)), "min_accuracy_pct").outcome is outcome


@pytest.mark.parametrize(("limit", "outcome"), [(1.1, Outcome.PASS), (0.9, Outcome.FAIL)])
@pytest.mark.parametrize("name", ["max_latency_p50_ms", "max_latency_p95_ms", "max_latency_p99_ms"])
def test_latency_percentiles(name, limit, outcome):
    assert find_check(judge(Budget(**{name: limit})), name).outcome is outcome


def test_a_percentile_of_too_few_runs_is_inconclusive_and_names_how_many_it_needs():
    check = find_check(judge(Budget(max_latency_p99_ms=100), measurement=measurement(runs=290)), "max_latency_p99_ms")
    assert check.outcome is Outcome.INCONCLUSIVE
    assert "290 runs are too few for a p99; it needs 299" in check.reason


def test_without_a_measurement_nothing_about_the_device_passes():
    verdict = judge(
        Budget(max_latency_p95_ms=1e6, min_speedup_x=0.1, max_peak_rss_mib=1e6), measurement=None, unmeasured="no device was named"
    )
    unknown = {item.name for item in verdict.checks if item.outcome is Outcome.INCONCLUSIVE}
    assert unknown == {"max_latency_p95_ms", "min_speedup_x", "max_peak_rss_mib", "limit.memory_mib"}
    assert all("no device was named" in item.reason for item in verdict.checks if item.name in unknown)
    assert verdict.outcome is Outcome.INCONCLUSIVE


def test_an_unmeasured_target_is_inconclusive_without_any_budget():
    assert judge(measurement=None).outcome is Outcome.INCONCLUSIVE


@pytest.mark.parametrize(("limit", "outcome"), [(4.9, Outcome.PASS), (5.1, Outcome.FAIL)])
def test_speed_up_against_the_teacher(limit, outcome):
    assert find_check(judge(Budget(min_speedup_x=limit)), "min_speedup_x").outcome is outcome


def test_speed_up_without_a_teacher_on_this_runtime_is_unknown():
    check = find_check(judge(Budget(min_speedup_x=1), teacher=None), "min_speedup_x")
    assert check.outcome is Outcome.INCONCLUSIVE
    assert "the teacher was not measured on this runtime" in check.reason


def test_size_and_the_target_limits():
    assert find_check(judge(Budget(max_size_kib=9)), "max_size_kib").outcome is Outcome.FAIL
    assert find_check(judge(Budget(max_size_kib=10)), "max_size_kib").outcome is Outcome.PASS
    assert find_check(judge(size_bytes=2 * 2**20), "limit.storage_mib").outcome is Outcome.FAIL
    assert find_check(judge(measurement=measurement(peak=65 * 2**20)), "limit.memory_mib").outcome is Outcome.FAIL
    assert find_check(judge(measurement=measurement(peak=None)), "limit.memory_mib").outcome is Outcome.INCONCLUSIVE


def test_an_export_that_differs_from_pytorch_fails():
    verdict = judge(parity={"ok": False, "max_abs_error": None, "tolerance": 1e-3})
    assert find_check(verdict, "parity").outcome is Outcome.FAIL
    assert verdict.outcome is Outcome.FAIL


def test_the_worst_class_decides():
    classes = {
        "0": {"drop": 0.0, "interval": [-0.01, 0.01]},
        "1": {"drop": 0.2, "interval": [0.1, 0.3]},
        "2": {"drop": 0.3, "interval": [0.0, 0.5]},
    }
    check = find_check(judge(Budget(max_class_drop_pp=5), accuracy=accuracy(classes=classes)), "max_class_drop_pp")
    assert check.outcome is Outcome.FAIL
    assert "class 1" in check.reason


def test_a_class_budget_without_scores_by_class_is_inconclusive():
    assert find_check(judge(Budget(max_class_drop_pp=5)), "max_class_drop_pp").outcome is Outcome.INCONCLUSIVE


def test_accuracy_computed_with_a_saturating_instruction_set_is_inconclusive():
    verdict = judge(Budget(max_accuracy_drop_pp=5.0), accuracy=accuracy(unfit="it saturates"))
    check = find_check(verdict, "max_accuracy_drop_pp")
    assert (check.outcome, check.reason) == (Outcome.INCONCLUSIVE, "it saturates")


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 100))
def test_pass_means_that_the_whole_interval_is_within_the_limit(value, below, above, limit):
    check = gate.at_most("x", value, Interval(value - below, value + above), limit, "", "it")
    assert (check.outcome is Outcome.PASS) == (value + above <= limit)
    assert (check.outcome is Outcome.FAIL) == (value - below > limit)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_never_passes(bad):
    assert gate.at_most("x", bad, Interval(0, 0), 1, "", "it").outcome is Outcome.INCONCLUSIVE
    assert gate.at_least("x", 5, Interval(bad, bad), 1, "", "it").outcome is Outcome.INCONCLUSIVE


@pytest.mark.parametrize(
    ("band", "outcome", "relation"),
    [
        ((5.1, 9.0), Outcome.FAIL, "is above the budget 5 ms"),
        ((3.0, 6.0), Outcome.INCONCLUSIVE, "includes the budget 5 ms"),
        ((1.0, 4.9), Outcome.INCONCLUSIVE, "is below the budget 5 ms, but an estimate passes nothing"),
    ],
)
def test_an_estimate_fails_a_budget_that_its_whole_band_exceeds_and_passes_none(band, outcome, relation):
    budget = Budget(max_latency_p95_ms=5.0)
    verdict = judge(budget, measurement=None, teacher=None, estimate=estimate(*band), unmeasured="no device was named")
    check = find_check(verdict, "max_latency_p95_ms")
    assert (check.outcome, check.tier, check.value) == (outcome, "fitted", 4.0)
    assert check.interval == Interval(*band, 0.8)
    assert check.reason is not None
    assert check.reason.startswith("not measured, as no device was named")
    assert relation in check.reason
    assert verdict.outcome is outcome


def test_without_measurement_and_estimate_the_latency_is_unknown_and_says_why():
    why = "no estimate: the work of LSTM cannot be counted"
    check = find_check(judge(Budget(max_latency_p50_ms=5.0), measurement=None, no_estimate=why), "max_latency_p50_ms")
    assert check.outcome is Outcome.INCONCLUSIVE
    assert check.tier is None
    assert check.reason == f"latency is unknown: it was not measured; {why}"


def test_a_measurement_is_judged_although_there_is_an_estimate():
    check = find_check(judge(Budget(max_latency_p95_ms=5.0), estimate=estimate(6.0, 9.0)), "max_latency_p95_ms")
    assert (check.outcome, check.tier) == (Outcome.PASS, None)
