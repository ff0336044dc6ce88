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
