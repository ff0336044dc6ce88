# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

from edgekd.estimate import fit, model
from edgekd.estimate.model import Row, Setting

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "estimates.py"
DEVICES = {"A": (1.0, 1000), "B": (0.5, 2000), "C": (2.0, 1000)}  # slowness at one GHz, MHz
COSTS = (1.0, 0.5, 1.0, 1.0, 10.0, 10.0, 0.02)


def _setting(device, threads="1", runtime="engine"):
    return Setting(device, f"core-{device}", "asimd", DEVICES[device][1], runtime, "fp32", threads)


def _rows(families=8, seed=0, noise=0.0):
    """Return rows of models whose latency follows the regression exactly, but for noise of each row."""
    generator = random.Random(seed)
    rows = []
    for family in range(families):
        for _ in range(3):
            amounts = tuple(math.exp(generator.gauss(center, 1.0)) for center in (5, 4, 2, 3, 2.5, 1, 4))
            for device, (slowness, mhz) in DEVICES.items():
                for threads, speed in (("1", 1.0), ("4", 2.5)):
                    ms = slowness / speed / (mhz / 1000) * sum(cost * amount for cost, amount in zip(COSTS, amounts, strict=True))
                    ms *= math.exp(generator.gauss(0, noise))
                    rows.append(Row(_setting(device, threads), f"family {family}", amounts, ms, "a page: 1"))
    return rows


def test_rows_that_follow_the_regression_are_fitted_exactly_also_in_held_out_families():
    rows = _rows()
    results = fit.held_out(rows, lambda _row, _other: False)
    assert len(results) == len(rows)
    assert {known for _, known, _ in results} == {"setting"}
    assert max(abs(value) for _, _, value in results) < 0.08  # a penalty keeps effects from their exact values


def test_a_held_out_row_comes_from_a_fit_without_its_family_and_without_what_is_omitted():
    rows = _rows()
    slow = [Row(row.setting, row.family, row.amounts, row.ms * (9.0 if row.family == "family 0" else 1.0)) for row in rows]
    residuals = {known: value for row, known, value in fit.held_out(slow, lambda _row, _other: False) if row is slow[0]}
    assert residuals == {"setting": pytest.approx(math.log(9.0), abs=0.08)}  # nothing of it is in its own fit
    known = {known for _, known, _ in fit.held_out(rows, lambda row, other: row.setting.device == other.setting.device)}
    assert known == {"core"}


def test_a_setting_with_few_rows_is_pooled_towards_what_its_parts_say():
    rows = _rows()
    thin = [row for row in rows if row.setting.device != "C" or (row.setting.threads, row.family) == ("1", "family 0")]
    coefficients = fit.fit(thin)
    errors = [abs(fit.residual(coefficients, row)) for row in rows if row.setting == _setting("C", "4")]
    assert max(errors) < 0.35  # four threads were never seen there: the effects of the device and of four threads
    assert coefficients.known(_setting("C", "4")) == "runtime"


def test_one_wrong_row_moves_little():
    rows = _rows()
    wrong = [Row(rows[0].setting, rows[0].family, rows[0].amounts, rows[0].ms * 100), *rows[1:]]
    coefficients = fit.fit(wrong)
    assert max(abs(fit.residual(coefficients, row)) for row in rows if row.setting != rows[0].setting) < 0.15
    assert abs(fit.residual(coefficients, rows[0])) < 0.3


def test_a_start_from_another_fit_only_saves_steps():
    rows = _rows(noise=0.1)
    cold, warm = fit.fit(rows), fit.fit(rows, warm=fit.fit(rows[:60]))
    values = [(cold.log_ms(row.setting, row.amounts), warm.log_ms(row.setting, row.amounts)) for row in rows]
    assert max(abs(first - second) for first, second in values) < 0.03


@pytest.mark.parametrize(("n", "level", "rank"), [(4, 0.8, 4), (9, 0.8, 8), (10, 0.8, 9), (99, 0.8, 80), (19, 0.95, 19)])
def test_the_conformal_quantile_is_the_order_statistic_of_the_definition(n, level, rank):
    """MAPIE 1.6's quantile of absolute residuals is the same: numpy's quantile at ceil((n + 1) * level) / n, "higher"."""
    import numpy as np

    scores = random.Random(n).sample(range(1000), n)
    assert fit.conformal_quantile(scores, level) == sorted(scores)[rank - 1]
    assert fit.conformal_quantile(scores, level) == np.quantile(scores, math.ceil((n + 1) * level - 1e-9) / n, method="inverted_cdf")


def test_too_few_scores_have_an_infinite_quantile():
    assert fit.conformal_quantile([1.0, 2.0, 3.0], 0.8) == math.inf


def test_the_conformal_quantile_covers_a_further_score_as_often_as_it_says():
    generator = random.Random(1)
    draws = [[generator.expovariate(1.0) for _ in range(40)] for _ in range(2000)]
    covered = sum(draw[-1] <= fit.conformal_quantile(draw[:-1], 0.8) for draw in draws) / len(draws)
    assert covered == pytest.approx(0.8, abs=0.03)


def test_a_band_counts_its_rows_and_families():
    rows = _rows()[:10]
    band = fit.band([(row, 0.1 * index) for index, row in enumerate(rows)], model.LEVEL)
    assert (band.rows, band.families) == (10, len({row.family for row in rows}))
    assert band.factor == pytest.approx(math.exp(0.8))


def test_the_benchmark_scores_any_file_with_the_columns(tmp_path):
    generator = random.Random(3)
    names = [f"{family}_{index}" for family in ("resnet", "squeezenet", "vgg", "regnet", "nanodet", "densenet") for index in range(4)]
    macs = {name: math.exp(generator.gauss(6, 0.8)) for name in names}
    columns = ["model", "input_shape", "macs_millions", "params_millions", "source", "note", "dw_macs_millions", "pointwise_macs_millions"]
    columns += ["conv3x3s1_macs_millions", "activation_elements_millions", "n_ops"]
    with (tmp_path / "model_macs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([name, "1x3x224x224", m, 3, "counted", "", 0, m, 0, 8, 60] for name, m in macs.items())
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "device",
                "soc",
                "cores_used",
                "runtime",
                "runtime_version",
                "precision",
                "model",
                "input_shape",
                "latency_ms",
                "source",
                "note",
            ]
        )
        for device, soc, slowness in (("Raspberry Pi 4B", "BCM2711", 0.1), ("Some phone", "SM8550", 0.02)):
            for name, m in macs.items():
                ms = slowness * m * math.exp(generator.gauss(0, 0.1))
                writer.writerow([device, soc, 1, "ncnn", "1", "fp32", name, "1x3x224x224", 2 * ms, "a page", f"min={ms:.4f} max=9"])
        writer.writerow(["Some phone", "SM8550", 1, "ncnn", "1", "fp32", "mystery", "", 5.0, "a page", ""])
    command = [sys.executable, str(BENCHMARK), "--rows", str(tmp_path / "rows.csv")]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
    held_out, shipped = completed.stdout.split("By the coefficients that ship")
    row = next(line for line in held_out.splitlines() if line.startswith("| Raspberry Pi and phones |"))
    _, n, answered, median, p90, covered = (cell.strip().removesuffix(" %") for cell in row.strip("|").split("|"))
    assert (n, answered) == ("49", "98")
    assert float(median) < 20
    assert float(p90) < 50
    assert 60 <= float(covered) <= 100
    for label in ("| ncnn |", "| fp32 |", "| 1 |", "| Raspberry Pi 4B |"):
        assert label in held_out
        assert label in shipped
