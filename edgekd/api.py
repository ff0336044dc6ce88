# SPDX-License-Identifier: Apache-2.0
"""Build a whole recipe from a program or a notebook, as ``edgekd build`` does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekd.build.run import Request, build
from edgekd.report import text
from edgekd.store.cache import cache_folder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgekd.build.judge import Result


def build_recipe(
    recipe: Path,
    targets: Sequence[str] = (),
    *,
    out: Path | None = None,
    cache: Path | None = None,
    remeasure: bool = False,
    inconclusive_ok: bool = False,
    devices: Sequence[str] = (),
) -> list[Result]:
    """Build a recipe for its targets, and judge each; progress goes to stderr.

    Args:
        recipe: The file ``edgekd.toml``.
        targets: Names or paths of profiles. By default, those that the recipe names, else ``host``.
        out: The output folder, in which each target gets a folder. By default, ``build`` beside the recipe.
        cache: The folder of completed steps, as ``--cache``.
        remeasure: Measure again, even if there is a cached verdict.
        inconclusive_ok: Ship the model although the verdict is INCONCLUSIVE.
        devices: Devices to measure on, as ``--device``. By default, this machine.

    Returns:
        One result per target: ``document`` is its report (as ``report.json``), ``exit_code`` is 0 for PASS, 1 for FAIL, 4 for INCONCLUSIVE.

    Raises:
        EdgekdError: with the exit code of its class.
    """
    request = Request(
        recipe=recipe,
        targets=tuple(targets),
        out=out or recipe.parent / "build",
        cache=cache_folder(cache),
        remeasure=remeasure,
        inconclusive_ok=inconclusive_ok,
        devices=tuple(devices),
    )
    with text.reporter() as reporter:
        return build(request, reporter)
