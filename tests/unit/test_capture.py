# SPDX-License-Identifier: Apache-2.0
"""What a converter, quantizer or runtime raises becomes one line."""

from __future__ import annotations

import pytest

from edgekd.capture import one_line_errors
from edgekd.errors import StageError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no such op\nat line 3", "it refuses: no such op"),
        ("Verification failed:\n  complex numbers\nat line 3", "it refuses: Verification failed: complex numbers"),
        ("Verification failed:", "it refuses: Verification failed:"),
        ("", "it refuses: ValueError"),
    ],
)
def test_the_first_line_is_reported_and_what_follows_a_heading(text, message):
    with pytest.raises(StageError) as caught, one_line_errors("it refuses"):
        raise ValueError(text)
    assert str(caught.value) == message
