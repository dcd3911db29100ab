"""The network and sequential rules as one distribution over the next item."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recipes.recsys.rules import DECAY, HISTORY


def rule_scores(events: Tensor, last: Tensor, after: Tensor, value: Tensor, items: int) -> Tensor:
    """What the rules of a session's last events say of each item: [rows, items] float32, none below 0.

    events [rows, any] int64: items from 1, 0 behind the last. last [rows] int64: how many there are. after and value
    [trained + 1, most]: as `read_rules` gives them.
    """
    rows, width = events.shape
    distance = torch.arange(min(HISTORY, width), device=events.device)
    place = last[:, None] - 1 - distance
    recent = events.gather(1, place.clamp(min=0))
    # An item that was added after training has no rules.
    known = torch.where((place >= 0) & (recent < len(after)), recent, 0)
    counts = value[known] * (DECAY**distance)[:, None]
    first = torch.arange(rows, device=events.device)[:, None, None] * (items + 1)
    scores = torch.zeros(rows * (items + 1), device=events.device)
    scores.index_add_(0, (after[known] + first).flatten(), counts.flatten())
    return scores.view(rows, items + 1)[:, 1:]


def mix(scores: Tensor, rules: Tensor, share: float, candidates: Tensor) -> Tensor:
    """Logarithm of (1 - share) * softmax(scores) + share * rules / their sum: [rows, items], in place of scores.

    Both are distributions over the candidates [rows, items] bool: what can be recommended. A session without rules has
    the network's alone.
    """
    scores = scores.float().masked_fill_(~candidates, -torch.inf)
    rules = rules.masked_fill(~candidates, 0.0)
    total = rules.sum(1, keepdim=True)
    mixed = scores.sub_(scores.logsumexp(1, keepdim=True))
    mixed.add_(torch.where(total > 0, math.log1p(-share), 0.0))
    # Of most items the rules say nothing: logarithms are taken of the few.
    row, item = rules.nonzero(as_tuple=True)
    spoken = (rules[row, item] / total[row, 0]).log() + math.log(share)
    mixed[row, item] = torch.logaddexp(mixed[row, item], spoken)
    return mixed
