# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from edgekd.domain.candidate import Candidate, Option
from edgekd.domain.measurement import Measurement
from edgekd.domain.verdict import Outcome
from edgekd.stages.select import select


def measurement(name, ns, threads=1, runtime="litert"):
    return Measurement(name, runtime, "2.3", threads, "d", tuple((ns, ns + 1, ns + 2) for _ in range(8)), 20, 1, 1, 1, {})


def option(name, ns=None, size=1000, outcome=Outcome.PASS, drop=0.1, scheme="static_wi8_ai8", float_ops=0):
    candidate = Candidate(name, "litert", scheme, "ptq", name, f"evaluate/{name}", (1,), {})
    return Option(candidate, size, float_ops, outcome, drop, () if ns is None else (measurement(name, ns),))


def test_the_fastest_within_the_accuracy_budget_ships():
    choice = select([option("a", 3000), option("b", 2000), option("c", 1000, outcome=Outcome.FAIL, drop=9)], 0)
    assert choice.option.candidate.id == "b"
    assert choice.selected_by.startswith("measurement: p50 ")
    assert choice.why_not["c"] == "misses the accuracy budget (drop 9.00 pp)"
    assert choice.why_not["a"].startswith("slower: ")


def test_of_two_equally_fast_candidates_the_smaller_ships():
    choice = select([option("a", 1000, size=2000), option("b", 1000, size=1000)], 0)
    assert choice.option.candidate.id == "b"
    assert choice.why_not["a"].startswith("as fast, and larger")


def test_without_measurements_the_smallest_ships():
    choice = select([option("a", size=2000), option("b", size=1000)], 0)
    assert (choice.option.candidate.id, choice.measurement) == ("b", None)
    assert choice.selected_by.startswith("size: ")


def test_too_many_float_ops_are_refused_with_the_key_that_allows_them():
    choice = select([option("a", 1000, float_ops=3), option("b", 2000)], 0)
    assert choice.option.candidate.id == "b"
    assert choice.why_not["a"] == "3 ops stay float; allow with quantize.max_float_ops = 3"
    assert select([option("a", 1000, float_ops=3), option("b", 2000)], 3).option.candidate.id == "a"


def test_float_ops_of_a_dynamic_scheme_do_not_count():
    assert select([option("a", 1000, float_ops=3, scheme="dynamic_wi8_afp32")], 0).option.candidate.id == "a"


def test_a_candidate_that_passes_is_preferred_to_an_inconclusive_one():
    choice = select([option("a", 1000, outcome=Outcome.INCONCLUSIVE), option("b", 2000)], 0)
    assert choice.option.candidate.id == "b"
    assert "inconclusive" in choice.why_not["a"]


def test_a_candidate_above_the_size_budget_does_not_ship_if_another_is_within_it():
    choice = select([option("a", 1000, size=65 * 1024), option("b", 2000, size=60 * 1024)], 0, 64)
    assert choice.option.candidate.id == "b"
    assert choice.why_not["a"] == "too large: 65.0 KiB exceeds the budget 64 KiB"
    assert select([option("a", 1000, size=65 * 1024)], 0, 64).option.candidate.id == "a"


def test_if_none_is_accurate_enough_the_smallest_drop_is_judged():
    choice = select([option("a", outcome=Outcome.FAIL, drop=9), option("b", outcome=Outcome.FAIL, drop=5)], 0)
    assert choice.option.candidate.id == "b"
    assert "no candidate meets the accuracy budget" in choice.selected_by
    assert set(choice.why_not) == {"a"}
