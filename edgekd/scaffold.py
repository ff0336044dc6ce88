# SPDX-License-Identifier: Apache-2.0
"""A new recipe that runs: ``edgekd init``."""

from __future__ import annotations

import os
from pathlib import Path

from edgekd.errors import UsageError
from edgekd.store.digests import write_atomically

FILES = ("edgekd.toml", "data.py", "models.py")
TEMPLATES = Path(__file__).parent / "templates"


def write(folder: Path) -> list[Path]:
    """Write the recipe and its code into a folder, and return what was written; nothing that is there is touched.

    Raises:
        UsageError: if a file is there already, or the folder cannot be written.
    """
    there = [name for name in FILES if os.path.lexists(folder / name)]
    if there:
        raise UsageError(f"{folder}: has {', '.join(there)} already, and init overwrites nothing; name another folder: edgekd init FOLDER")
    try:
        for name in FILES:
            write_atomically(folder / name, (TEMPLATES / name).read_bytes())
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written: {error.strerror}; name another folder: edgekd init FOLDER") from None
    return [folder / name for name in FILES]
