# SPDX-License-Identifier: Apache-2.0
"""A new recipe that can be built: ``edgekd init``."""

from __future__ import annotations

import os
from pathlib import Path

from edgekd.config import schema
from edgekd.errors import UsageError
from edgekd.store.digests import write_atomically

FILES = ("edgekd.toml", "data.py", "models.py")
SCHEMA = "edgekd.schema.json"  # for editors; the first line of the recipe names it
TEMPLATES = Path(__file__).parent / "templates"


def write(folder: Path) -> list[Path]:
    """Write the recipe, its code and its JSON Schema into a folder, and return the paths. No existing file is changed.

    Raises:
        UsageError: if a file exists already, or the folder cannot be written.
    """
    existing = [name for name in (*FILES, SCHEMA) if os.path.lexists(folder / name)]
    if existing:
        names = ", ".join(existing)
        raise UsageError(f"{folder}: has {names} already, and init overwrites nothing; name another folder: edgekd init FOLDER")
    contents = {name: (TEMPLATES / name).read_bytes() for name in FILES} | {SCHEMA: schema.render("recipe").encode()}
    try:
        for name, content in contents.items():
            write_atomically(folder / name, content)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written: {error.strerror}; name another folder: edgekd init FOLDER") from None
    return [folder / name for name in contents]
