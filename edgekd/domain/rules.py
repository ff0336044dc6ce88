# SPDX-License-Identifier: Apache-2.0
"""Rules that a field of a recipe or a target obeys, for ``Annotated``; ``config`` reads them and words the errors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Between:
    """A number in ``[low, high]``; ``above`` excludes the lower end. A bound that is None does not bind."""

    low: float | None = None
    high: float | None = None
    above: bool = False


@dataclass(frozen=True, slots=True)
class OneOf:
    """A string out of ``choices``; ``what`` names the thing in the error (``a scheme``)."""

    what: str
    choices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Name:
    """A name that is also a folder's name: letters, digits, ``.``, ``_`` and ``-``, starting with a letter or digit."""


@dataclass(frozen=True, slots=True)
class NonEmpty:
    """A string or an array with at least one item."""
