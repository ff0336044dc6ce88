# SPDX-License-Identifier: Apache-2.0
"""Files of soft targets, for tests that need some."""

from __future__ import annotations

import numpy as np

from edgekd.kd.soft_targets import storage
from edgekd.store.digests import digest


def store(path, logits, split="train", slots=None, inputs=1):
    """Write logits (V, n, C) as the stage ``soft_targets`` does, for a split of so many inputs whose artifacts have no digests."""
    data = digest({f"{split}.inputs.{index}": "" for index in range(inputs)})
    header = storage.make_header(split, logits.shape, teacher="", augment="", data=data, slots=slots)
    partial = path.with_name(f"{path.name}.part")
    stored_rows = storage.begin(partial, header)
    for view in logits if header.samples else ():
        stored_rows = storage.append(partial, header, stored_rows, view)
    storage.finish(partial, header, path)


def stored(path):
    """Return the logits (V, n, C) of a file, in float32."""
    soft_targets = storage.open_soft_targets(path)
    return np.stack([soft_targets.read(view, range(soft_targets.header.samples)) for view in range(soft_targets.header.views)])
