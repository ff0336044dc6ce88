# SPDX-License-Identifier: Apache-2.0
"""Get Fashion-MNIST: a folder that is there, else Debian's package without root, else the publisher. Standard library only.

Whatever the way, the uncompressed bytes must have the digests below; Debian only repacks the publisher's files.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

DIGESTS = {  # SHA-256 of the uncompressed content
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
PUBLISHER = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"  # as the README of zalandoresearch/fashion-mnist says
PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
HERE = Path(__file__).parent / "data"


def main() -> int:
    """Get the files unless they are there; return the exit code."""
    given = os.environ.get("EDGEKD_DATA")
    if given:
        return _tell_given(Path(given))
    if not _problems(HERE):
        return 0
    ways: dict[str, Callable[[Path], None]] = {
        f"Debian's package {PACKAGE}, unpacked without root": _from_debian,
        f"the publisher, {PUBLISHER}": _from_publisher,
    }
    if INSTALLED.is_dir():
        ways = {f"{INSTALLED}": lambda folder: _copy(INSTALLED, folder), **ways}
    for name, way in ways.items():
        problem = _try(way)
        if problem is None:
            print(f"fetch: Fashion-MNIST from {name}", file=sys.stderr)
            return 0
        print(f"fetch: not from {name}: {problem}", file=sys.stderr)
    print(f"fetch: name a folder that holds {', '.join(DIGESTS)}: EDGEKD_DATA=/path/to/folder", file=sys.stderr)
    return 1


def _tell_given(folder: Path) -> int:
    problems = _problems(folder)
    for problem in problems:
        print(f"fetch: EDGEKD_DATA={folder}: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _problems(folder: Path) -> list[str]:
    """Return what is wrong with the four files of a folder."""
    found = []
    for name, digest in DIGESTS.items():
        try:
            content = gzip.decompress((folder / name).read_bytes())
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except (OSError, EOFError, zlib.error) as error:
            found.append(f"{name} cannot be read ({error})")
        else:
            if hashlib.sha256(content).hexdigest() != digest:
                found.append(f"{name} has other content than Fashion-MNIST's")
    return found


def _try(way: Callable[[Path], None]) -> str | None:
    """Get the files into a folder of their own, check them, and only then move them to their place."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            way(folder)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            return str(error)
        problems = _problems(folder)
        if problems:
            return "; ".join(problems)
        HERE.mkdir(exist_ok=True)
        _copy(folder, HERE)
    return None


def _copy(source: Path, folder: Path) -> None:
    for name in DIGESTS:
        shutil.copyfile(source / name, folder / name)


def _from_debian(folder: Path) -> None:
    _run(["apt-get", "download", PACKAGE], folder)
    (package,) = folder.glob("*.deb")
    _run(["dpkg", "-x", package.name, "."], folder)
    _copy(folder / INSTALLED.relative_to("/"), folder)


def _run(command: list[str], folder: Path) -> None:
    # fixed commands, looked up where the system keeps them
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    if found.returncode:
        last = (found.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(f"{' '.join(command)}: {last}")


def _from_publisher(folder: Path) -> None:
    for name in DIGESTS:
        with urllib.request.urlopen(PUBLISHER + name, timeout=60) as answer, (folder / name).open("wb") as file:  # noqa: S310  (http, and checked)
            shutil.copyfileobj(answer, file)


if __name__ == "__main__":
    sys.exit(main())
