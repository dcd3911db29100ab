"""Classification losses over soft targets, one number a row; their sum over the rows is the toolkit's."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-sum_k target_k log p_k of each row [n]. logits, target: [n, classes]; a target's row sums to 1."""
    return -(target * torch.log_softmax(logits.float(), 1)).sum(1)


def focal(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """-sum_k |target_k - p_k|^gamma target_k log p_k of each row [n] (Lin et al. 2017, eq. 4 without alpha; for soft
    targets the distance takes the place of 1 - p, as in Li et al. 2020, "Generalized Focal Loss")."""
    log_p = torch.log_softmax(logits.float(), 1)
    return -((target - log_p.exp()).abs() ** gamma * target * log_p).sum(1)


def smooth(target: Tensor, share: float) -> Tensor:
    """`share` of each target spread evenly over the classes."""
    return target * (1 - share) + share / target.shape[1]
