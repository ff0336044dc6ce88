# SPDX-License-Identifier: Apache-2.0
"""What the store of a teacher's answers costs: rows a second filled and read, resident memory, and how far its estimates are off.

Synthetic logits (normal, one class raised by up to 16), made in chunks from seeds, are written as they come and read back in random
batches, each row once: as records and as dense logits (``warm``: from the system's page cache; ``cold``: the cache dropped first,
as far as the system lets it). Filling and reading are processes of their own on one thread that import numpy and edgekd, then again
with torch; each tells its peak of resident memory. Making the logits is not timed. Ends with 1 if a bar is missed.

    python benchmarks/answers.py [--samples 1000000] [--classes 1000] [--views 1] [--slots 64] [--batch 128] [--folder .]
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

BAR_ROWS, BAR_MIB = 200_000, 1024  # a second; resident
CHUNK = 2048
REPEATS, SPOTS = 2000, 16  # how often each of a few rows is drawn anew


def made(header: Header, view: int, start: int) -> np.ndarray:
    """Return the teacher's answers to one chunk, (m, C) float32."""
    import numpy as np

    generator = np.random.default_rng((view, start))
    count = min(CHUNK, header.samples - start)
    logits = generator.standard_normal((count, header.classes), dtype=np.float32) * 2
    logits[np.arange(count), generator.integers(header.classes, size=count)] += generator.random(count, dtype=np.float32) * 16
    return logits


