# SPDX-License-Identifier: Apache-2.0
"""Teacher: a frozen sentence encoder of 22.7 M parameters with a linear head. Students over hashed word pieces: a CNN, a transformer."""

from __future__ import annotations

import torch
from encoder import TOKENS, folder
from torch import Tensor, nn

INTENTS, WIDTH = 77, 384
BUCKETS, EMBEDDED, FILTERS = 4096, 48, 96
LAYERS, STATES, HEADS = 2, 96, 4
PADDING_SCORE = -20.0  # added to the attention scores of padding; small enough for one int8 scale (with -1e4 accuracy fell to 20 %)


class Teacher(nn.Module):
    """all-MiniLM-L6-v2, mean pooling, L2 normalization, and a linear head."""

    def __init__(self) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        config = BertConfig.from_pretrained(folder(), attn_implementation="eager")
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(WIDTH, INTENTS)

    def forward(self, ids: Tensor) -> Tensor:
        """Shapes: ids (n, 40) int64, padded with 0; result (n, 77)."""
        return self.head(self.embed(ids))

    def embed(self, ids: Tensor) -> Tensor:
        """Return L2-normalized sentence embeddings, (n, 384)."""
        mask = (ids != 0).long()
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(2).to(states.dtype)
        return nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=1)


class Student(nn.Module):
    """Word pieces hashed into 4,096 buckets, convolutions of width 3 and 5, max-pooling over time (Kim 2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BUCKETS, EMBEDDED)
        self.convolutions = nn.ModuleList(nn.Conv2d(EMBEDDED, FILTERS, (size, 1), padding=(size // 2, 0)) for size in (3, 5))
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(2 * FILTERS, INTENTS)

    def forward(self, ids: Tensor) -> Tensor:
        """Shapes: ids (n, 40) int64; result (n, 77)."""
        words = self.embedding(ids % BUCKETS) * (ids != 0).unsqueeze(2)
        columns = words.transpose(1, 2).unsqueeze(3)
        pooled = [torch.relu(convolution(columns)).amax(dim=(2, 3)) for convolution in self.convolutions]
        return self.head(self.dropout(torch.cat(pooled, dim=1)))


class Attention(nn.Module):
    """Multi-head self-attention; returns the new states and, for a tap, the attention probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.values, self.out = (nn.Linear(STATES, STATES) for _ in range(4))

    def forward(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Shapes: states (n, 40, 96), mask (n, 1, 1, 40); results (n, 40, 96) and (n, 4, 40, 40)."""
        count, tokens, _ = states.shape
        queries, keys, values = (
            layer(states).reshape(count, tokens, HEADS, STATES // HEADS).transpose(1, 2) for layer in (self.queries, self.keys, self.values)
        )
        weights = torch.softmax(queries @ keys.transpose(2, 3) / (STATES // HEADS) ** 0.5 + mask, dim=3)
        return self.out((weights @ values).transpose(1, 2).reshape(count, tokens, STATES)), weights


class Layer(nn.Module):
    """Attention and two linear layers, each with a residual connection and layer norm after it (Vaswani et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm1, self.norm2 = Attention(), nn.LayerNorm(STATES), nn.LayerNorm(STATES)
        self.wide = nn.Sequential(nn.Linear(STATES, 2 * STATES), nn.GELU(), nn.Linear(2 * STATES, STATES), nn.Dropout(0.1))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Shapes: as ``Attention``."""
        states = self.norm1(states + self.attention(states, mask)[0])
        return self.norm2(states + self.wide(states))


class Transformer(nn.Module):
    """Two layers over hashed word pieces with learned positions; mean pooling and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(BUCKETS, STATES), nn.Parameter(0.02 * torch.randn(1, TOKENS, STATES))
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(STATES, INTENTS)

    def forward(self, ids: Tensor) -> Tensor:
        """Shapes: ids (n, 40) int64; result (n, 77)."""
        valid = (ids != 0).float()
        mask = ((1 - valid) * PADDING_SCORE)[:, None, None, :]
        states = self.words(ids % BUCKETS) + self.places
        for layer in self.layers:
            states = layer(states, mask)
        return self.head((states * valid.unsqueeze(2)).sum(1) / valid.sum(1, keepdim=True))


def teacher() -> nn.Module:
    """Return the teacher; ``teach.py`` writes its weights."""
    return Teacher()


def student() -> nn.Module:
    """Return the student, which ships."""
    return Student()


def transformer() -> nn.Module:
    """Return a small transformer, which can match the teacher's hidden states and attention too."""
    return Transformer()
