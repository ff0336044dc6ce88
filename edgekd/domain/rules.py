# SPDX-License-Identifier: Apache-2.0
"""Rules for fields of a recipe or a target profile, for ``Annotated``: the reader checks them, the JSON Schema contains them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekd.domain.units import MAX_THREADS

if TYPE_CHECKING:
    from collections.abc import Collection


@dataclass(frozen=True, slots=True)
class Between:
    """A number in ``[low, high]``; ``above`` excludes the lower bound. None is no bound."""

    low: float | None = None
    high: float | None = None
    above: bool = False


Positive = Between(0, above=True)
Threads = Between(1, MAX_THREADS)


@dataclass(frozen=True, slots=True)
class OneOf:
    """A string out of ``choices``; ``what`` names the kind of value in errors (``a scheme``)."""

    what: str
    choices: Collection[str]


@dataclass(frozen=True, slots=True)
class Name:
    """A name that can also name a folder: letters, digits, ``.``, ``_`` and ``-``; a letter or digit first."""


@dataclass(frozen=True, slots=True)
class NonEmpty:
    """A string or an array with at least one item."""


@dataclass(frozen=True, slots=True)
class OrNative:
    """A value that a profile may leave to this machine, as ``native``."""
