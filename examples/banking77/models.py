# SPDX-License-Identifier: Apache-2.0
"""Teacher: a frozen sentence encoder of 22.7 M parameters with a linear head. Student: a CNN over hashed word pieces (Kim 2014)."""

from __future__ import annotations

import torch
from encoder import folder
from torch import Tensor, nn

INTENTS, WIDTH = 77, 384
BUCKETS, EMBEDDED, FILTERS = 4096, 48, 96


class Teacher(nn.Module):
    """all-MiniLM-L6-v2, the mean of its tokens at unit length, and a head."""

    def __init__(self) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        config = BertConfig.from_pretrained(folder(), attn_implementation="eager")
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(WIDTH, INTENTS)

    def forward(self, ids: Tensor) -> Tensor:
        """Shapes: ids (n, 40) int64, 0 where the text has ended; result (n, 77)."""
        return self.head(self.embed(ids))

    def embed(self, ids: Tensor) -> Tensor:
        """Return sentence embeddings, (n, 384), at unit length."""
        mask = (ids != 0).long()
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(2).to(states.dtype)
        return nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=1)


class Student(nn.Module):
    """Word pieces hashed into 4,096 buckets, convolutions over 3 and 5 of them, the largest answer of each filter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BUCKETS, EMBEDDED)
        self.convolutions = nn.ModuleList(nn.Conv2d(EMBEDDED, FILTERS, (size, 1), padding=(size // 2, 0)) for size in (3, 5))
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(2 * FILTERS, INTENTS)

    def forward(self, ids: Tensor) -> Tensor:
        """Shapes: ids (n, 40) int64; result (n, 77)."""
        words = self.embedding(ids % BUCKETS) * (ids != 0).unsqueeze(2)
        pictures = words.transpose(1, 2).unsqueeze(3)
        found = [torch.relu(convolution(pictures)).amax(dim=(2, 3)) for convolution in self.convolutions]
        return self.head(self.dropout(torch.cat(found, dim=1)))


def teacher() -> nn.Module:
    """Return the large network; ``teach.py`` makes its weights."""
    return Teacher()


def student() -> nn.Module:
    """Return the small network that ships."""
    return Student()
