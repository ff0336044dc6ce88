# SPDX-License-Identifier: Apache-2.0
"""The process. An internal error ends with exit code 70, never with 1, which means FAIL."""

from __future__ import annotations

import io
import os
import sys

INTERNAL_ERROR = 70
INTERRUPTED = 130
STDERR = 2


def main() -> None:
    """Run the command line and exit."""
    _open_standard_streams()
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


def _open_standard_streams() -> None:
    """Open standard streams that are closed: else the next file would get their number, and all that is printed with it."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        os.set_inheritable(number, True)  # noqa: FBT003  (the name says it)
    os.close(number)
    sys.stdin, sys.stdout, sys.stderr = (
        stream or os.fdopen(number, mode) for stream, number, mode in ((sys.stdin, 0, "r"), (sys.stdout, 1, "w"), (sys.stderr, STDERR, "w"))
    )
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="backslashreplace")  # a file name need not be valid in any encoding


if __name__ == "__main__":
    main()
