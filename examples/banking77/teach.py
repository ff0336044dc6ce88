# SPDX-License-Identifier: Apache-2.0
"""Write ``teacher.safetensors``: the frozen encoder, and a head fitted to the 770 labels by logistic regression. It takes a minute.

EDGEKD_DATA=... python examples/banking77/teach.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from data import splits
from encoder import folder
from models import Teacher
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression

BATCH = 64
INVERSE_PENALTY = 10.0  # chosen on the validation split among 3, 10, 30, 100


def main() -> None:
    """Fit the head and write the weights."""
    teacher = Teacher().eval()
    weights = {name: value for name, value in load_file(folder() / "model.safetensors").items() if not name.startswith("pooler.")}
    missing = teacher.encoder.load_state_dict(weights, strict=False).missing_keys
    if missing:
        raise SystemExit(f"the encoder's file lacks {', '.join(missing)}")
    datasets = splits()
    train, validation = (_embed(teacher, datasets[name]) for name in ("train", "validation"))
    classifier = LogisticRegression(C=INVERSE_PENALTY, max_iter=2000).fit(*train)
    print(f"accuracy on {len(validation[1])} validation questions: {100 * classifier.score(*validation):.2f} %")
    teacher.head.weight.data, teacher.head.bias.data = (
        torch.from_numpy(item.astype(np.float32)) for item in (classifier.coef_, classifier.intercept_)
    )
    save_file({name: value.contiguous() for name, value in teacher.state_dict().items()}, Path(__file__).with_name("teacher.safetensors"))


@torch.inference_mode()
def _embed(teacher: Teacher, split: torch.utils.data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    loader = torch.utils.data.DataLoader(split, BATCH)
    batches = [(teacher.embed(ids).numpy(), labels.numpy()) for ids, labels in loader]
    return np.concatenate([embeddings for embeddings, _ in batches]), np.concatenate([labels for _, labels in batches])


if __name__ == "__main__":
    main()
