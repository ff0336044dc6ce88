# SPDX-License-Identifier: Apache-2.0
"""The regression behind estimates: a sum of costs by operation class, times a factor for the device, runtime, precision and threads.

``log ms = sum of effects - log GHz + log(sum over classes of cost * amount) + slopes * covariates``

The effects are those of the CPU core, the device, the runtime, the precision, the number of threads, and combinations of them. The costs
are those of a class of settings (precision; one thread or more). All are partially pooled (:mod:`edgekd.estimate.fit`), so what few rows
say about one device is close to what all rows say. Coefficients are stored as text, with the rows that they are from.
"""

from __future__ import annotations

import functools
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

COEFFICIENTS = Path(__file__).with_name("coefficients.toml")
LEVEL = 0.8  # of a band

HEAD = (
    "# Coefficients of edgekd's latency estimates: see edgekd/estimate/model.py. Written by benchmarks/estimates.py --write, not by hand.",
    "# Fitted to facts that others published, cited row by row in the file of rows: no row is in here.",
)

# what a model amounts to, in millions; operators as a number
AMOUNTS = ("pointwise_macs", "conv3x3_macs", "depthwise_macs", "other_macs", "activation_elements", "parameters", "operators")
SLOPES = ("operators", "conv3x3_intensity")
TYPICAL_LOG_OPERATORS, TYPICAL_LOG_INTENSITY = 4.3, 4.2  # centres of the covariates: 74 operators, 67 MACs per activation element

# how much of a setting the rows know, from the most to the least; each has its own band
KNOWN = ("setting", "few", "runtime", "device", "core", "nothing")
FEW = 10  # rows of a setting: with so many or fewer, held-out families are further off


@dataclass(frozen=True, slots=True)
class Setting:
    """What a latency depends on besides the model: a device (None: one without rows), its CPU, and how the model is run.

    ``simd`` is the kind of vector instructions (``asimd``, ``dot``, ``i8mm``, ``sse``, ``avx2`` ...). ``threads`` is a number, or
    ``default`` where a source does not name it. ``targets`` are the profiles of the device.
    """

    device: str | None
    core: str
    simd: str
    mhz: int
    runtime: str
    precision: str
    threads: str
    targets: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A published latency in ms of a model of a family, with its amounts (7 numbers, in the order of ``AMOUNTS``) and its source."""

    setting: Setting
    family: str
    amounts: tuple[float, ...]
    ms: float
    source: str = ""


@dataclass(frozen=True, slots=True)
class Band:
    """A conformal band: the factor around the value, and how many held-out residuals of how many families it is from."""

    factor: float
    rows: int
    families: int


@dataclass(frozen=True, slots=True)
class Coefficients:
    """A fitted regression. ``costs`` are logarithms, by class of setting; ``groups`` are the numbers of rows by device and setting."""

    effects: Mapping[str, float]
    costs: Mapping[str, Sequence[float]]
    slopes: Sequence[float]
    groups: Mapping[str, int]
    devices: Mapping[str, Mapping[str, Any]]
    ranges: Mapping[str, Sequence[float]]
    bands: Mapping[str, Band]
    runtimes: Mapping[str, str]
    sources: Mapping[str, int]

    def log_ms(self, setting: Setting, amounts: Sequence[float]) -> float:
        """Return the logarithm of the latency in ms."""
        costs = self.costs.get(cost_class(setting), self.costs["all"])
        total = sum(math.exp(cost) * amount for cost, amount in zip(costs, amounts, strict=True))
        slopes = sum(slope * value for slope, value in zip(self.slopes, covariates(amounts), strict=True))
        return sum(self.effects.get(term, 0.0) for term in terms(setting)) - math.log(setting.mhz / 1000) + math.log(total) + slopes

    def known(self, setting: Setting) -> str:
        """Return how much of a setting the rows know (one of ``KNOWN``): nothing without a row of its runtime, or of a CPU like its own."""
        known = how_known(setting, self.groups)
        is_like = known != "core" or any(setting.core == cpu["core"] or setting.simd == cpu["simd"] for cpu in self.devices.values())
        is_of_runtime = any(f"|runtime={setting.runtime}|" in name for name in self.groups)
        return known if is_like and is_of_runtime else "nothing"


def terms(setting: Setting) -> Iterator[str]:
    """Yield the names of a setting's effects, from what all settings share to what only this one has."""
    yield "all"
    parts = {name: f"{name}={getattr(setting, name)}" for name in ("simd", "core", "device", "runtime", "precision", "threads")}
    known = [name for name in parts if name != "device" or setting.device is not None]
    yield from (parts[name] for name in known)
    pairs = [("simd", "precision"), ("runtime", "precision"), ("device", "precision"), ("device", "threads"), ("device", "runtime")]
    yield from (f"{parts[first]}|{parts[second]}" for first, second in pairs if first in known)
    if setting.device is not None:
        yield group(setting)


