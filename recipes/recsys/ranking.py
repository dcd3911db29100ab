"""Where the targets stand among all items, and the best of them: exact, in bounded memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Scores that are held at once.
_MOST_SCORES = 2**24
# Fewer rows than this at once would read the item table too often.
_LEAST_ROWS = 8


class Ranked(NamedTuple):
    above: Tensor
    """Candidates that score higher than each target: [rows, targets] int64."""
    tied: Tensor
    """Candidates that score the same, the target among them; 0 where the target is no candidate."""
    best: Tensor
    """The items that score highest, best first: [rows, k] int64; 0 where there are fewer candidates."""
    best_scores: Tensor
    """[rows, k] float32; 0 where there are fewer."""


def rank_rows(items: int) -> int:
    """Rows that are scored at once, against so many items."""
    return max(_LEAST_ROWS, _MOST_SCORES // max(1, items))


def can_be_listed(items: int, targets: Tensor, excluded: Tensor, candidates: Tensor | None = None) -> Tensor:
    """[rows, items] bool; column i is item i + 1, since 0 is no item.

    targets [rows, targets] and excluded [rows, any] int64: items, 0 for none. A target is listed although it is
    excluded. candidates [rows, items] bool: those that can be recommended.
    """
    # An extra column takes what names no item.
    hidden = torch.zeros((len(targets), items + 1), dtype=torch.bool, device=targets.device)
    hidden.scatter_(1, excluded, True)
    hidden.scatter_(1, targets, False)
    listed = ~hidden[:, 1:]
    return listed if candidates is None else listed & candidates


def rank(scores: Tensor, targets: Tensor, listed: Tensor, k: int) -> Ranked:
    """scores [rows, items]: changed in place. targets and listed: of and by `can_be_listed`."""
    scores = scores.float()
    items = scores.shape[1]
    place = (targets - 1).clamp(min=0)
    own = scores.gather(1, place)
    scores.masked_fill_(~listed, -torch.inf)
    has_target = (targets > 0) & listed.gather(1, place)
    above, tied = torch.zeros_like(targets), torch.zeros_like(targets)
    for column in range(targets.shape[1]):
        # Most rows have few targets, and some have many.
        here = has_target[:, column].nonzero()[:, 0]
        against, others = own[here, column : column + 1], scores if len(here) == len(scores) else scores[here]
        above[here, column] = (others > against).sum(1)
        tied[here, column] = (others == against).sum(1)
    taken = min(k, items)
    best_scores, best = scores.topk(taken, dim=1)
    valid = best_scores > -torch.inf
    best = torch.where(valid, best + 1, 0)
    best_scores = torch.where(valid, best_scores, 0.0)
    missing = (0, k - taken)
    return Ranked(
        above,
        tied,
        torch.nn.functional.pad(best, missing),
        torch.nn.functional.pad(best_scores, missing),
    )
