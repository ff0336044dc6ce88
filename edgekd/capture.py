# SPDX-License-Identifier: Apache-2.0
"""Capture of what converters and native libraries print: it stays out of edgekd's output and is reported if they fail."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgekd.errors import EdgekdError, StageError, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def capture_output() -> Iterator[Callable[[], str]]:
    """Redirect file descriptors 1 and 2 to a temporary file, and silence logs and warnings; yield a function that returns the last line."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as captured:
        stdout, stderr = os.dup(1), os.dup(2)
        os.dup2(captured.fileno(), 1)
        os.dup2(captured.fileno(), 2)

        def last_line() -> str:
            captured.seek(0)
            lines = [line.strip() for line in captured.read().decode(errors="replace").splitlines() if line.strip()]
            return lines[-1] if lines else ""

        disabled_level = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield last_line
        finally:
            logging.disable(disabled_level)
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            os.close(stdout)
            os.close(stderr)


@contextmanager
def one_line_errors(problem: str, *passed: type[Exception]) -> Iterator[None]:
    """Turn whatever a converter, quantizer or runtime raises into an error of one line, except for ``passed``.

    Raises:
        StageError: ``problem`` and the first line of what was raised at first, with the second if the first is a heading.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (EdgekdError, OSError, MemoryError, *passed)):
            raise
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        head = lines[:2] if lines and lines[0].endswith(":") else lines[:1]  # a heading alone says nothing
        raise StageError(f"{problem}: {printable(' '.join(head) or type(cause).__name__)}") from error