def group(setting: Setting) -> str:
    """Return the name of a setting: the effect that it alone has."""
    return f"device={setting.device}|runtime={setting.runtime}|precision={setting.precision}|threads={setting.threads}"


def how_known(setting: Setting, groups: Mapping[str, int]) -> str:
    """Return whether many or few rows are of the setting, or rows are of the runtime on the device, of the device, or only of others."""
    if group(setting) in groups:
        return "setting" if groups[group(setting)] > FEW else "few"
    device = f"device={setting.device}|"
    if any(name.startswith(f"{device}runtime={setting.runtime}|") for name in groups):
        return "runtime"
    return "device" if any(name.startswith(device) for name in groups) else "core"


def cost_class(setting: Setting) -> str:
    """Return the class of settings that share costs: the precision, and one thread or more."""
    return f"{setting.precision}, {threads_class(setting)}"


def threads_class(setting: Setting) -> str:
    """Return whether one thread runs the model, or several."""
    return "one thread" if setting.threads == "1" else "threads"


def band_name(known: str, setting: Setting) -> str:
    """Return the name of the band of a setting of which the rows know so much."""
    return f"{known}, {threads_class(setting)}"


def covariates(amounts: Sequence[float]) -> tuple[float, float]:
    """Return what the costs alone miss: how many operators there are, and how often 3x3 convolutions use each activation.

    A Winograd convolution is the more efficient the more channels it has, that is, the more MACs there are for each activation.
    """
    macs = max(sum(amounts[:4]), 1e-6)
    intensity = math.log(macs / max(amounts[4], 1e-6)) - TYPICAL_LOG_INTENSITY
    return math.log(max(amounts[6], 1)) - TYPICAL_LOG_OPERATORS, amounts[1] / macs * intensity


@functools.cache
def load(path: Path = COEFFICIENTS) -> Coefficients:
    """Return the coefficients in a file."""
    document = tomllib.loads(path.read_text(encoding="utf-8"))
    bands = {name: Band(**band) for name, band in document["bands"].items()}
    fields = ("effects", "costs", "groups", "devices", "ranges", "runtimes", "sources")
    return Coefficients(**{name: document[name] for name in fields}, slopes=document["slopes"], bands=bands)


def dump(coefficients: Coefficients) -> str:
    """Return coefficients as TOML, rounded to four digits behind the point."""
    head = [*HEAD, f"slopes = {_numbers(coefficients.slopes)}  # {', '.join(SLOPES)}"]
    tables = {
        "bands": {
            name: f"{{ factor = {band.factor:.4f}, rows = {band.rows}, families = {band.families} }}"
            for name, band in coefficients.bands.items()
        },
        "runtimes": {name: _text(rows) for name, rows in coefficients.runtimes.items()},
        "sources": {name: str(count) for name, count in coefficients.sources.items()},
        "ranges": {name: _numbers(pair) for name, pair in coefficients.ranges.items()},
        "costs": {name: _numbers(costs) for name, costs in coefficients.costs.items()},
        "devices": {
            name: "{ " + ", ".join(f"{key} = {_text(value) if isinstance(value, str) else value}" for key, value in device.items()) + " }"
            for name, device in coefficients.devices.items()
        },
        "groups": {name: str(count) for name, count in coefficients.groups.items()},
        "effects": {name: f"{value:.4f}" for name, value in coefficients.effects.items() if abs(value) >= 0.5e-4},  # noqa: PLR2004  (rounds to 0)
    }
    comments = {
        "bands": "80 % of the residuals of held-out families lie within this factor",
        "runtimes": "the rows that stand for a runtime of edgekd",
        "sources": "number of rows of each",
        "ranges": "smallest and largest amount in the rows",
        "costs": f"logarithms, of {', '.join(AMOUNTS)}",
        "devices": "as the sources name them",
        "groups": "number of rows",
        "effects": "logarithms; an effect that is not listed is 0",
    }
    for name, table in tables.items():
        head += ["", f"[{name}]  # {comments[name]}", *(f"{_text(key)} = {value}" for key, value in table.items())]
    return "\n".join(head) + "\n"


def _text(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _numbers(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{value:.4f}' for value in values)}]"
