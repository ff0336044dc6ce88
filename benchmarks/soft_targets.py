# SPDX-License-Identifier: Apache-2.0
"""Benchmark of soft-target storage: rows written and read per second, resident memory, and the error of its estimates.

Synthetic logits (normal, one class raised by up to 16), made in chunks from seeds, are written and then read in random batches,
each row once: as records and as dense logits (``warm``: from the page cache of the system; ``cold``: after dropping it, as far as
the system allows). Writing and reading run in processes of their own on one thread that import numpy and edgekd, and once more
with torch; each reports its peak of resident memory. Making the logits is not timed. Exits with 1 if a bar is missed.

    python benchmarks/soft_targets.py [--samples 1000000] [--classes 1000] [--views 1] [--slots 64] [--batch 128] [--folder .]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from edgekd.kd.soft_targets.storage import Header

MIN_ROWS_PER_S, MAX_MIB = 200_000, 1024
CHUNK = 2048
FILE = "soft_targets"
REPEATS, SPOTS = 2000, 16  # how often each of a few rows is sampled


def make_logits(header: Header, view: int, start: int) -> np.ndarray:
    """Return the logits of one chunk, (m, C) float32."""
    import numpy as np

    generator = np.random.default_rng((view, start))
    count = min(CHUNK, header.samples - start)
    logits = generator.standard_normal((count, header.classes), dtype=np.float32) * 2
    logits[np.arange(count), generator.integers(header.classes, size=count)] += generator.random(count, dtype=np.float32) * 16
    return logits


def recompute(header: Header, view: int, rows: np.ndarray) -> np.ndarray:
    """Return the logits of some rows, made again."""
    import numpy as np

    return np.stack([make_logits(header, view, row // CHUNK * CHUNK)[row % CHUNK] for row in rows.tolist()])


def resident_mib() -> float:
    """Return the peak of resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def make_header(options: argparse.Namespace) -> Header:
    """Return the header of the file."""
    from edgekd.kd.soft_targets import storage

    digests = {"teacher": "1" * 64, "augment": "2" * 64, "data": "3" * 64}
    return storage.make_header("train", (options.views, options.samples, options.classes), slots=options.slots, **digests)


def fill(options: argparse.Namespace) -> dict[str, float]:
    """Fill the file and return the figures."""
    from edgekd.kd.soft_targets import storage

    header, path, seconds = make_header(options), options.folder / "part", 0.0
    start_mib = resident_mib()
    stored_rows = storage.begin(path, header)
    while stored_rows < header.rows:
        logits = make_logits(header, *divmod(stored_rows, header.samples))
        started = time.perf_counter()
        stored_rows = storage.append(path, header, stored_rows, logits)
        seconds += time.perf_counter() - started
    storage.finish(path, header, options.folder / FILE)
    size = (options.folder / FILE).stat().st_size
    return {"rows/s": header.rows / seconds, "file MiB": size / 2**20, "MiB at start": start_mib, "peak MiB": resident_mib()}


def read(options: argparse.Namespace) -> dict[str, float]:
    """Read every row of the file once by each method and return the figures."""
    import numpy as np

    from edgekd.kd.soft_targets import storage

    header, path = make_header(options), options.folder / FILE
    start_mib = resident_mib()
    if options.cold:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    targets = storage.open_expected(path, header, lambda view, rows: recompute(header, view, rows))
    methods = {"sparse rows/s": targets.read_sparse} if header.slots else {}
    figures: dict[str, float] = {}
    for name, read_rows in (methods | {"dense rows/s": targets.read}).items():
        seconds = 0.0
        for view in range(header.views):
            order = np.random.default_rng(view).permutation(header.samples)
            started = time.perf_counter()
            for start in range(0, header.samples, options.batch):
                read_rows(view, order[start : start + options.batch])
            seconds += time.perf_counter() - started
        figures[name] = header.rows / seconds
    return figures | {"MiB at start": start_mib, "peak MiB": resident_mib()}


