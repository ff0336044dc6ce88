# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest

from edgekd.estimate import model
from edgekd.estimate.model import Band, Coefficients, Setting

BOARD = Setting("Board", "core-a", "asimd", 2000, "engine", "int8", "4")
AMOUNTS = (300.0, 100.0, 20.0, 10.0, 8.0, 3.0, 60.0)
COEFFICIENTS = Coefficients(
    effects={"all": 0.5, "device=Board": -0.25, "runtime=engine": 0.125, "core=core-b": 3.0},
    costs={"all": [0.0] * 7, "int8, threads": [math.log(2), 0.0, 0.0, 0.0, math.log(10), 0.0, 0.0]},
    slopes=[0.1, -0.2],
    groups={model.group(BOARD): 11},
    devices={"Board": {"core": "core-a", "simd": "asimd", "mhz": 2000, "targets": "some-board"}},
    ranges={"macs": [10.0, 1000.0]},
    bands={"setting, threads": Band(1.4, 30, 5)},
    runtimes={"litert": "engine"},
    sources={"a page": 3},
)


def test_the_logarithm_of_a_latency_is_the_sum_that_the_documentation_states():
    total = 2 * 300 + 100 + 20 + 10 + 10 * 8 + 3 + 60
    operators, intensity = math.log(60) - 4.3, 100 / 430 * (math.log(430 / 8) - 4.2)
    expected = 0.5 - 0.25 + 0.125 - math.log(2) + math.log(total) + 0.1 * operators - 0.2 * intensity
    assert COEFFICIENTS.log_ms(BOARD, AMOUNTS) == pytest.approx(expected)


def test_a_class_of_settings_without_rows_has_the_costs_of_all():
    one = Setting("Board", "core-a", "asimd", 2000, "engine", "fp32", "1")
    total = sum(AMOUNTS)
    difference = COEFFICIENTS.log_ms(BOARD, AMOUNTS) - COEFFICIENTS.log_ms(one, AMOUNTS)
    assert difference == pytest.approx(math.log((total + 300 + 9 * 8) / total))


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({}, "setting"),
        ({"threads": "1"}, "runtime"),
        ({"precision": "fp32"}, "runtime"),
        ({"device": None}, "core"),
        ({"runtime": "other"}, "nothing"),
    ],
)
def test_how_much_the_rows_know_of_a_setting(changes, known):
    fields = ("device", "core", "simd", "mhz", "runtime", "precision", "threads")
    setting = Setting(**{name: changes.get(name, getattr(BOARD, name)) for name in fields})
    assert COEFFICIENTS.known(setting) == known


def test_a_runtime_that_only_other_devices_have_is_a_step_from_those_of_the_device():
    groups = {model.group(BOARD): 11, "device=Other|runtime=other|precision=int8|threads=4": 2}
    setting = Setting("Board", "core-a", "asimd", 2000, "other", "int8", "4")
    assert model.how_known(setting, groups) == "device"
    assert [model.how_known(BOARD, {model.group(BOARD): count}) for count in (10, 11)] == ["few", "setting"]


def test_a_device_without_rows_has_no_effect_of_its_own():
    setting = Setting(None, "core-a", "asimd", 2000, "engine", "int8", "4")
    assert not [term for term in model.terms(setting) if "device" in term]
    assert [term for term in model.terms(BOARD) if term.startswith("device=")][-1] == model.group(BOARD)


def test_coefficients_are_read_back_as_they_were_written(tmp_path):
    path = tmp_path / "coefficients.toml"
    path.write_text(model.dump(COEFFICIENTS))
    read = model.load(path)
    assert read.log_ms(BOARD, AMOUNTS) == pytest.approx(COEFFICIENTS.log_ms(BOARD, AMOUNTS), abs=1e-3)
    assert model.dump(read) == path.read_text()
    assert (read.bands, read.groups, read.devices, read.sources) == (
        COEFFICIENTS.bands,
        COEFFICIENTS.groups,
        COEFFICIENTS.devices,
        COEFFICIENTS.sources,
    )


def test_the_coefficients_that_ship_name_their_sources_and_widen_with_ignorance():
    shipped = model.load()
    assert sum(shipped.sources.values()) == sum(shipped.groups.values()) > 1000
    for threads in ("one thread", "threads"):
        factors = [shipped.bands[f"{known}, {threads}"].factor for known in model.KNOWN[:-1]]
        assert factors == sorted(factors)
        assert 1.1 < factors[0] < factors[-1] < 3
    assert set(shipped.runtimes) == {"litert", "onnxruntime"}
    assert all(any(f"runtime={rows}|" in name for name in shipped.groups) for rows in shipped.runtimes.values())
    assert all(math.exp(cost) > 0 for costs in shipped.costs.values() for cost in costs)
