# SPDX-License-Identifier: Apache-2.0
"""Errors of latency estimates on published rows, with whole model families held out, and the fit of the coefficients that ship.

Scores every row of a CPU by a regression that has not been fitted to any row of its model's family. Its band is conformal: the residuals
are those of the other families, each held out in turn from what remains. Rows whose runtime no other row has are not answered, nor are
rows of models that are not in the tables. Prints the median and the 90th percentile of the relative error, the share of rows
within the 80 % band, and the share answered, for boards and phones, and by device, runtime, threads and precision. Then the same rows
scored by the coefficients that ship, whose rows may include them.

    python benchmarks/estimates.py --rows FILE [--macs FILE] [--fit-rows FILE] [--average] [--write FILE]
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import published_rows

from edgekd.estimate import fit, model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from edgekd.estimate.model import Band, Coefficients, Row

BOARDS = ("Raspberry Pi",)
PHONES = ("phone", "Pixel", "Xiaomi", "Huawei", "Galaxy", "Oppo", "Redmi", "QRD")
MIN_RESIDUALS = 30  # of a band; with fewer, those of everything that is known no better count too
RUNTIMES = {"litert": "XNNPACK", "onnxruntime": "ONNX Runtime"}


@dataclass(frozen=True, slots=True)
class Score:
    """A row's device, runtime, threads and precision, and its log residual and the log of its band's factor; None if not answered."""

    device: str
    runtime: str
    threads: str
    precision: str
    residual: float | None
    log_factor: float = math.inf


def kind(device: str) -> str:
    """Return whether a device is a Raspberry Pi, a phone, or something else."""
    return "Raspberry Pi" if device.startswith(BOARDS) else "phones" if any(name in device for name in PHONES) else "others"


def score(row: Row, coefficients: Coefficients, bands: Callable[[Row, str], Band]) -> Score:
    """Return the score of a row by coefficients; not answered if they know nothing of its runtime or CPU."""
    setting, known = row.setting, coefficients.known(row.setting)
    labels = (setting.device or "", setting.runtime, setting.threads, setting.precision)
    if known == "nothing":
        return Score(*labels, None)
    return Score(*labels, fit.residual(coefficients, row), math.log(bands(row, known).factor))


def held_out_scores(rows: Sequence[Row], fit_rows: Sequence[Row]) -> list[Score]:
    """Return the scores of rows, each by a fit without its family and with bands from the families that remain."""
    scores = []
    families = sorted({row.family for row in rows})
    for index, family in enumerate(families):
        print(f"\rfamily {index + 1} of {len(families)}", end="", file=sys.stderr, flush=True)
        remaining = [row for row in fit_rows if row.family != family]
        residuals = fit.held_out(remaining, lambda _row, _other: False)
        coefficients = fit.fit(remaining)
        scores += [
            score(row, coefficients, lambda row, known, pool=residuals: _band(row, known, pool)) for row in rows if row.family == family
        ]
    print("\r", end="", file=sys.stderr)
    return scores


def _band(row: Row, known: str, residuals: Sequence[tuple[Row, str, float]]) -> Band:
    """Return the band for a row: from residuals of rows that are known as well and run as many threads."""
    threads = model.threads_class(row.setting)
    alike = [(item, value) for item, level, value in residuals if level == known and model.threads_class(item.setting) == threads]
    if len(alike) < MIN_RESIDUALS:
        weaker = model.KNOWN[max(model.KNOWN.index(known), 1) :]  # what is known worse than the very setting
        alike = [(item, value) for item, level, value in residuals if level in weaker and level != "nothing"]
    return fit.band(alike, model.LEVEL)


def fitted_with_bands(rows: Sequence[Row]) -> Coefficients:
    """Return the coefficients to ship: fitted to all rows, with a band for each degree of what is known."""
    omissions: tuple[Callable[[Row, Row], bool], ...] = (
        lambda _row, _other: False,
        lambda row, other: model.group(other.setting) == model.group(row.setting),
        lambda row, other: (other.setting.device, other.setting.runtime) == (row.setting.device, row.setting.runtime),
        lambda row, other: other.setting.device == row.setting.device,
    )
    residuals: dict[str, list[tuple[Row, float]]] = defaultdict(list)
    degrees = (("setting", "few"), ("runtime",), ("device",), ("core",))
    for degree, omit in zip(degrees, omissions, strict=True):
        for row, known, value in fit.held_out(rows, omit):
            if known in degree:
                residuals[model.band_name(known, row.setting)].append((row, value))
        print(f"bands: {degree[0]} is done", file=sys.stderr)
    coefficients = fit.fit(rows)
    bands = {name: fit.band(items, model.LEVEL) for name, items in sorted(residuals.items())}
    for threads in ("one thread", "threads"):
        widest = 1.0
        for name in (f"{known}, {threads}" for known in model.KNOWN):
            if name in bands:  # knowing less never narrows a band
                widest = max(widest, bands[name].factor)
                bands[name] = replace(bands[name], factor=widest)
    return replace(coefficients, bands=bands, runtimes=RUNTIMES)


def describe(name: str, scores: Sequence[Score]) -> str:
    """Return a line of a Markdown table."""
    answered = [item for item in scores if item.residual is not None]
    if not scores:
        return f"| {name} | 0 | | | | |"
    share = f"{100 * len(answered) / len(scores):.0f} %"
    if not answered:
        return f"| {name} | {len(scores)} | {share} | | | |"
    errors = sorted(abs(math.expm1(-item.residual)) for item in answered if item.residual is not None)
    p90 = errors[math.ceil(0.9 * len(errors)) - 1]
    covered = sum(abs(item.residual) <= item.log_factor for item in answered if item.residual is not None) / len(answered)
    return f"| {name} | {len(scores)} | {share} | {100 * statistics.median(errors):.1f} % | {100 * p90:.1f} % | {100 * covered:.0f} % |"


def report(title: str, scores: Sequence[Score]) -> None:
    """Print the tables of some scores."""
    head = "| rows | n | answered | median error | p90 error | within the 80 % band |\n| --- | --- | --- | --- | --- | --- |"
    portable = [item for item in scores if kind(item.device) != "others"]
    print(f"\n{title}\n\n{head}")
    print(describe("Raspberry Pi and phones", portable))
    for name in ("Raspberry Pi", "phones", "others"):
        print(describe(name, [item for item in scores if kind(item.device) == name]))
    for column in ("precision", "threads", "runtime", "device"):
        print(f"\nRaspberry Pi and phones, by {column}\n\n{head}")
        groups = defaultdict(list)
        for item in portable:
            groups[getattr(item, column)].append(item)
        for name, items in sorted(groups.items(), key=lambda pair: -len(pair[1])):
            print(describe(name, items))


def unanswered(records: Iterable[dict[str, str]]) -> list[Score]:
    """Return the scores of records that have no amounts."""
    return [
        Score(
            item["device"],
            published_rows.RUNTIMES.get(item["runtime"], item["runtime"]),
            published_rows.threads(item),
            item["precision"].split(" ")[0],
            None,
        )
        for item in records
    ]


def main() -> None:
    """Score rows and, on request, write coefficients."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=Path, help="CSV of latencies to score; without it, nothing is")
    parser.add_argument("--macs", type=Path, help="CSV of the models' MACs; model_macs.csv beside the rows by default")
    parser.add_argument("--fit-rows", type=Path, help="CSV of latencies to fit to; the rows themselves by default")
    parser.add_argument("--average", action="store_true", help="score the column latency_ms, not the smallest latency in the notes")
    parser.add_argument("--write", type=Path, help="fit to all rows, and write the coefficients that ship")
    arguments = parser.parse_args()
    if arguments.rows is None:
        print("no rows: published latencies are not part of this project; name a CSV of them with --rows FILE")
        return
    macs = arguments.macs or arguments.rows.with_name("model_macs.csv")
    rows, unknown, excluded = published_rows.read_rows(arguments.rows, macs, average=arguments.average)
    if arguments.write:
        arguments.write.write_text(model.dump(fitted_with_bands(rows)), encoding="utf-8")
        return
    print(f"{len(rows)} rows with amounts, {len(unknown)} without; left out: {excluded}")
    fit_rows = published_rows.read_rows(arguments.fit_rows, macs)[0] if arguments.fit_rows else rows
    report("Families held out", held_out_scores(rows, fit_rows) + unanswered(unknown))
    shipped = model.load()
    shipped_scores = [score(row, shipped, lambda row, known: shipped.bands[model.band_name(known, row.setting)]) for row in rows]
    report(f"By the coefficients that ship ({sum(shipped.sources.values())} rows)", shipped_scores + unanswered(unknown))


if __name__ == "__main__":
    main()
