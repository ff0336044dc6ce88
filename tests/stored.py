# SPDX-License-Identifier: Apache-2.0
"""Files of a teacher's answers, for tests that need some."""

from __future__ import annotations

import numpy as np

from edgekd.digests import digest
from edgekd.kd import answers


def store(path, logits, split="train", slots=None, inputs=1):
    """Write logits (V, n, C) as ``supervise`` does, for a split with so many inputs, whose artifacts have no digests."""
    data = digest({f"{split}.inputs.{index}": "" for index in range(inputs)})
    header = answers.plan(split, logits.shape, teacher="", augment="", data=data, slots=slots)
    part = path.with_name(f"{path.name}.part")
    done = answers.begin(part, header)
    for view in logits if header.samples else ():
        done = answers.append(part, header, done, view)
    answers.finish(part, header, path)


def stored(path):
    """Return what a file holds, as logits (V, n, C) in float32."""
    kept = answers.opened(path)
    return np.stack([kept.read(view, range(kept.header.samples)) for view in range(kept.header.views)])
