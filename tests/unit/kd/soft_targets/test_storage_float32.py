# SPDX-License-Identifier: Apache-2.0
"""Numbers of a regression, stored in float32."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open

from edgekd.errors import RecipeError
from edgekd.kd.soft_targets import storage

DIGESTS = {"teacher": "1" * 64, "augment": "2" * 64, "data": "3" * 64}


def test_numbers_of_a_regression_are_exact(tmp_path):
    header = storage.make_header("train", (1, 3, 2), precision="float32", **DIGESTS)
    numbers = np.array([[[1013.3, -1e6], [1e-7, 70_000.0], [0.1, 3e38]]], dtype=np.float32)
    path = tmp_path / "a"
    storage.append(path, header, storage.begin(path, header), numbers[0])
    soft_targets = storage.open_soft_targets(path, data=DIGESTS["data"])
    assert soft_targets.read(0, [0, 1, 2]).tobytes() == numbers.tobytes()
    with safe_open(path, "np") as file:
        assert file.get_tensor("logits").dtype == np.float32
    with pytest.raises(RecipeError, match=r"precision float32, expected float16|holds other soft targets"):
        storage.open_expected(path, replace(header, precision="float16"))
