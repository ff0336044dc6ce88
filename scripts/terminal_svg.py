# SPDX-License-Identifier: Apache-2.0
"""Save what a command prints in a terminal as an SVG picture, with its colours.

python scripts/terminal_svg.py docs/demo.svg -- edgekd report build/host
COMMAND | python scripts/terminal_svg.py picture.svg --title COMMAND

The command's stdout is a pseudo-terminal; its stderr (progress) is not part of the picture. Without a command, text with ANSI colours
is read from stdin. The same output gives the same SVG.
"""

# ruff: noqa: INP001  (a program, not a package)

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

ROWS = 50


def main() -> int:
    """Write the picture and return the command's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("svg", type=Path, help="the file to write")
    parser.add_argument("--width", type=int, default=120, help="columns of the terminal (default: 120)")
    parser.add_argument("--title", help="the title of the window (default: the command)")
    parser.add_argument("command", nargs="*", help="the command and its arguments, after --")
    arguments = parser.parse_args()
    exit_code, output = run(arguments.command, arguments.width) if arguments.command else (0, sys.stdin.read())
    shown = [Path(arguments.command[0]).name, *arguments.command[1:]] if arguments.command else []
    prompt = f"$ {shlex.join(shown)}\n" if shown else ""
    arguments.svg.write_text(render(prompt + output, arguments.width, arguments.title or shlex.join(shown) or "terminal"), encoding="utf-8")
    return exit_code


def run(command: Sequence[str], width: int) -> tuple[int, str]:
    """Run a command in a pseudo-terminal and return its exit code and what it printed, with escape sequences."""
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, width, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(width), "LINES": str(ROWS)}
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=terminal, env=environment) as process:
        os.close(terminal)
        chunks = []
        while chunk := _read(reader):
            chunks.append(chunk)
    os.close(reader)
    return process.returncode, b"".join(chunks).decode("utf-8", "replace").replace("\r\n", "\n")


def render(output: str, width: int, title: str) -> str:
    """Return terminal output as SVG; it loads no font from the network."""
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(output.rstrip("\n")))
    return re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title=title), flags=re.DOTALL)


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, 65536)
    except OSError:  # Linux reports the end of a pseudo-terminal as EIO
        return b""


if __name__ == "__main__":
    sys.exit(main())
