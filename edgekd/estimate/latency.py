# SPDX-License-Identifier: Apache-2.0
"""The estimate of a model file's latency on a target: a value, an 80 % band, the tier, and what it rests on.

The tier is ``fitted`` if the rows have the target's device, and ``spec-scaled`` if they have other devices with its core, or its kind of
vector instructions: then the clock scales. A step across runtimes is a term of the regression and has a wider band. So has what the rows do
not cover, by rules that no row can check: a model beyond the largest or smallest, and operators that no row has.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgekd.domain.measurement import Estimate
from edgekd.domain.scheme import DYNAMIC_INT8, FLOAT32, STATIC_INT8
from edgekd.domain.units import ms_to_ns
from edgekd.estimate import model
from edgekd.estimate.features import read_features

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from edgekd.domain.target import Target
    from edgekd.estimate.features import Features
    from edgekd.estimate.model import Coefficients, Setting

FITTED, SPEC_SCALED = "fitted", "spec-scaled"
UNFITTED_FACTOR = 2.0  # a vision transformer of the rows is 2.6 times slower than convolutions of as many MACs
# the rows have no dynamic scheme: between that of the weights and that of the activations
PRECISIONS = {FLOAT32: ("fp32",), STATIC_INT8: ("int8",), DYNAMIC_INT8: ("fp32", "int8")}
# kinds of vector instructions, by the feature that tells them apart, from the most capable
SIMD = {"i8mm": "i8mm", "asimddp": "dot", "asimdhp": "fp16", "asimd": "asimd", "neon": "neon", "avx512_vnni": "vnni", "avx_vnni": "vnni"}
SIMD_X86 = {"avx2": "avx2", "sse4_2": "sse"}


def estimate_file(path: Path, target: Target, runtime: str, scheme: str, threads: Sequence[int]) -> tuple[Estimate, ...] | str:
    """Return the estimates of a model file, one per thread count, or why there are none.

    Raises:
        StageError: if the file has no static shapes.
    """
    features = read_features(path)
    if features.unknown:
        return f"the work of {', '.join(features.unknown)} cannot be counted"
    return estimate(features, target, runtime, scheme, threads)


def estimate(
    features: Features, target: Target, runtime: str, scheme: str, threads: Sequence[int], coefficients: Coefficients | None = None
) -> tuple[Estimate, ...] | str:
    """Return the estimates for features, one per thread count, or why there are none; by the coefficients that ship, or others."""
    coefficients = coefficients or model.load()
    rows_of = coefficients.runtimes.get(runtime)
    if rows_of is None:
        return f"no published latency is of {runtime}"
    if scheme not in PRECISIONS:
        return f"no published latency is of {scheme}"
    estimates = []
    for count in threads:
        settings = [_setting(target, rows_of, precision, count, coefficients) for precision in PRECISIONS[scheme]]
        if any(coefficients.known(setting) == "nothing" for setting in settings):
            return f"no published latency is of a CPU like {target.cpu.core}"
        estimates.append(_combine([_estimate(features, setting, runtime, coefficients) for setting in settings], scheme))
    return tuple(estimates)


def _setting(target: Target, runtime: str, precision: str, threads: int, coefficients: Coefficients) -> Setting:
    """Return the setting of a target, on its own device of the rows if they have it."""
    devices = coefficients.devices.items()
    own = next((name for name, device in devices if target.name in str(device["targets"]).split()), None)
    mhz = target.cpu.mhz if own is None else int(coefficients.devices[own]["mhz"])
    return model.Setting(own, target.cpu.core, _simd(target), mhz, runtime, precision, str(threads))


def _simd(target: Target) -> str:
    features = set(target.cpu.features)
    return next((kind for feature, kind in (SIMD | SIMD_X86).items() if feature in features), "")


def _estimate(features: Features, setting: Setting, runtime: str, coefficients: Coefficients) -> Estimate:
    known = coefficients.known(setting)
    amounts = features.amounts()
    notes = tuple(_notes(features, known, setting, coefficients))
    log_factor = math.log(coefficients.bands[model.band_name(known, setting)].factor)
    log_factor += 0.5 * math.log(_distance(features, coefficients)) + (math.log(UNFITTED_FACTOR) if features.unfitted else 0.0)
    log_ms = coefficients.log_ms(setting, amounts)
    value, low, high = (ms_to_ns(math.exp(log_ms + step)) for step in (0.0, -log_factor, log_factor))
    tier = SPEC_SCALED if known == "core" else FITTED
    return Estimate(runtime, int(setting.threads), value, low, high, model.LEVEL, tier, _provenance(setting, known, coefficients), notes)


def _combine(estimates: Sequence[Estimate], scheme: str) -> Estimate:
    """Return the first estimate, with the band of all and a note that says so."""
    first = estimates[0]
    if len(estimates) == 1:
        return first
    note = f"no published latency is of {scheme}: the band includes those of float32 and of int8"
    low, high = min(item.low_ns for item in estimates), max(item.high_ns for item in estimates)
    return Estimate(
        first.runtime, first.threads, first.value_ns, low, high, first.level, first.tier, first.provenance, (*first.notes, note)
    )


def _provenance(setting: Setting, known: str, coefficients: Coefficients) -> str:
    """Return which rows an estimate rests on."""
    device, runtime = f"device={setting.device}|", f"|runtime={setting.runtime}|"
    groups = coefficients.groups.items()
    if known in {"setting", "few", "runtime"}:
        count = sum(n for name, n in groups if name.startswith(device) and runtime in name)
        exact = coefficients.groups.get(model.group(setting), 0)
        return f"{count} published rows of {setting.runtime} on {setting.device}, {exact} of them with this precision and thread count"
    of_runtime = sum(n for name, n in groups if runtime in name)
    if known == "device":
        count = sum(n for name, n in groups if name.startswith(device))
        return f"{count} published rows of other runtimes on {setting.device}, {of_runtime} of {setting.runtime} on other devices"
    alike = _alike(setting, coefficients)
    count = sum(n for name, n in groups if name.partition("|")[0].removeprefix("device=") in alike)
    plural = "s" if len(alike) > 1 else ""
    return f"{count} published rows of {len(alike)} device{plural} with a CPU like {setting.core}, {of_runtime} of {setting.runtime} on any"


def _alike(setting: Setting, coefficients: Coefficients) -> set[str]:
    """Return the devices of the same core; of the same vector instructions if there are none."""
    same_core = {name for name, device in coefficients.devices.items() if device["core"] == setting.core}
    return same_core or {name for name, device in coefficients.devices.items() if device["simd"] == setting.simd}


def _notes(features: Features, known: str, setting: Setting, coefficients: Coefficients) -> Iterator[str]:
    """Yield what widens the band."""
    if known == "device":
        yield f"the step to {setting.runtime} is estimated from other devices"
    distance = _distance(features, coefficients)
    if distance > 1:
        size = "fewer" if sum(features.macs.values()) / 1e6 < coefficients.ranges["macs"][0] else "more"
        yield f"{distance:.3g} times {size} MACs than any model of the rows"
    if features.unfitted:
        yield f"no model of the rows has {', '.join(features.unfitted)}"


def _distance(features: Features, coefficients: Coefficients) -> float:
    """Return by which factor the MACs of a model are fewer or more than those of all models of the rows; at least 1."""
    smallest, largest = coefficients.ranges["macs"]
    macs = max(sum(features.macs.values()) / 1e6, 1e-6)
    return max(1.0, smallest / macs, macs / largest)
