# SPDX-License-Identifier: Apache-2.0
"""Get Fashion-MNIST from a local folder, Debian's package (without root) or the publisher. Standard library only.

Whatever the source, the uncompressed bytes must have the digests below; Debian only repacks the publisher's files.
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
PUBLISHER = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"  # as in the README of zalandoresearch/fashion-mnist
PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
DATA = Path(__file__).parent / "data"


def main() -> int:
    """Get the files unless they exist; return the exit code."""
    folder = os.environ.get("EDGEKD_DATA")
    if folder:
        return _check_folder(Path(folder))
    if not _problems(DATA):
        return 0
    sources: dict[str, Callable[[Path], None]] = {
        f"Debian's package {PACKAGE}, unpacked without root": _from_debian,
        f"the publisher, {PUBLISHER}": _from_publisher,
    }
    if INSTALLED.is_dir():
        sources = {f"{INSTALLED}": lambda folder: _copy(INSTALLED, folder), **sources}
    for name, source in sources.items():
        problem = _try(source)
        if problem is None:
            print(f"fetch: Fashion-MNIST from {name}", file=sys.stderr)
            return 0
        print(f"fetch: {name} failed: {problem}", file=sys.stderr)
    print(f"fetch: no source worked; name a folder that holds {', '.join(DIGESTS)}: EDGEKD_DATA=/path/to/folder", file=sys.stderr)
    return 1


def _check_folder(folder: Path) -> int:
    problems = _problems(folder)
    for problem in problems:
        print(f"fetch: EDGEKD_DATA={folder}: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _problems(folder: Path) -> list[str]:
    """Return what is wrong with the four files of a folder."""
    problems = []
    for name, digest in DIGESTS.items():
        try:
            content = gzip.decompress((folder / name).read_bytes())
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except (OSError, EOFError, zlib.error) as error:
            problems.append(f"{name} cannot be read ({error})")
        else:
            if hashlib.sha256(content).hexdigest() != digest:
                problems.append(f"{name}: its content is not Fashion-MNIST's (SHA-256 differs)")
    return problems


def _try(source: Callable[[Path], None]) -> str | None:
    """Get the files into a temporary folder, check them, and then copy them to ``data/``; return the problem, if any."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            source(folder)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            return str(error)
        problems = _problems(folder)
        if problems:
            return "; ".join(problems)
        DATA.mkdir(exist_ok=True)
        _copy(folder, DATA)
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
    # fixed commands, looked up on PATH
    completed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    if completed.returncode:
        last = (completed.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(f"{' '.join(command)}: {last}")


def _from_publisher(folder: Path) -> None:
    for name in DIGESTS:
        with urllib.request.urlopen(PUBLISHER + name, timeout=60) as response, (folder / name).open("wb") as file:  # noqa: S310  (http, and the digest is checked)
            shutil.copyfileobj(response, file)


if __name__ == "__main__":
    sys.exit(main())
