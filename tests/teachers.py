# SPDX-License-Identifier: Apache-2.0
"""Teachers that are trained a little, for tests: one that is not trained is refused."""

from __future__ import annotations

import torch

from edgekd import usercode
from edgekd.domain.recipe import EntryPoint
from edgekd.kd import modules


def train(folder, model, splits, loss):
    """Return a module after a few epochs on the training split."""
    torch.manual_seed(0)
    module = modules.build_module(folder, EntryPoint("models.py", model))
    samples = usercode.load_function(folder, EntryPoint("data.py", splits))()["train"]
    images, labels = (torch.stack([torch.as_tensor(sample[part]) for sample in samples]) for part in (0, 1))
    optimizer = torch.optim.AdamW(module.parameters(), 0.003)
    for _ in range(4):
        for rows in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            loss(module(images[rows]), labels[rows]).backward()
            optimizer.step()
    return module.eval()


def heads_loss(*widths):
    """Return the sum of the cross-entropies of several softmaxes side by side."""
    return lambda outputs, labels: sum(
        torch.nn.functional.cross_entropy(logits, labels[:, head]) for head, logits in enumerate(outputs.split(widths, dim=1))
    )


LOSSES = {
    "multilabel": lambda outputs, labels: torch.nn.functional.binary_cross_entropy_with_logits(outputs, labels.float()),
    "heads": heads_loss(2, 10),
    "tokens": heads_loss(2, 2, 2, 2),
    "regression": lambda outputs, labels: torch.nn.functional.mse_loss(outputs[:, 0], labels),
}
