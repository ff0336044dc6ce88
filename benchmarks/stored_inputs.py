# SPDX-License-Identifier: Apache-2.0
"""Stored pictures: how much smaller compact files are than plain ones, and how long a step takes to load them.

20,000 pictures of 8 bits (3x32x32) as float32, each channel normalized by its own mean and deviation. Loading is interleaved: ``compact``
reads a compact file, ``plain`` the file that ``numpy.save`` writes, both from the page cache (a disk has to read four times as much of
the plain file). Prints the sizes, how long it takes to compact a file once, and the median ratio of neighbouring loads, in
CPU time, with its interval. Exits with 1 above the bars.

    python benchmarks/stored_inputs.py [rounds]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from operator import truediv
from pathlib import Path

import numpy as np
from distill_step import median_interval

from edgekd.store import arrays

COUNT, ROUNDS = 20_000, 21
BAR_SIZE, BAR_SECONDS = 0.26, 2.5  # of a plain file's; a step that trains on these pictures takes hundreds of times as long as a load


def main() -> int:
    """Compare and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 3, 32, 32), dtype=np.uint8)
    mean, deviation = np.float32([[[0.491]], [[0.482]], [[0.447]]]), np.float32([[[0.247]], [[0.243]], [[0.262]]])
    pictures = (pixels / np.float32(255) - mean) / deviation
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.npy" for name in ("compact", "plain")}
        for path in paths.values():
            np.save(path, pictures)
        started = time.process_time()
        arrays.compact(paths["compact"])
        once = time.process_time() - started
        sizes = {name: path.stat().st_size for name, path in paths.items()}
        seconds: dict[str, list[float]] = {name: [] for name in paths}
        for number in range(rounds):
            for name in list(paths) if number % 2 else reversed(list(paths)):
                started = time.process_time()
                array = arrays.open_array(paths[name]).load()
                seconds[name].append(time.process_time() - started)
                if array.tobytes() != pictures.tobytes():
                    raise SystemExit(f"{name}: other bits")
    ratio = sizes["compact"] / sizes["plain"]
    print(f"size: {sizes['plain'] / 2**20:.1f} MiB plain, {sizes['compact'] / 2**20:.1f} MiB compact: {ratio:.3f}, bar {BAR_SIZE}")
    print(
        f"compacting, once: {once:.2f} s; loading: "
        + ", ".join(f"{name} {statistics.median(item):.3f} s" for name, item in seconds.items())
    )
    median, low, high = median_interval(list(map(truediv, seconds["compact"], seconds["plain"])))
    print(f"compact / plain: {median:.3f} [{low:.3f}, {high:.3f}], bar {BAR_SECONDS}")
    return int(ratio > BAR_SIZE or median > BAR_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
