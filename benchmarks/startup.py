# SPDX-License-Identifier: Apache-2.0
"""Start-up time of commands that must feel instant: ``--help``, ``targets``, and a build with nothing to do.

The commands are interleaved with ``python -c pass``. Prints the median of each and its ratio to that bare start.

    python benchmarks/startup.py [RECIPE TARGET ...]    (a recipe that is already built for these targets)
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
    for command in commands.values():
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # warm the disk cache
    for _ in range(ROUNDS):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - started)
    bare = statistics.median(seconds["python -c pass"])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:<32} median {median:.3f} s  max {max(times):.3f} s  ratio to a bare start {median / bare:.1f}x  (n = {ROUNDS})")


if __name__ == "__main__":
    main(sys.argv[1:])
