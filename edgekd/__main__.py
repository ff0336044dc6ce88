# SPDX-License-Identifier: Apache-2.0
"""The process. An internal error ends with exit code 70, never with 1, which means FAIL."""

from __future__ import annotations

import sys

INTERNAL_ERROR = 70
INTERRUPTED = 130


def main() -> None:
    """Run the command line and exit."""
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
