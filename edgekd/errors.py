# SPDX-License-Identifier: Apache-2.0
"""All errors that a user can act on, as a tree of classes; each class has the exit code of the process.

EdgekdError                     5
|-- UsageError                  2   the command line or an output path
|   |-- RecipeError             2   the recipe, a target profile, the data or the user's code
|-- UnavailableError            3   a named device cannot be reached; a runtime or a tool is missing
|-- StageError                  5   a stage failed
    |-- StorageError            5   the cache or the output folder cannot be written or read
    |-- OutOfMemoryError        5   a step needs more memory than there is
    |-- ProcessDiedError        5   the process of a step ended before its result
    |-- HarnessError            5   a process that measures a model file failed

A message has five parts: what failed, where, the actual value (with its unit), what is allowed, the next command.
Lower case, no full stop at its end. PASS is 0, FAIL 1, INCONCLUSIVE 4 (domain.verdict); 70 is an internal error
and 130 an interrupt (``__main__``).
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_CHARACTERS = 2000  # of one text of others in a report
_LINE_BREAK = re.compile(r" *[\t\n\v\f\r][ \t\n\v\f\r]*")


class EdgekdError(Exception):
    """Base of all errors that a user can act on."""

    exit_code: ClassVar[int] = 5


class UsageError(EdgekdError):
    """The command line or an output path cannot be used."""

    exit_code: ClassVar[int] = 2


class RecipeError(UsageError):
    """The recipe, a target profile, the data or the user's code is wrong.

    Args:
        problems: One line each; all problems, not only the first.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class UnavailableError(EdgekdError):
    """A device that was named cannot be reached, or a runtime or a tool is missing."""

    exit_code: ClassVar[int] = 3


class StageError(EdgekdError):
    """A stage failed. ``temporary``: memory or time ran out, so the same step may succeed in another build."""

    temporary = False


class StorageError(StageError):
    """The cache or the output folder cannot be written or read."""


class OutOfMemoryError(StageError):
    """A step needs more memory than there is."""

    temporary = True


class ProcessDiedError(StageError):
    """The process of a step ended before its result: native code, the user's code, a lack of memory or a time limit ended it.

    Args:
        name: The step.
        reason: How it ended, in one line without the step's name.
        in_user_code: Whether the user's code was running.
        temporary: Whether the same step may end normally in another build.
    """

    def __init__(self, name: str, reason: str, *, in_user_code: bool, temporary: bool = False) -> None:
        super().__init__(f"{name}: {reason}")
        self.reason, self.in_user_code, self.temporary = reason, in_user_code, temporary


class HarnessError(StageError):
    """The process that measures one model file ended or did not reply.

    Args:
        subject: The id of the model file in the job.
        reason: What happened.
    """

    def __init__(self, subject: str, reason: str) -> None:
        super().__init__(f"measure: {subject}: {reason}")
        self.subject = subject


def printable(text: str, limit: int = 500) -> str:
    r"""Return text of others (an exception, a file name, a class label, what a process printed) in one line, cut.

    Control characters could change what a terminal shows, so they are escaped; a line break becomes a space.

    >>> printable("a\x1b[2Jb\u202ec\n  d\n")
    'a\\x1b[2Jb\\u202ec d'
    """
    shown = text[: 4 * limit]
    if not shown.isascii() or not shown.isprintable():
        shown = "".join(letter if _is_printable(letter) else _escape(letter) for letter in _LINE_BREAK.sub(" ", shown))
    is_whole = len(shown) <= limit and len(text) <= 4 * limit
    return shown.rstrip() if is_whole else f"{shown[:limit]}... ({len(text):,} characters)"


def _is_printable(letter: str) -> bool:
    return letter.isprintable() or unicodedata.category(letter) == "Zs"


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape", "surrogatepass").decode()


def describe_unexpected(error: BaseException) -> str:
    """Return the type, the text and the line of edgekd of an exception that nothing expects: ``TypeError: ... (at kd/data.py:173)``."""
    import traceback

    package = Path(__file__).parent
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(package)]
    place = f" (at {Path(frames[-1].filename).relative_to(package)}:{frames[-1].lineno})" if frames else ""
    return f"{printable(f'{type(error).__name__}: {error}')}{place}"


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for a near miss, else the empty string."""
    matches = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f" (did you mean '{matches[0]}'?)" if matches else ""


def expected_one_of(name: str, allowed: Iterable[str]) -> str:
    """Return ``expected one of a, b, c`` with a suggestion for a near miss."""
    names = sorted(allowed)
    return f"expected one of {', '.join(names)}{did_you_mean(name, names)}"
