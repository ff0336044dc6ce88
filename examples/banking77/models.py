# SPDX-License-Identifier: Apache-2.0
"""Teacher: a frozen sentence encoder of 22.7 M parameters with a linear head. Students over hashed word pieces: a CNN, a transformer."""

from __future__ import annotations

import torch
from encoder import TOKENS, folder
from torch import Tensor, nn

INTENTS, WIDTH = 77, 384
BUCKETS, EMBEDDED, FILTERS = 4096, 48, 96
LAYERS, STATES, HEADS = 2, 96, 4
ABSENT = -20.0  # added to the score of a token that is not there: enough, and an int8 scale can still hold it (-1e4 left 20 % right)


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
    """Word pieces hashed into 4,096 buckets, convolutions over 3 and 5 of them, the largest answer of each filter (Kim 2014)."""

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


class Attention(nn.Module):
    """Tokens look at each other; gives their new states, and the probabilities by which they looked, for a tap."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.values, self.out = (nn.Linear(STATES, STATES) for _ in range(4))

    def forward(self, states: Tensor, absent: Tensor) -> tuple[Tensor, Tensor]:
        """Shapes: states (n, 40, 96), absent (n, 1, 1, 40); results (n, 40, 96) and (n, 4, 40, 40)."""
        count, tokens, _ = states.shape
        queries, keys, values = (
            made(states).reshape(count, tokens, HEADS, STATES // HEADS).transpose(1, 2) for made in (self.queries, self.keys, self.values)
        )
        weights = torch.softmax(queries @ keys.transpose(2, 3) / (STATES // HEADS) ** 0.5 + absent, dim=3)
        return self.out((weights @ values).transpose(1, 2).reshape(count, tokens, STATES)), weights


class Layer(nn.Module):
    """Attention and two linear layers, each with a short cut and normed behind it (Vaswani et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm1, self.norm2 = Attention(), nn.LayerNorm(STATES), nn.LayerNorm(STATES)
        self.wide = nn.Sequential(nn.Linear(STATES, 2 * STATES), nn.GELU(), nn.Linear(2 * STATES, STATES), nn.Dropout(0.1))

    def forward(self, states: Tensor, absent: Tensor) -> Tensor:
        """Shapes: as ``Attention``."""
        states = self.norm1(states + self.attention(states, absent)[0])
        return self.norm2(states + self.wide(states))


class Transformer(nn.Module):
    """Two layers over hashed word pieces and their places; the mean of the tokens is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(BUCKETS, STATES), nn.Parameter(0.02 * torch.randn(1, TOKENS, STATES))
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(STATES, INTENTS)

    def forward(self, ids: Tensor) -> Tensor:
        """Shapes: ids (n, 40) int64; result (n, 77)."""
        there = (ids != 0).float()
        absent = ((1 - there) * ABSENT)[:, None, None, :]
        states = self.words(ids % BUCKETS) + self.places
        for layer in self.layers:
            states = layer(states, absent)
        return self.head((states * there.unsqueeze(2)).sum(1) / there.sum(1, keepdim=True))


def teacher() -> nn.Module:
    """Return the large network; ``teach.py`` makes its weights."""
    return Teacher()


def student() -> nn.Module:
    """Return the small network that ships."""
    return Student()


def transformer() -> nn.Module:
    """Return a small transformer, which can follow the teacher's states and attention too."""
    return Transformer()
