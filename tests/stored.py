# SPDX-License-Identifier: Apache-2.0
"""Files of a teacher's answers, for tests that need some."""

from __future__ import annotations

import numpy as np

from edgekd.kd.soft_targets import storage
from edgekd.store.digests import digest


def store(path, logits, split="train", slots=None, inputs=1):
    """Write logits (V, n, C) as ``soft_targets`` does, for a split with so many inputs, whose artifacts have no digests."""
    data = digest({f"{split}.inputs.{index}": "" for index in range(inputs)})
    header = storage.make_header(split, logits.shape, teacher="", augment="", data=data, slots=slots)
    part = path.with_name(f"{path.name}.part")
    done = storage.begin(part, header)
    for view in logits if header.samples else ():
        done = storage.append(part, header, done, view)
    storage.finish(part, header, path)


def stored(path):
    """Return what a file holds, as logits (V, n, C) in float32."""
    kept = storage.open_soft_targets(path)
    return np.stack([kept.read(view, range(kept.header.samples)) for view in range(kept.header.views)])
