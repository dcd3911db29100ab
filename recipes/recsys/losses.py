"""Softmax over a catalogue whose logits never exist all at once, and its sampled estimate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits of one block: few enough to stay in a CPU's cache, enough to keep a GPU busy.
_CPU_LOGITS, _GPU_LOGITS = 2**20, 2**26
_LEAST_ITEMS = 256
# Finite, so that a block without any item in reach gives no NaN.
_OUT_OF_REACH = -1e30


def full_softmax(queries: Tensor, table: Tensor, targets: Tensor, order: Tensor | None, reach: Tensor | None) -> Tensor:
    """Cross-entropy of each query against all items: [n] float32, exact.

    queries [n, d], table [items, d] and targets [n] int64, indices into the table. order [items] and reach [n] int32:
    only items whose order is below a query's reach are held against it; None: all. What it needs beside the gradients
    does not grow with the number of items: logits are made block by block, and again in the backward pass.
    """
    loss: Tensor = _FullSoftmax.apply(queries, table, targets, order, reach)
    return loss


def sampled_softmax(
    queries: Tensor,
    positive: Tensor,
    targets: Tensor,
    negatives: Tensor,
    drawn: Tensor,
    log_expected: Tensor,
    hidden: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each query against its target and items drawn at random: [n] float32.

    queries [n, d]; positive [n, d], the vectors of targets [n]; negatives [m, d], the vectors of drawn [m].
    log_expected [m]: logarithm of how often each drawn item was to be expected, by which the logits are corrected
    (logQ; Bengio and Senécal 2008, Yi et al. 2019): the gradient is then nearly that of the full softmax. The target is
    no negative of its own. hidden [n, m] bool: those that are not held against a query.
    """
    own = (queries * positive).sum(-1, dtype=torch.float32)
    others = (queries @ negatives.T).float() - log_expected
    others = others.masked_fill(targets[:, None] == drawn, -torch.inf)
    if hidden is not None:
        others = others.masked_fill(hidden, -torch.inf)
    return torch.logaddexp(own, others.logsumexp(-1)) - own


class _FullSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, table: Tensor, targets: Tensor, order: Tensor | None, reach: Tensor | None
    ) -> Tensor:
        queries, table = _in_autocast(queries), _in_autocast(table)
        highest = torch.full((len(queries),), -torch.inf, device=queries.device)
        total = torch.zeros_like(highest)
        for start, stop in _blocks(queries, table):
            logits = _logits(queries, table, order, reach, start, stop)
            top = torch.maximum(highest, logits.amax(1))
            total *= (highest - top).exp_()
            total += logits.sub_(top[:, None]).exp_().sum(1)
            highest = top
        log_total = total.log_().add_(highest)
        ctx.save_for_backward(queries, table, targets, order, reach, log_total)
        own = (queries * F.embedding(targets, table)).sum(-1, dtype=torch.float32)
        return log_total - own

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (gradient,) = gradients
        queries, table, targets, order, reach, log_total = ctx.saved_tensors
        of_queries = torch.zeros(queries.shape, device=queries.device)
        of_table = torch.empty(table.shape, device=table.device)
        for start, stop in _blocks(queries, table):
            block = table[start:stop]
            share = (
                _logits(queries, table, order, reach, start, stop)
                .sub_(log_total[:, None])
                .exp_()
                .mul_(gradient[:, None])
            )
            share = share.to(queries.dtype)
            of_queries += share @ block
            of_table[start:stop] = share.T @ queries
        of_queries -= gradient[:, None] * F.embedding(targets, table)
        of_table.index_add_(0, targets, -(gradient[:, None] * queries).float())
        return of_queries, of_table, None, None, None


def _logits(
    queries: Tensor, table: Tensor, order: Tensor | None, reach: Tensor | None, start: int, stop: int
) -> Tensor:
    """[n, items of the block] float32; hardly above nothing where an item is out of reach."""
    logits = (queries @ table[start:stop].T).float()
    if order is None or reach is None:
        return logits
    return logits.masked_fill_(order[start:stop] >= reach[:, None], _OUT_OF_REACH)


def _in_autocast(value: Tensor) -> Tensor:
    kind = value.device.type
    return value.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else value


def _blocks(queries: Tensor, table: Tensor) -> Iterator[tuple[int, int]]:
    logits = _CPU_LOGITS if queries.device.type == "cpu" else _GPU_LOGITS
    size = max(_LEAST_ITEMS, logits // max(1, len(queries)))
    for start in range(0, len(table), size):
        yield start, min(start + size, len(table))