def again(header: Header, view: int, rows: np.ndarray) -> np.ndarray:
    """Return the answers to some rows, asked anew."""
    import numpy as np

    return np.stack([made(header, view, row // CHUNK * CHUNK)[row % CHUNK] for row in rows.tolist()])


def resident_mib() -> float:
    """Return the peak of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def planned(given: argparse.Namespace) -> Header:
    """Return the header of the file."""
    from edgekd.kd.soft_targets import storage

    digests = {"teacher": "1" * 64, "augment": "2" * 64, "data": "3" * 64}
    return storage.make_header("train", (given.views, given.samples, given.classes), slots=given.slots, **digests)


def fill(given: argparse.Namespace) -> dict[str, float]:
    """Fill the file and return the figures."""
    from edgekd.kd.soft_targets import storage

    header, path, spent = planned(given), given.folder / "part", 0.0
    before = resident_mib()
    done = storage.begin(path, header)
    while done < header.rows:
        logits = made(header, *divmod(done, header.samples))
        started = time.perf_counter()
        done = storage.append(path, header, done, logits)
        spent += time.perf_counter() - started
    storage.finish(path, header, given.folder / "answers")
    size = (given.folder / "answers").stat().st_size
    return {"rows/s": header.rows / spent, "file MiB": size / 2**20, "MiB before": before, "peak MiB": resident_mib()}


def read(given: argparse.Namespace) -> dict[str, float]:
    """Read every row of the file once in each way and return the figures."""
    import numpy as np

    from edgekd.kd.soft_targets import storage

    header, path = planned(given), given.folder / "answers"
    before = resident_mib()
    found: dict[str, float] = {}
    if given.cold:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    targets = storage.open_expected(path, header, lambda view, rows: again(header, view, rows))
    ways = {"sparse rows/s": targets.read_sparse} if header.slots else {}
    for name, mode in (ways | {"dense rows/s": targets.read}).items():
        spent = 0.0
        for view in range(header.views):
            order = np.random.default_rng(view).permutation(header.samples)
            started = time.perf_counter()
            for start in range(0, header.samples, given.batch):
                mode(view, order[start : start + given.batch])
            spent += time.perf_counter() - started
        found[name] = header.rows / spent
    return found | {"MiB before": before, "peak MiB": resident_mib()}


def errors(given: argparse.Namespace) -> dict[str, str]:
    """Draw a few rows often, and return how far one estimate and the mean of all are off, in sums of |difference| over the classes."""
    import numpy as np

    from edgekd.kd.soft_targets import storage

    def softmax(logits: np.ndarray) -> np.ndarray:
        shares = np.exp(logits - logits.max(axis=1, keepdims=True), dtype=np.float64)
        return np.asarray(shares / shares.sum(axis=1, keepdims=True))

    given.views, given.samples = 1, REPEATS * SPOTS
    header, path, told = planned(given), given.folder / "errors", {}
    logits = made(header, 0, 0)[:SPOTS]
    done = storage.begin(path, header)
    while done < header.rows:
        done = storage.append(path, header, done, np.tile(logits, (min(REPEATS, 125), 1)))
    targets = storage.open_expected(path, header)
    for temperature in (1.0, 2.0, 4.0):
        wanted = softmax(logits / temperature)
        mean, square, single = np.zeros_like(wanted), np.zeros_like(wanted), 0.0
        for start in range(0, header.rows, SPOTS):
            shares = softmax(targets.read(0, range(start, start + SPOTS), temperature) / temperature)
            mean, square = mean + shares / REPEATS, square + shares**2 / REPEATS
            single += float(np.abs(shares - wanted).sum(axis=1).mean()) / REPEATS
        chance = np.sqrt(np.maximum(square - mean**2, 0) / REPEATS) * np.sqrt(2 / np.pi)  # of a mean without bias
        top = np.where(wanted >= np.sort(wanted, axis=1)[:, [-(header.slots or 1)]], wanted, 0)
        off = {"mean": mean - wanted, "chance": chance, "top-K": top / top.sum(axis=1, keepdims=True) - wanted}
        sums = {name: np.abs(value).sum(axis=1).mean() for name, value in off.items()}
        told[f"T = {temperature:.0f}"] = (
            f"one estimate {single:.4f}, mean of {REPEATS} {sums['mean']:.4f} (chance alone: {sums['chance']:.4f}), "
            f"the {header.slots} largest alone {sums['top-K']:.4f}"
            if header.slots
            else f"{single:.6f}"
        )
    return told


def child(given: argparse.Namespace, part: str, *flags: str) -> dict[str, Any]:
    """Run a part in a process of its own and return its figures; this one stays small, for a child may inherit its peak."""
    options = [f"--{name}={getattr(given, name)}" for name in ("samples", "classes", "views", "batch", "folder")]
    options += [] if given.slots is None else [f"--slots={given.slots}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, *options, *flags, "--part", part], env=environment, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    values = [f"{name} {value:,.0f}" if isinstance(value, float) else f"\n    {name}: {value}" for name, value in found.items()]
    print(f"{' '.join([part, *flags]):18} {', '.join(values) if part != 'errors' else ''.join(values)}", flush=True)
    return found


def main() -> int:
    """Run the parts and print."""
    parser = argparse.ArgumentParser()
    for name, default in {"samples": 1_000_000, "classes": 1000, "views": 1, "batch": 128, "slots": None}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--part", choices=("fill", "read", "errors"))
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--torch", action="store_true")
    given = parser.parse_args()
    if given.part:
        import numpy as np  # noqa: F401  (before the first figure of memory)

        if given.torch:
            import torch

            torch.set_num_threads(1)
        print(json.dumps({"fill": fill, "read": read, "errors": errors}[given.part](given)))
        return 0
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        given.folder = Path(folder)
        print(f"{given.views} x {given.samples:,} rows x {given.classes:,} classes, batches of {given.batch}")
        parts = [child(given, "fill"), child(given, "read"), child(given, "read", "--cold")]
        child(given, "read", "--torch")
        child(given, "errors")
    slow = [name for name, value in parts[1].items() if name.endswith("rows/s") and value < BAR_ROWS]
    large = max(part["peak MiB"] for part in parts) >= BAR_MIB
    print(f"bars: {BAR_ROWS:,} rows/s read {'missed' if slow else 'met'}, {BAR_MIB} MiB {'missed' if large else 'met'}")
    return int(bool(slow) or large)


if __name__ == "__main__":
    sys.exit(main())
