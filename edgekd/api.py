# SPDX-License-Identifier: Apache-2.0
"""A whole recipe from a program or a notebook: what ``edgekd build`` does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekd.build import run
from edgekd.report import text
from edgekd.store.cache import cache_folder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def build_recipe(
    recipe: Path,
    targets: Sequence[str] = (),
    *,
    out: Path | None = None,
    cache: Path | None = None,
    remeasure: bool = False,
    inconclusive_ok: bool = False,
) -> list[run.Result]:
    """Build a recipe for its targets, and judge what came out; progress goes to stderr.

    Args:
        recipe: The file ``edgekd.toml``.
        targets: Names of profiles, or their paths; none: those that the recipe names, else ``host``.
        out: Each target gets a folder below it; ``build`` beside the recipe unless it is given.
        cache: The folder of finished steps, as ``--cache``.
        remeasure: Measure anew although the last verdict stands.
        inconclusive_ok: Ship the model although the verdict is INCONCLUSIVE.

    Returns:
        One result a target: ``document`` is its report (as ``report.json``), ``exit_code`` 0 for PASS, 1 FAIL, 4 INCONCLUSIVE.

    Raises:
        EdgekdError: of the class that its exit code asks for.
    """
    request = run.Request(
        recipe=recipe,
        targets=tuple(targets),
        out=out or recipe.parent / "build",
        cache=cache_folder(cache),
        remeasure=remeasure,
        inconclusive_ok=inconclusive_ok,
    )
    with text.reporter() as reporter:
        return run.build(request, reporter)
