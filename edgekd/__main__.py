# SPDX-License-Identifier: Apache-2.0
"""The process. An internal error ends with exit code 70, never with 1, which means FAIL."""

from __future__ import annotations

import os
import sys

INTERNAL_ERROR = 70
INTERRUPTED = 130
# OpenMP threads spin this long at a barrier before they sleep: beside other load they would spin in vain, by default for seconds.
# Results are the same. libgomp reads it when torch is loaded; docs/decisions/0012-threads.md
SPIN_COUNT = "2000"


def main() -> None:
    """Run the command line and exit."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    try:
        from edgekd import cli

        code = cli.run(sys.argv[1:])
    except KeyboardInterrupt:
        sys.stderr.write("\nedgekd: interrupted; finished steps are in the cache, and the same command resumes the build\n")
        code = INTERRUPTED
    except Exception:  # noqa: BLE001  (the outermost level: any error here is a bug)
        import traceback

        traceback.print_exc()
        sys.stderr.write("edgekd: internal error; please report it with the lines above\n")
        code = INTERNAL_ERROR
    sys.exit(code)


if __name__ == "__main__":
    main()
