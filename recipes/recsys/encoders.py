"""What reads a session: a causal Transformer (after SASRec), a GRU or LSTM (after GRU4Rec), or its last item alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.recsys.stored import GAP_BUCKETS


def build_encoder(config: Any, longest: int) -> nn.Module:
    """states [rows, events, width], gaps [rows, events] -> states of that shape, each of its event and those before it.

    config: the recipe's `model` section. longest: most events of a row.
    """
    if config.kind == "transformer":
        return TransformerEncoder(config, longest)
    return LastEncoder(config) if config.kind == "last" else RecurrentEncoder(config)


class Block(nn.Module):
    """A pre-norm Transformer block (Xiong et al. 2020) whose events see themselves and what came before."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.attention_norm = nn.LayerNorm(config.width)
        self.query_key_value = nn.Linear(config.width, 3 * config.width)
        self.attention_out = nn.Linear(config.width, config.width)
        self.feedforward_norm = nn.LayerNorm(config.width)
        self.feedforward_in = nn.Linear(config.width, config.feedforward)
        self.feedforward_out = nn.Linear(config.feedforward, config.width)

    def forward(self, states: Tensor) -> Tensor:
        rows, events, width = states.shape
        projected = self.query_key_value(self.attention_norm(states))
        query, key, value = projected.view(rows, events, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # Padding stands behind a row's events, so that causality alone hides it.
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed = self.attention_out(mixed.transpose(1, 2).reshape(rows, events, width))
        states = states + F.dropout(mixed, self.dropout, self.training)
        inner = self.feedforward_out(F.gelu(self.feedforward_in(self.feedforward_norm(states))))
        return states + F.dropout(inner, self.dropout, self.training)


class TransformerEncoder(nn.Module):
    """Self-attentive sequential recommendation (Kang and McAuley 2018), pre-norm, with time gaps beside positions."""

    def __init__(self, config: Any, longest: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.position = nn.Embedding(longest, config.width)
        self.gap = nn.Embedding(GAP_BUCKETS, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.apply(_initialise)

    def forward(self, states: Tensor, gaps: Tensor) -> Tensor:
        positions = torch.arange(states.shape[1], device=states.device)
        states = states + self.position(positions) + self.gap(gaps)
        states = F.dropout(states, self.dropout, self.training)
        for block in self.blocks:
            states = block(states)
        return self.norm(states)


class RecurrentEncoder(nn.Module):
    """A GRU or LSTM over the session (Hidasi et al. 2016)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.gap = nn.Embedding(GAP_BUCKETS, config.width)
        kind = nn.GRU if config.kind == "gru" else nn.LSTM
        between = config.dropout if config.layers > 1 else 0.0
        self.recurrent = kind(config.width, config.width, config.layers, batch_first=True, dropout=between)
        self.out = nn.Linear(config.width, config.width)
        nn.init.normal_(self.gap.weight, std=0.02)

    def forward(self, states: Tensor, gaps: Tensor) -> Tensor:
        states = F.dropout(states + self.gap(gaps), self.dropout, self.training)
        return self.out(self.recurrent(states)[0])


class LastEncoder(nn.Module):
    """Each event by itself: what a session adds is seen beside this."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.feedforward_norm = nn.LayerNorm(config.width)
        self.feedforward_in = nn.Linear(config.width, config.feedforward)
        self.feedforward_out = nn.Linear(config.feedforward, config.width)
        self.norm = nn.LayerNorm(config.width)
        self.apply(_initialise)

    def forward(self, states: Tensor, gaps: Tensor) -> Tensor:
        states = F.dropout(states, self.dropout, self.training)
        inner = self.feedforward_out(F.gelu(self.feedforward_in(self.feedforward_norm(states))))
        return self.norm(states + F.dropout(inner, self.dropout, self.training))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
