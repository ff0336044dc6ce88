# SPDX-License-Identifier: Apache-2.0
"""How long commands take that must feel instant: ``--help``, ``targets``, and a build with nothing to do.

Interleaved with ``python -c pass`` in one run; prints the median of each and its ratio to that bare start.

Usage: python benchmarks/startup.py [RECIPE TARGET ...]   (with a recipe that is already built for these targets)
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

ROUNDS = 15


def main(arguments: list[str]) -> None:
    """Time the commands and print a table."""
    edgekd = [sys.executable, "-m", "edgekd"]
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "edgekd --help": [*edgekd, "--help"],
        "edgekd targets": [*edgekd, "targets"],
    }
    if arguments:
        recipe, *targets = arguments
        names = [part for target in targets for part in ("--target", target)]
        commands["edgekd build (nothing to do)"] = [*edgekd, "build", "--inconclusive-ok", "--recipe", recipe, *names]
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for name, command in commands.items():
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # warm the disk cache
        del name
    for _ in range(ROUNDS):
        for name, command in commands.items():
            begun = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - begun)
    bare = statistics.median(seconds["python -c pass"])
    for name, found in seconds.items():
        middle = statistics.median(found)
        print(f"{name:<32} median {middle:.3f} s  max {max(found):.3f} s  ratio to a bare start {middle / bare:.1f}x  (n = {ROUNDS})")


if __name__ == "__main__":
    main(sys.argv[1:])
