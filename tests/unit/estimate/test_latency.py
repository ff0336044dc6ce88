# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

import pytest

from edgekd.config import profiles
from edgekd.domain.scheme import DYNAMIC_INT8, FLOAT32, STATIC_INT8
from edgekd.estimate import latency, model
from edgekd.estimate.features import Features

MOBILENET = Features(  # MobileNetV1, as counted from its published graph
    macs={"pointwise": 539_500_000, "depthwise": 17_400_000, "conv": 10_800_000, "fully_connected": 1_000_000},
    counts={"pointwise": 13, "depthwise": 13, "conv": 1, "fully_connected": 1, "elementwise": 2},
    parameters=4_210_000,
    activation_elements=10_240_000,
    activation_bytes=40_960_000,
    file_bytes=16_900_000,
    unfitted=(),
    unknown=(),
)


def _estimate(target, runtime="litert", scheme=FLOAT32, threads=4, features=MOBILENET):
    estimates = latency.estimate(features, profiles.load_target(target), runtime, scheme, (threads,))
    assert isinstance(estimates, tuple), estimates
    return estimates[0]


def _factor(estimate):
    assert estimate.value_ns**2 == pytest.approx(estimate.low_ns * estimate.high_ns, rel=1e-3)  # the band is the same factor both ways
    return estimate.high_ns / estimate.value_ns


def test_a_board_with_rows_has_a_fitted_estimate_near_what_was_published():
    """XNNPACK prints 72 and 77 ms for the 32-bit and 64-bit system (float32, 4 threads), and 29 and 24 ms (int8) for this network."""
    for scheme, published_ms in ((FLOAT32, 74.5), (STATIC_INT8, 26.5)):
        estimate = _estimate("rpi4", scheme=scheme)
        assert estimate.tier == "fitted"
        assert estimate.level == 0.8
        assert estimate.low_ns < published_ms * 1e6 < estimate.high_ns
        assert _factor(estimate) == pytest.approx(model.load().bands["few, threads"].factor, rel=1e-3)
        assert "published rows of XNNPACK on Raspberry Pi 4B" in estimate.provenance
        assert estimate.notes == ()


def test_a_step_across_runtimes_is_named_and_widens_the_band():
    estimate = _estimate("rpi4", runtime="onnxruntime")
    assert estimate.tier == "fitted"
    assert estimate.notes == ("the step to ONNX Runtime is estimated from other devices",)
    assert _factor(estimate) > _factor(_estimate("rpi4"))
    assert "of other runtimes on Raspberry Pi 4B" in estimate.provenance


def test_a_device_without_rows_is_scaled_from_devices_with_its_core_and_by_its_clock():
    phone = _estimate("pixel8")
    assert phone.tier == "spec-scaled"
    assert "with a CPU like cortex-x3" in phone.provenance
    assert _factor(phone) > _factor(_estimate("rpi4"))
    target = profiles.load_target("pixel8")
    slower = dataclasses.replace(target, cpu=dataclasses.replace(target.cpu, mhz=target.cpu.mhz // 2))
    estimates = latency.estimate(MOBILENET, slower, "litert", FLOAT32, (4,))
    assert estimates[0].value_ns == pytest.approx(2 * phone.value_ns, rel=1e-2)


@pytest.mark.parametrize("name", [name for name in profiles.target_names() if name != "host"])
def test_every_profile_has_an_estimate_for_each_runtime_and_scheme(name):
    target = profiles.load_target(name)
    for entry in target.runtimes:
        for scheme in target.schemes:
            estimates = latency.estimate(MOBILENET, target, entry.name, scheme, entry.threads)
            assert isinstance(estimates, tuple), estimates
            assert [item.threads for item in estimates] == list(entry.threads)
            assert all(0 < item.low_ns < item.value_ns < item.high_ns for item in estimates)


def test_a_dynamic_scheme_has_the_bands_of_float32_and_int8():
    both = [_estimate("rpi4", scheme=scheme) for scheme in (FLOAT32, STATIC_INT8)]
    dynamic = _estimate("rpi4", scheme=DYNAMIC_INT8)
    assert (dynamic.low_ns, dynamic.high_ns) == (min(item.low_ns for item in both), max(item.high_ns for item in both))
    assert dynamic.notes == ("no published latency is of dynamic_wi8_afp32: the band includes those of float32 and of int8",)


def test_a_model_beyond_the_rows_has_a_wider_band_that_says_so():
    small = dataclasses.replace(MOBILENET, macs={"pointwise": 110_000})
    estimate = _estimate("rpi4", features=small)
    assert estimate.notes == ("100 times fewer MACs than any model of the rows",)
    assert _factor(estimate) == pytest.approx(10 * _factor(_estimate("rpi4")), rel=1e-3)
    large = _estimate("rpi4", features=dataclasses.replace(MOBILENET, macs={"pointwise": 642_000_000_000}))
    assert large.notes == ("10 times more MACs than any model of the rows",)


def test_operators_that_no_row_has_widen_the_band_and_are_named():
    estimate = _estimate("rpi4", features=dataclasses.replace(MOBILENET, unfitted=("LayerNormalization", "MatMul")))
    assert estimate.notes == ("no model of the rows has LayerNormalization, MatMul",)
    assert _factor(estimate) == pytest.approx(2 * _factor(_estimate("rpi4")), rel=1e-3)


def test_there_is_no_estimate_where_nothing_is_known_and_it_says_why(monkeypatch, tmp_path):
    target = profiles.load_target("rpi4")
    assert latency.estimate(MOBILENET, target, "toy", FLOAT32, (1,)) == "no published latency is of toy"
    assert latency.estimate(MOBILENET, target, "litert", "float16", (1,)) == "no published latency is of float16"
    strange = dataclasses.replace(target, name="own", cpu=dataclasses.replace(target.cpu, core="m7", features=("dsp",)))
    assert latency.estimate(MOBILENET, strange, "litert", FLOAT32, (1,)) == "no published latency is of a CPU like m7"
    monkeypatch.setattr(latency, "read_features", lambda path: dataclasses.replace(MOBILENET, unknown=("LSTM",)))
    assert latency.estimate_file(tmp_path, target, "litert", FLOAT32, (1,)) == "the work of LSTM cannot be counted"


def test_a_profile_of_a_user_with_the_core_of_a_board_is_not_that_board():
    target = dataclasses.replace(profiles.load_target("rpi4"), name="camera")
    estimates = latency.estimate(MOBILENET, target, "litert", FLOAT32, (4,))
    assert estimates[0].tier == "spec-scaled"
    assert "with a CPU like cortex-a72" in estimates[0].provenance