def errors(options: argparse.Namespace) -> dict[str, str]:
    """Sample a few rows many times; return the errors of one estimate and of the mean, in sums of |difference| over the classes."""
    import numpy as np

    from edgekd.kd.soft_targets import storage

    def softmax(logits: np.ndarray) -> np.ndarray:
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True), dtype=np.float64)
        return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))

    options.views, options.samples = 1, REPEATS * SPOTS
    header, path, lines = make_header(options), options.folder / "errors", {}
    logits = make_logits(header, 0, 0)[:SPOTS]
    stored_rows = storage.begin(path, header)
    while stored_rows < header.rows:
        stored_rows = storage.append(path, header, stored_rows, np.tile(logits, (min(REPEATS, 125), 1)))
    targets = storage.open_expected(path, header)
    for temperature in (1.0, 2.0, 4.0):
        expected = softmax(logits / temperature)
        mean, square, single = np.zeros_like(expected), np.zeros_like(expected), 0.0
        for start in range(0, header.rows, SPOTS):
            estimate = softmax(targets.read(0, range(start, start + SPOTS), temperature) / temperature)
            mean, square = mean + estimate / REPEATS, square + estimate**2 / REPEATS
            single += float(np.abs(estimate - expected).sum(axis=1).mean()) / REPEATS
        chance = np.sqrt(np.maximum(square - mean**2, 0) / REPEATS) * np.sqrt(2 / np.pi)  # of a mean without bias
        top = np.where(expected >= np.sort(expected, axis=1)[:, [-(header.slots or 1)]], expected, 0)
        differences = {"mean": mean - expected, "chance": chance, "top-K": top / top.sum(axis=1, keepdims=True) - expected}
        sums = {name: np.abs(value).sum(axis=1).mean() for name, value in differences.items()}
        lines[f"T = {temperature:.0f}"] = (
            f"one estimate {single:.4f}, mean of {REPEATS} {sums['mean']:.4f} (by chance: {sums['chance']:.4f}), "
            f"only the {header.slots} largest {sums['top-K']:.4f}"
            if header.slots
            else f"{single:.6f}"
        )
    return lines


def run_part(options: argparse.Namespace, part: str, *flags: str) -> dict[str, Any]:
    """Run a part in its own process and return its figures; this process stays small, as a child may inherit its peak."""
    arguments = [f"--{name}={getattr(options, name)}" for name in ("samples", "classes", "views", "batch", "folder")]
    arguments += [] if options.slots is None else [f"--slots={options.slots}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *arguments, *flags, "--part", part]
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
    figures: dict[str, Any] = json.loads(output)
    values = [f"{name} {value:,.0f}" if isinstance(value, float) else f"\n    {name}: {value}" for name, value in figures.items()]
    print(f"{' '.join([part, *flags]):18} {', '.join(values) if part != 'errors' else ''.join(values)}", flush=True)
    return figures


def main() -> int:
    """Run the parts and print."""
    parser = argparse.ArgumentParser()
    for name, default in {"samples": 1_000_000, "classes": 1000, "views": 1, "batch": 128, "slots": None}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--part", choices=("fill", "read", "errors"))
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--torch", action="store_true")
    options = parser.parse_args()
    if options.part:
        import numpy as np  # noqa: F401  (before the first figure of memory)

        if options.torch:
            import torch

            torch.set_num_threads(1)
        print(json.dumps({"fill": fill, "read": read, "errors": errors}[options.part](options)))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        options.folder = Path(folder)
        print(f"{options.views} x {options.samples:,} rows x {options.classes:,} classes, batches of {options.batch}")
        parts = [run_part(options, "fill"), run_part(options, "read"), run_part(options, "read", "--cold")]
        run_part(options, "read", "--torch")
        run_part(options, "errors")
    slow = [name for name, value in parts[1].items() if name.endswith("rows/s") and value < MIN_ROWS_PER_S]
    large = max(part["peak MiB"] for part in parts) >= MAX_MIB
    print(f"bars: {MIN_ROWS_PER_S:,} rows/s read {'missed' if slow else 'met'}, {MAX_MIB} MiB {'missed' if large else 'met'}")
    return int(bool(slow) or large)


if __name__ == "__main__":
    sys.exit(main())
