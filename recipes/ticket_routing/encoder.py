"""The encoders of ticket routing. This file imports torch alone: a service reads a model folder with a copy of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def build_encoder(config: Any, vocabulary: int, max_tokens: int, num_labels: int) -> nn.Module:
    """token_ids [rows, tokens] int64, token_mask [rows, tokens] bool -> logits [rows, labels].

    config: the keys of the recipe's `model` section as attributes (kind, layers, width, heads, feedforward, dropout).
    """
    if config.kind == "lstm":
        return LSTMEncoder(config, vocabulary, num_labels)
    return TransformerEncoder(config, vocabulary, max_tokens, num_labels)


class Block(nn.Module):
    """A pre-norm Transformer block (Xiong et al. 2020)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.attention_norm = nn.LayerNorm(config.width)
        self.query_key_value = nn.Linear(config.width, 3 * config.width)
        self.attention_out = nn.Linear(config.width, config.width)
        self.feedforward_norm = nn.LayerNorm(config.width)
        self.feedforward_in = nn.Linear(config.width, config.feedforward)
        self.feedforward_out = nn.Linear(config.feedforward, config.width)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        rows, tokens, width = states.shape
        projected = self.query_key_value(self.attention_norm(states))
        query, key, value = projected.view(rows, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        mixed = self.attention_out(mixed.transpose(1, 2).reshape(rows, tokens, width))
        states = states + F.dropout(mixed, self.dropout, self.training)
        inner = self.feedforward_out(F.gelu(self.feedforward_in(self.feedforward_norm(states))))
        return states + F.dropout(inner, self.dropout, self.training)


class TransformerEncoder(nn.Module):
    """Token and position embeddings, pre-norm blocks, and the mean and maximum over the tokens into one linear head."""

    def __init__(self, config: Any, vocabulary: int, max_tokens: int, num_labels: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.token = nn.Embedding(vocabulary, config.width)
        self.position = nn.Embedding(max_tokens, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(2 * config.width, num_labels)
        self.apply(_initialise)

    def forward(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)
        states = F.dropout(self.token(token_ids) + self.position(positions), self.dropout, self.training)
        attention_mask = token_mask[:, None, None, :]
        for block in self.blocks:
            states = block(states, attention_mask)
        pooled = pool(self.norm(states), token_mask)
        return self.head(F.dropout(pooled, self.dropout, self.training))


class LSTMEncoder(nn.Module):
    """A bidirectional LSTM whose states are pooled as in the Transformer encoder."""

    def __init__(self, config: Any, vocabulary: int, num_labels: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.token = nn.Embedding(vocabulary, config.width)
        # torch's own dropout between LSTM layers; one layer has none between.
        between = config.dropout if config.layers > 1 else 0.0
        self.lstm = nn.LSTM(
            config.width, config.width // 2, config.layers, batch_first=True, bidirectional=True, dropout=between
        )
        self.head = nn.Linear(2 * config.width, num_labels)
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        states = F.dropout(self.token(token_ids), self.dropout, self.training)
        # Packed, so that the backward direction starts at the last token and not in the padding.
        lengths = token_mask.sum(1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(states, lengths, batch_first=True, enforce_sorted=False)
        outputs, _ = self.lstm(packed)
        padded, _ = nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True, total_length=token_ids.shape[1])
        return self.head(F.dropout(pool(padded, token_mask), self.dropout, self.training))


def pool(states: Tensor, token_mask: Tensor) -> Tensor:
    """Mean and maximum over the tokens that are no padding: [rows, tokens, width] -> [rows, 2 * width]."""
    mask = token_mask[:, :, None]
    mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
    largest = states.masked_fill(~mask, torch.finfo(states.dtype).min).amax(1)
    return torch.cat([mean, largest], dim=1)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
